"""Sockets of services are found by where they are, whatever they were bound as."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mis_run import host_sockets
from mis_run.errors import SetupError
from mis_run.linux import unix_diag


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a socket bound by each kind of name, and much that is no such socket."""
    folder = tmp_path / "real"
    (folder / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (folder / "file").touch()
    os.mkfifo(folder / "fifo")
    monkeypatch.chdir(folder / "deep")
    with ExitStack() as stack:
        for name, kind in (
            (f"{folder}/absolute", socket.SOCK_STREAM),
            ("relative", socket.SOCK_STREAM),
            (f"{tmp_path}/link/linked", socket.SOCK_DGRAM),
            (f"{folder}/renamed", socket.SOCK_SEQPACKET),
            (f"{folder}/twice", socket.SOCK_STREAM),
            (f"{folder}/closed", socket.SOCK_STREAM),
            (f"{tmp_path}/outside", socket.SOCK_STREAM),
            ("\0abstract", socket.SOCK_STREAM),
        ):
            one = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            one.bind(name)
            if name.endswith("closed"):
                one.close()
        (folder / "renamed").rename(folder / "deep" / "er" / "moved")
        os.link(folder / "twice", folder / "deep" / "again")
        (folder / "symlink").symlink_to(folder / "absolute")
        yield folder


BOUND = {"absolute", "deep/relative", "linked", "deep/er/moved", "twice", "deep/again"}


def test_bound_sockets_are_found(services: Path) -> None:
    """Each is named as the agent sees it, through a bind elsewhere and below a link too."""
    assert host_sockets.inside({"/w": str(services)}) == sorted(f"/w/{name}" for name in BOUND)
    link = services.parent / "link"
    assert host_sockets.inside({"/": str(link)}) == sorted(f"/{name}" for name in BOUND)
    assert host_sockets.inside({"/deep": str(services / "deep" / "er")}) == ["/deep/moved"]


def test_what_is_no_folder_has_none(services: Path) -> None:
    """A socket or file that is itself bound was named by the user; a missing one is no matter."""
    for name in ("absolute", "file", "missing"):
        assert host_sockets.inside({"/w": str(services / name)}) == []


def refuse() -> dict[unix_diag.Place, str]:
    raise OSError(2, "no unix_diag")


def test_a_kernel_that_does_not_tell(services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then every socket there may be somebody's, the closed one too."""
    monkeypatch.setattr(unix_diag, "bound", refuse)
    expected = sorted(f"/w/{name}" for name in BOUND | {"closed"})
    assert host_sockets.inside({"/w": str(services)}) == expected


def test_too_large_to_look_through(services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubt is a refusal, with a hint."""
    monkeypatch.setattr(host_sockets, "MOST_WALKED", 3)
    with pytest.raises(SetupError, match="too large") as caught:
        host_sockets.inside({"/w": str(services)})
    assert caught.value.hint
