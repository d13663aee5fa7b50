"""Sockets of services on file systems whose files have another device than the kernel's own."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mis_run import host_sockets
from mis_run.linux import unix_diag

pytestmark = pytest.mark.root


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An overlay whose layers lie on two file systems, as in a container, with a tmpfs inside."""
    for name in ("lower/inner", "above", "merged"):
        (tmp_path / name).mkdir(parents=True)
    above, merged = tmp_path / "above", tmp_path / "merged"
    with ExitStack() as stack:

        def mount(kind: str, where: Path, options: str) -> None:
            subprocess.run(["mount", "-t", kind, "-o", options, kind, where], check=True)
            stack.callback(subprocess.run, ["umount", where], check=True)

        mount("tmpfs", above, "size=1m")
        for name in ("upper", "work"):
            (above / name).mkdir()
        layers = f"lowerdir={tmp_path}/lower,upperdir={above}/upper,workdir={above}/work,xino=off"
        mount("overlay", merged, layers)
        mount("tmpfs", merged / "inner", "size=1m")
        stack.callback(monkeypatch.undo)  # out of there before it is unmounted
        monkeypatch.chdir(merged)
        yield merged


def test_on_an_overlay(overlay: Path) -> None:
    """Each is found: by its whole name, by a relative one, and on a file system mounted inside."""
    names = {f"{overlay}/absolute", "relative", "inner/deeper", f"{overlay}/inner/deepest"}
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(name)
        (overlay / "file").touch()
        told = {place[0] for place, name in unix_diag.bound().items() if name.endswith("absolute")}
        assert os.lstat(overlay / "absolute").st_dev not in told  # or this would show nothing
        expected = {f"/w/{name.removeprefix(str(overlay)).strip('/')}" for name in names}
        assert set(host_sockets.inside({"/w": str(overlay)})) == expected
        assert host_sockets.inside({"/w": str(overlay / "inner")}) == ["/w/deeper", "/w/deepest"]
