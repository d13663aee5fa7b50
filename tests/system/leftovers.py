"""What mis-run could leave on a machine, as one comparable value."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from mis_run import cgroup_own


def snapshot() -> dict[str, list[str]]:
    """Cgroups, interfaces, tables, mounts, state, switches: sorted names, ours only."""
    cgroups = sorted(
        str(path)
        for root in _cgroup_roots()
        for pattern in ("mis/*", "mis.probe.*")
        for path in cgroup_own.find(root, pattern)
        if path.is_dir()
    )
    interfaces = sorted(
        entry.name for entry in Path("/sys/class/net").iterdir() if entry.name.startswith("mis")
    )
    tables = subprocess.run(
        ["nft", "list", "tables"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    mounts = [
        line.split(" ")[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if "/run/mis" in line or "mis-" in line
    ]
    state = sorted(
        os.path.join(folder, name)
        for folder, _, files in os.walk("/run/mis")  # unlike rglob: folders may go meanwhile
        for name in files
        if "net" not in Path(folder).parts
    )
    switches = [
        f"{name}={Path('/proc/sys', name).read_text().strip()}"
        for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
    ]
    processes = [
        f"{entry.name} {_read(entry / 'cmdline')} {_read(entry / 'cgroup')}"
        for entry in Path("/proc").glob("[0-9]*")
        if ("/mis/" in _read(entry / "cgroup") or "/run/mis/" in _read(entry / "cmdline"))
        # A zombie that this machine's init has not reaped yet is no process any more.
        and ") Z " not in _read(entry / "stat")
    ]
    return {
        "cgroups": cgroups,
        "interfaces": interfaces,
        "tables": sorted(line for line in tables if " mis" in line),
        "mounts": sorted(mounts),
        "state": state,
        "switches": switches,
        "processes": sorted(processes),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it ended meanwhile
        return ""


def _cgroup_roots() -> list[Path]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ")[0] in ("cgroup", "cgroup2"):
            found.append(Path(before.split(" ")[4]))
    return found
