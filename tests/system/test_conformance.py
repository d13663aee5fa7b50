"""The conformance table on the host plane; tests/vm/inside/test_conformance.py has the other."""

from __future__ import annotations

from pathlib import Path

import conformance
import pytest
from conformance import GROUPS, Launches

pytestmark = pytest.mark.root
ROWS = {f"{row.group}: {row.name}": row for row in conformance.table()}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """On the host plane."""
    return Launches("host", tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, launches: Launches) -> None:
    """The act meets what its row says, and the record shows the violation it names, no other."""
    row = ROWS[name]
    assert conformance.differences(row.on("host"), launches.of(row)) == []


@pytest.mark.parametrize("group", GROUPS)
def test_control(group: str, tmp_path: Path) -> None:
    """Without mis-run the acts succeed: it is the guard that refuses them."""
    rows = [row for row in ROWS.values() if row.group == group]
    met = conformance.control(rows, tmp_path / "ws")
    wanted = {row.name: row.control for row in rows if row.control is not None}
    assert {name: found for name, found in met.items() if found != wanted[name]} == {}
    assert met


def test_the_table_is_large_enough() -> None:
    """150 rows at least, and each that the planes judge differently says why."""
    assert len(ROWS) == len(conformance.table()) >= 150
    for row in ROWS.values():
        assert (row.kernel is None) == (row.reason is None), row
