"""Maps that outlive us, read whole."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from mis_run.linux import bpf_pins

pytestmark = pytest.mark.root
HASH = 1  # enum bpf_map_type


class Unpinned(bpf_pins.PinnedMap):
    """A hash without a pin."""

    def __init__(self) -> None:
        self.fd = bpf_pins._functions().create(HASH, b"mis_test", 8, 12, MOST, None)


MOST = 3 * bpf_pins.BATCH


@pytest.fixture
def table() -> Iterator[Unpinned]:
    one = Unpinned()
    yield one
    one.close()


@pytest.mark.parametrize("count", [0, 1, 100, bpf_pins.BATCH, 2 * bpf_pins.BATCH + 1, MOST])
def test_all_entries_are_read_once(table: Unpinned, count: int) -> None:
    """Fewer and more than one call returns."""
    wanted = {struct.pack("=Q", n): struct.pack("=QI", n * n, n) for n in range(count)}
    for key, value in wanted.items():
        table.update(key, value)
    assert table.items() == wanted
