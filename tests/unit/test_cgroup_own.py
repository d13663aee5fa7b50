"""Cgroup directories that come and go while we look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mis_run import cgroup_own
from mis_run.errors import SetupError


def test_what_goes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for again, as often as pathlib trips over it; not for ever."""
    (tmp_path / "mis" / "one").mkdir(parents=True)
    failures = 2
    glob = Path.glob

    def tripping(self: Path, pattern: str) -> Iterator[Path]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise FileNotFoundError(pattern)
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", tripping)
    assert cgroup_own.find(tmp_path, "mis/*") == [tmp_path / "mis" / "one"]
    failures = 10**6
    with pytest.raises(SetupError, match="again and again"):
        cgroup_own.find(tmp_path, "mis/*")
