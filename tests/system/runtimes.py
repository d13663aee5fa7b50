"""What the tests of OCI runtimes and of limits in the virtual machine share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Done
from leftovers import snapshot

# An emulated machine is late without being lost.
SLOW = '[liveness]\ndeadline = "4s"\nbeat = "200ms"\ncanary = "2s"\n'
PYTHON = ("/usr/bin/python3", "-I", "-c")


@pytest.fixture(name="runtime", params=["runc", "crun"])
def each_runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each runtime in turn, the one that every launch of the test uses."""
    monkeypatch.setenv("MIS_RUNTIME", request.param)
    return str(request.param)


@pytest.fixture(name="workspace")
def clean_workspace(tmp_path: Path) -> Iterator[Path]:
    """A folder to work in; after the test nothing of any run may be left."""
    folder = tmp_path / "ws"
    folder.mkdir()
    before = snapshot()
    yield folder
    assert snapshot() == before


def options(folder: Path, text: str = "", net: str = "none") -> tuple[str, ...]:
    path = folder.parent / "profile.toml"
    path.write_text(f'extends = "default"\n{text}{SLOW}')
    return ("--profile", str(path), "--net", net, "--plane", "host")


def event(done: Done, kind: str) -> dict[str, Any]:
    (found,) = (one for one in done.events if one["kind"] == kind)
    return dict(found["subject"])
