"""The disk under a folder: a partition's own number is of no use to the kernel's limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mis_run import disk
from mis_run.errors import SetupError
from mis_run.linux import mountinfo


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /sys/dev/block with one disk, 8:0, and its partition, 8:1."""
    whole = tmp_path / "devices" / "sda"
    part = whole / "sda1"
    part.mkdir(parents=True)
    (whole / "dev").write_text("8:0\n")
    (part / "dev").write_text("8:1\n")
    (part / "partition").write_text("1\n")
    folder = tmp_path / "block"
    folder.mkdir()
    (folder / "8:0").symlink_to(whole)
    (folder / "8:1").symlink_to(part)
    monkeypatch.setattr(disk, "NUMBERS", folder)
    return folder


class Folder:
    """A path on the device with this number."""

    def __init__(self, major: int, minor: int) -> None:
        self.device = os.makedev(major, minor)

    def stat(self) -> Folder:
        return self

    @property
    def st_dev(self) -> int:
        return self.device

    def __str__(self) -> str:
        return "/ws"


@pytest.mark.parametrize(("minor", "found"), [(0, "8:0"), (1, "8:0")])
def test_whole_and_part(numbers: Path, minor: int, found: str) -> None:
    """A whole disk is itself, a partition is its disk."""
    assert disk.of(Folder(8, minor)) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [(0, 40), (8, 7)])
def test_none(numbers: Path, number: tuple[int, int]) -> None:
    """Without a disk the message names the folder, the reason, and what helps."""
    with pytest.raises(SetupError, match=r"io_read.*/ws lies on .*not on a disk") as refused:
        disk.of(Folder(*number))  # type: ignore[arg-type]
    assert "--allow-missing limits" in refused.value.hint


def test_mounted_from_a_disk(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """btrfs has a number of its own; its mount names the disk."""
    line = "30 1 0:40 / /home rw - btrfs /dev/sda\\0401 rw,subvol=/home"
    monkeypatch.setattr(mountinfo, "read", lambda: mountinfo.parse(line))
    disks = {"/dev/sda 1": os.makedev(8, 1)}
    monkeypatch.setattr(disk, "block_device", lambda name: disks.get(name, 0))
    assert disk.of(Folder(0, 40)) == "8:0"  # type: ignore[arg-type]


def test_what_is_no_block_device(tmp_path: Path) -> None:
    """Words in the place of a device, files and what is not there have no number."""
    for name in ("tmpfs", str(tmp_path), str(tmp_path / "none"), "/dev/null"):
        assert disk.block_device(name) == 0
