"""Make the guest a host with cgroup v1 only, v2 only, or both (hybrid), as distributions do.

``python layout.py v1|v2|hybrid`` inside the virtual machine. Without systemd nothing holds the
hierarchies, so they can be taken apart and mounted anew. Never run it on a real machine; it
refuses where /proc/cmdline does not say virtme.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

TOP = Path("/sys/fs/cgroup")
NAMED = "name=systemd"


def current() -> str:
    """``v1``, ``v2`` or ``hybrid``, from what is mounted."""
    kinds = {kind for _, kind in _mounts()}
    return {("cgroup",): "v1", ("cgroup2",): "v2"}.get(tuple(sorted(kinds)), "hybrid")


def mount(kind: str) -> None:
    """Mount the cgroup file systems of such a host. The guest must have no cgroups in use."""
    if "virtme" not in Path("/proc/cmdline").read_text():
        raise SystemExit("layout.py: this is not the test VM")
    for point, _ in reversed(_mounts()):
        _clear(Path(point))
        _do("umount", point)
    if any(line.split(" ")[4] == str(TOP) for line in _mountinfo()):
        _do("umount", str(TOP))  # the tmpfs under the v1 hierarchies
    if kind == "v2":
        _do("mount", "-t", "cgroup2", "cgroup2", str(TOP))
        return
    _do("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(TOP))
    for group in (*_v1_groups(), NAMED):
        point = TOP / group.removeprefix("name=")
        point.mkdir()
        options = f"none,{NAMED}" if group == NAMED else group
        try:
            _do("mount", "-t", "cgroup", "-o", options, "cgroup", str(point))
        except SystemExit as error:  # listed, but built without v1: Debian's 6.12 has no v1 cpuset
            point.rmdir()
            print(error, file=sys.stderr)
    if kind == "hybrid":
        (TOP / "unified").mkdir()
        _do("mount", "-t", "cgroup2", "cgroup2", str(TOP / "unified"))


def _v1_groups() -> list[str]:
    """Enabled v1 controllers, mounted together where systemd mounts them together."""
    names = [
        fields[0]
        for line in Path("/proc/cgroups").read_text().splitlines()[1:]
        if (fields := line.split()) and fields[3] == "1"
    ]
    pairs = {"cpu": "cpu,cpuacct", "net_cls": "net_cls,net_prio"}
    merged = {second: first for first, second in (pair.split(",") for pair in pairs.values())}
    return [
        pairs[name] if name in pairs and set(pairs[name].split(",")) <= set(names) else name
        for name in names
        if merged.get(name) not in names
    ]


def _mountinfo() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def _mounts() -> list[tuple[str, str]]:
    return [
        (line.split(" ")[4], kind)
        for line in _mountinfo()
        if (kind := line.partition(" - ")[2].split(" ")[0]) in ("cgroup", "cgroup2")
    ]


def _clear(point: Path) -> None:
    """Remove cgroups below ``point``, deepest first: a v1 hierarchy with children stays alive."""
    for folder in sorted((path for path in point.rglob("*") if path.is_dir()), reverse=True):
        folder.rmdir()


def _do(*argv: str) -> None:
    """Run a command; a hierarchy that is still being torn down is busy for some milliseconds."""
    for _ in range(20):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if "busy" not in done.stderr:
            break
        time.sleep(0.1)
    raise SystemExit(f"layout.py: {' '.join(argv)}: {done.stderr.strip()}")


if __name__ == "__main__":
    if sys.argv[1] != current():
        mount(sys.argv[1])
