"""Cleaning up never reaches what is only mounted in a folder of ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mis_run import trees
from mis_run.linux import libc

pytestmark = pytest.mark.root


def in_own_mounts(act: object) -> None:
    """Call ``act`` in a child with a mount namespace of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            libc.unshare(libc.CLONE_NEWNS)
            libc.mount("none", "/", "", libc.MS_REC | libc.MS_PRIVATE)
            act()  # type: ignore[operator]
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_mounted_files_survive(tmp_path: Path) -> None:
    """A bind of the same file system, one of another, and an overlay lie in the folder: it is
    removed, their files are not, nor does the overlay's upper layer get a single whiteout."""
    precious, run, layer = (tmp_path / name for name in ("precious", "run", "layer"))
    for folder in (precious, run, layer):
        folder.mkdir()
    (precious / "file").write_text("keep")

    def act() -> None:
        for name in ("bind", "overlay", "tmpfs"):
            (run / name).mkdir()
        (run / "own").write_text("remove")
        (run / "link").symlink_to(precious)
        libc.mount(str(precious), str(run / "bind"), "", libc.MS_BIND)
        libc.mount("tmpfs", str(run / "tmpfs"), "tmpfs")
        (run / "tmpfs/inner").mkdir()
        libc.mount(str(precious), str(run / "tmpfs/inner"), "", libc.MS_BIND)
        libc.mount("tmpfs", str(layer), "tmpfs")
        for name in ("lower", "upper", "work"):
            (layer / name).mkdir()
        (layer / "lower/file").touch()
        data = f"lowerdir={layer}/lower,upperdir={layer}/upper,workdir={layer}/work"
        libc.mount("overlay", str(run / "overlay"), "overlay", 0, data)
        assert trees.remove(run)
        assert os.listdir(layer / "upper") == []

    in_own_mounts(act)
    assert not run.exists()
    assert (precious / "file").read_text() == "keep"


def test_what_cannot_be_unmounted_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When unmounting fails nothing is removed, not even beside the mount."""
    precious, run = tmp_path / "precious", tmp_path / "run"
    for folder in (precious, run, run / "bind"):
        folder.mkdir()
    (precious / "file").write_text("keep")
    (run / "own").write_text("stays")

    def refuse(target: str, flags: int = 0) -> None:
        raise OSError(16, "busy")

    def act() -> None:
        libc.mount(str(precious), str(run / "bind"), "", libc.MS_BIND)
        monkeypatch.setattr(libc, "umount", refuse)
        assert not trees.remove(run)

    in_own_mounts(act)
    assert (run / "own").exists() and (precious / "file").exists()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """Nothing to remove is no failure."""
    assert trees.remove(tmp_path / "nothing")


def test_what_is_kept_stays(tmp_path: Path) -> None:
    """Everything else in the folder goes, and what is mounted there is not reached either."""
    precious, run = tmp_path / "precious", tmp_path / "run"
    for folder in (precious, run, run / "folder", run / "lock", run / "bind"):
        folder.mkdir()
    (precious / "file").write_text("keep")
    (run / "folder/file").touch()

    def act() -> None:
        libc.mount(str(precious), str(run / "bind"), "", libc.MS_BIND)
        assert trees.remove(run, keep=("lock", "not there"))

    in_own_mounts(act)
    assert os.listdir(run) == ["lock"]
    assert (precious / "file").read_text() == "keep"
