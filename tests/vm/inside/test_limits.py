"""Limits by the controllers of cgroup v2, as each OCI runtime writes them: contained, reported.

The development machine has v1 controllers only. Each limit has a control: the same agent without
it, or with one that it does not reach.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import run
from runtimes import (  # noqa: F401 - two are fixtures
    PYTHON,
    clean_workspace,
    each_runtime,
    event,
    options,
)

MIB = 1 << 20
SHOW = "cd /sys/fs/cgroup && cat memory.max memory.swap.max cpu.max pids.max"


def test_as_written(runtime: str, workspace: Path) -> None:
    """The files of the agent's cgroup hold what the profile says; without limits they say max."""
    text = '[limits]\nmemory = "100M"\nswap = "20M"\ncpus = 0.5\npids = 50\n'
    done = run("sh", "-c", SHOW, cwd=workspace, options=options(workspace, text), timeout=100)
    # Shim included in pids.
    wanted = [str(100 * MIB), str(20 * MIB), "50000", "100000", "51"]
    assert done.out.split() == wanted, done.err


BOMB = """
import os, time
made = refused = 0
while made < 100 and refused < 50:
    try:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        made += 1
    except OSError:
        refused += 1
print(made, refused)
"""


def test_fork_bomb(runtime: str, workspace: Path) -> None:
    """Forks beyond the limit fail, are counted, and told; below it none does."""
    words = (*options(workspace), "--pids", "20")
    done = run(*PYTHON, BOMB, cwd=workspace, options=words, timeout=100)
    assert done.out.split() == ["19", "50"], done.err
    assert "process limit: " in done.err
    told = sum(one["subject"]["count"] for one in done.events if one["kind"] == "limits.pids")
    assert 50 <= told < 60  # runc's own threads in there are refused too
    words = (*options(workspace), "--pids", "200")
    control = run(*PYTHON, BOMB, cwd=workspace, options=words, timeout=100)
    assert control.out.split() == ["100", "0"], control.err
    assert event(control, "run.exit")["usage"]["pids_denied"] == 0


def test_memory_hog(runtime: str, workspace: Path) -> None:
    """The kernel kills at the limit, seen and told; below it the hog lives."""
    hog = "data = bytearray(200 << 20); print(len(data) >> 20)"
    words = (*options(workspace), "--memory", "64M")
    done = run(*PYTHON, hog, cwd=workspace, options=words, timeout=100)
    assert done.code == 137, done.err
    killed = sum(one["subject"]["count"] for one in done.events if one["kind"] == "limits.oom")
    assert killed in ((1, 2) if runtime == "crun" else (1,))  # the hog, and sometimes its init
    assert f"memory limit: {killed} process(es) killed" in done.err
    assert event(done, "run.exit")["usage"]["memory_peak"] < 66 * MIB
    words = (*options(workspace), "--memory", "400M")
    control = run(*PYTHON, hog, cwd=workspace, options=words, timeout=100)
    assert (control.code, control.out) == (0, "200\n"), control.err
    usage = event(control, "run.exit")["usage"]
    assert usage["oom_kills"] == 0
    assert usage["memory_peak"] > 200 * MIB


BURN = """
import time
end = time.monotonic() + 6
while time.monotonic() < end:
    pass
print(time.process_time())
"""


def test_cpu_burner(runtime: str, workspace: Path) -> None:
    """It gets the part of a core that it may have, and its throttling is told."""
    words = (*options(workspace), "--cpus", "0.2")
    done = run(*PYTHON, BURN, cwd=workspace, options=words, timeout=100)
    assert done.code == 0, done.err
    usage = event(done, "run.exit")["usage"]
    assert usage["throttled_seconds"] > 2
    assert "limits.throttled" in {one["kind"] for one in done.events}
    control = run(*PYTHON, BURN, cwd=workspace, options=options(workspace), timeout=100)
    free = event(control, "run.exit")["usage"]
    # A fifth of what there is; the clock of a machine that is emulated on a busy one is coarse.
    assert float(done.out) < 0.6 * float(control.out)
    assert float(control.out) > 3
    assert free["nr_throttled"] == 0
    assert "limits.throttled" not in {one["kind"] for one in control.events}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on a partition of a disk: what a machine's /home is."""
    image, point = tmp_path / "image", tmp_path / "disk"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(446)  # one Linux partition from sector 2048 on, the others none
        entry = struct.pack("<B3sB3sII", 0, b"\0\0\0", 0x83, b"\0\0\0", 2048, 126 * 1024)
        file.write(entry + bytes(48) + b"\x55\xaa")

    def do(*words: str | Path) -> str:
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    do("modprobe", "loop")
    do("modprobe", "ext4")
    loop = do("losetup", "--partscan", "--find", "--show", image)
    try:
        do("mkfs.ext4", "-q", f"{loop}p1")
        do("mount", f"{loop}p1", point)
        try:
            (point / "ws").mkdir()
            yield point / "ws"
        finally:
            do("umount", point)
    finally:
        do("losetup", "--detach", loop)


DIRECT = """
import mmap, os, time
data = mmap.mmap(-1, 1 << 20)  # aligned, as O_DIRECT wants it
began = time.monotonic()
fd = os.open("file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
for number in range(4):
    os.pwrite(fd, data, number << 20)
written = time.monotonic()
for number in range(4):
    os.preadv(fd, [data], number << 20)
print(written - began, time.monotonic() - written)
"""


def test_disk(runtime: str, workspace: Path, disk: Path) -> None:
    """Reads and writes keep to their rates on a partition's disk, and are counted."""
    rates = '[limits]\nio_write = "1M"\nio_read = "2M"\n'
    done = run(*PYTHON, DIRECT, cwd=disk, options=options(workspace, rates), timeout=100)
    writing, reading = map(float, done.out.split())
    assert 3 < writing < 6, done.err
    assert 1.5 < reading < 4, done.err
    usage = event(done, "run.exit")["usage"]
    assert usage["io_write"] >= 4 * MIB
    assert usage["io_read"] >= 4 * MIB
    assert usage["psi_io"]["some_seconds"] > 3
    control = run(*PYTHON, DIRECT, cwd=disk, options=options(workspace), timeout=100)
    writing, reading = map(float, control.out.split())
    assert writing < 1.5, control.err
    assert reading < 1, control.err


def test_the_kernel_takes_no_partition(disk: Path) -> None:
    """Why the disk is looked up: its partition's own number is refused."""
    number = disk.stat().st_dev
    group = Path("/sys/fs/cgroup/mistest-io")
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+io")
    group.mkdir()
    try:
        with pytest.raises(OSError) as refused:
            (group / "io.max").write_text(f"{os.major(number)}:{os.minor(number)} wbps=1048576")
        assert refused.value.errno == errno.ENODEV
    finally:
        group.rmdir()


def test_no_disk(workspace: Path) -> None:
    """Where there is no disk nothing starts, and the message says why; waived, it does."""
    rates = '[limits]\nio_write = "1M"\n'
    words = options(workspace, rates)
    done = run("true", cwd=workspace, options=words, timeout=100)
    assert done.code == 121
    assert "not on a disk" in done.err
    assert "Traceback" not in done.err
    words += ("--allow-missing", "limits")
    assert run("true", cwd=workspace, options=words, timeout=100).code == 0
