"""Which OCI runtime a launch takes."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from mis_run import runtime
from mis_run.linux import programs

NEW, OLD = b"... listenerPath ...", b"... crun 0.17 ..."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with programs, on a machine with v1 controllers beside v2."""
    monkeypatch.setattr(programs, "FOLDERS", str(tmp_path))
    monkeypatch.delenv("MIS_RUNTIME", raising=False)
    monkeypatch.setattr(runtime, "CRUN_READS", tmp_path)
    return tmp_path


def program(path: Path, content: bytes = b"") -> str:
    path.write_bytes(content)
    path.chmod(0o755)
    return str(path)


def test_crun_first(folder: Path) -> None:
    """crun is taken before runc, unless another is named."""
    assert "apt-get install" in runtime.find().finding.fix
    runc = program(folder / "runc")
    assert str(runtime.find().path) == runc
    crun = program(folder / "crun", NEW)
    assert str(runtime.find().path) == crun


def test_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$MIS_RUNTIME is taken whatever it is; a wrong one is told, not replaced."""
    program(folder / "crun", NEW)
    monkeypatch.setenv("MIS_RUNTIME", program(folder / "mine"))
    assert runtime.find().path == folder / "mine"
    monkeypatch.setenv("MIS_RUNTIME", "/nonexistent")
    found = runtime.find()
    assert found.path is None
    assert "/nonexistent" in found.finding.detail


def test_a_crun_without_notify_is_passed_over(folder: Path) -> None:
    """Before 0.20 crun would make a container without the escape guard's descriptor."""
    program(folder / "crun", OLD)
    assert runtime.find().path is None
    assert "0.20" in runtime.find().finding.detail
    runc = program(folder / "runc")
    assert str(runtime.find().path) == runc


def test_crun_needs_memlock_on_v2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where crun limits devices by BPF it raises RLIMIT_MEMLOCK, which engines' containers may
    not; trying that leaves our own limit as it was."""
    program(folder / "crun", NEW)
    runc = program(folder / "runc")
    monkeypatch.setattr(runtime, "CRUN_READS", folder / "none")
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)

    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    set_limit = resource.setrlimit
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert str(runtime.find().path) == runc
    monkeypatch.setattr(resource, "setrlimit", lambda which, _: set_limit(which, before))
    assert runtime.find().path == folder / "crun"
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == before
