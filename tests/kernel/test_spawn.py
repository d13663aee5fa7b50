"""The system's programs that we run: what goes in, and what comes out."""

from __future__ import annotations

import pytest

from mis_run.linux import spawn

pytestmark = pytest.mark.root


def test_input_output_and_code() -> None:
    """More than a pipe holds each way, and the two outputs apart."""
    text = "x" * 300_000
    done = spawn.run(["sh", "-c", "cat; cat /dev/null; echo told >&2; exit 3"], text)
    assert (done.code, done.out, done.err) == (3, text, "told\n")
    assert spawn.run(["sh", "-c", "kill -9 $$"]).code == -9
