"""Lines become rules on inodes: links stay inside the root, the nearest line decides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run.guards import lsm_abi, lsm_policy
from mis_run.guards.lsm_abi import Right, RuleFlag
from mis_run.guards.lsm_policy import Compiled, Entry, Line, Place, effective

NO, ALL, READ, WRITE, EXEC = Right(0), Right.ALL, Right.READ, Right.WRITE, Right.EXEC


def compiled(root: Path, *lines: Line, mounts: tuple[str, ...] = ()) -> Compiled:
    fd = os.open(root, os.O_PATH)
    try:
        made = lsm_policy.compile(lines, fd, lsm_policy.devices(os.getpid()), mounts)
    finally:
        os.close(fd)
    return made


def at(made: Compiled, path: Path) -> Entry | None:
    found = [entry for place, entry in made.entries.items() if place.inode == path.stat().st_ino]
    return found[0] if found else None


def test_links_stay_inside(tmp_path: Path) -> None:
    """Absolute links and .. are followed inside the container's root, never on the host."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("inside")
    (tmp_path / "link").symlink_to("/etc/passwd")
    made = compiled(
        tmp_path,
        Line("/link", NO, ALL, "by link"),
        Line("/../../../etc", READ, NO, "by dots"),
        Line("/proc/self/root", READ, NO, "not there"),
    )
    link = at(made, tmp_path / "etc" / "passwd")
    dots = at(made, tmp_path / "etc")
    assert link is not None and (link.deny, link.number) == (ALL, 1)
    assert dots is not None and (dots.allow, dots.number) == (READ, 2)
    assert made.missing == ("/proc/self/root",)
    host = Path("/etc/passwd").stat()
    assert all(place.inode != host.st_ino for place in made.entries)
    made.release()


def test_two_lines_on_one_inode(tmp_path: Path) -> None:
    """Both count, and a denial is what an event names."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    made = compiled(tmp_path, Line("/a", READ | WRITE, NO, "one"), Line("/b", NO, WRITE, "two"))
    entry = at(made, tmp_path / "a")
    assert entry is not None
    assert (entry.allow, entry.deny, entry.number) == (READ | WRITE, WRITE, 2)
    assert entry.flags & RuleFlag.ANCHOR
    made.release()


def test_denials_anchor_what_is_above(tmp_path: Path) -> None:
    """No folder above a denial can be moved away; folders above what is only allowed can."""
    (tmp_path / "x" / "y" / "deny").mkdir(parents=True)
    (tmp_path / "z" / "allow").mkdir(parents=True)
    made = compiled(
        tmp_path, Line("/x/y/deny", NO, ALL, "deny"), Line("/z/allow", ALL, NO, "allow")
    )
    for path in ("x", "x/y", "x/y/deny"):
        entry = at(made, tmp_path / path)
        assert entry is not None and entry.flags & RuleFlag.ANCHOR
    above = at(made, tmp_path / "x")
    assert above is not None and (above.allow, above.deny) == (NO, NO)
    assert at(made, tmp_path / "z") is None
    made.release()


def test_a_mount_says_what_holds_there(tmp_path: Path) -> None:
    """The root of a mount has every right decided, as the lines above it decide; what none lets be
    executed is not denied that."""
    (tmp_path / "a" / "mnt").mkdir(parents=True)
    made = compiled(
        tmp_path,
        Line("/", READ, NO, "root"),
        Line("/a", WRITE, EXEC, "a"),
        mounts=("/a/mnt", "/none"),
    )
    entry = at(made, tmp_path / "a" / "mnt")
    assert entry is not None
    assert (entry.allow, entry.deny) == (READ | WRITE, ALL & ~(READ | WRITE))
    unnamed = compiled(tmp_path, Line("/", READ, NO, "root"), mounts=("/a/mnt",))
    entry = at(unnamed, tmp_path / "a" / "mnt")
    assert entry is not None
    assert (entry.allow, entry.deny) == (READ, ALL & ~(READ | EXEC))
    unnamed.release()
    made.release()


def test_held_descriptors_are_released(tmp_path: Path) -> None:
    """The inodes of the rules are held as long as the rules are, no longer."""
    before = len(os.listdir("/proc/self/fd"))
    made = compiled(tmp_path, Line("/", READ, NO, "root"))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    made.release()
    assert len(os.listdir("/proc/self/fd")) == before


RIGHTS = st.integers(0, Right.ALL).map(Right)
CHAIN = st.lists(st.builds(Entry, allow=RIGHTS, deny=RIGHTS, number=st.integers(1, 9)), max_size=5)


@given(CHAIN)
def test_the_nearest_decides_each_right(chain: list[Entry]) -> None:
    """For every single right: the first entry that names it decides, deny beats allow, none: no."""
    made = effective(chain)
    for right in Right:
        named = [entry for entry in chain if right & (entry.allow | entry.deny)]
        expected = bool(named) and not right & named[0].deny
        assert bool(right & made.allow) == expected
        if right is Right.EXEC:
            assert bool(right & made.deny) == (bool(named) and not expected)
        else:
            assert bool(right & made.deny) != expected


@given(st.binary(max_size=lsm_abi.EVENT.size + 8))
def test_any_bytes_are_an_event(raw: bytes) -> None:
    """Whatever the ring buffer brings is an event and no exception."""
    lsm_abi.event(raw, ["one"])
    lsm_abi.event(raw.ljust(lsm_abi.EVENT.size, b"\xff")[: lsm_abi.EVENT.size], ["one"])


def test_capabilities_by_name() -> None:
    """Numbers of linux/capability.h."""
    assert lsm_abi.capability_mask(["CAP_CHOWN", "sys_admin"]) == 1 | 1 << 21
    with pytest.raises(ValueError):
        lsm_abi.capability_mask(["sys_everything"])


def test_devices_are_the_kernels_own(tmp_path: Path) -> None:
    """For an ordinary file system it is what stat(2) says."""
    device = lsm_policy.devices(os.getpid())
    fd = os.open("/proc", os.O_PATH)
    st_dev = os.fstat(fd).st_dev
    assert device(fd) == os.major(st_dev) << 20 | os.minor(st_dev)
    os.close(fd)
    assert Place(1, 2) == (1, 2)
