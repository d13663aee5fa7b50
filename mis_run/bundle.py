"""Plan → OCI runtime configuration (config.json). Pure: nothing is looked up or made here.

What a container is (namespaces, mounts, masks, capabilities, limits) is decided in this one file;
`runtime` runs it.  docs/decisions/user-mapping.md argues the user and the capabilities.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_run.model import Limits, Plan

LIFELINE = 3  # the shim's descriptor, see shim/init.c
SHIM = "/run/mis/init"

# What root inside may do: own and change files, drop to other users, signal its own children.
# No CAP_NET_*, SYS_*, MKNOD, SETPCAP, SYS_CHROOT: nothing that reaches the kernel or the host.
ROOT_CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL"),
    *("CAP_SETGID", "CAP_SETUID"),
)

# As runc's and moby's defaults: what in /proc and /sys tells of the host or acts on it.
MASKED_PATHS = (
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi"),
    *("/proc/kallsyms", "/proc/kmsg", "/proc/sysrq-trigger", "/proc/interrupts"),
    *("/sys/firmware", "/sys/devices/virtual/powercap", "/sys/kernel"),
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys")

PERIOD = 100_000  # microseconds, the kernel's default CFS period


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What the launch already made, as the configuration needs to name it."""

    root: Path  # merged root file system
    netns: str | None  # path of a network namespace; None: the host's
    cgroups_path: str
    shim: Path
    files: Path  # folder with resolv.conf, hosts and hostname for the agent
    seccomp: Mapping[str, Any]
    hidden: Sequence[tuple[str, bool]]  # (path inside, is a directory)
    extra: Sequence[str] = ()  # separate file systems of the host shown read-only
    swap: bool = True  # whether the kernel accounts swap for a cgroup
    listener: Path | None = None  # where the runtime sends the seccomp-notify descriptor


def config(plan: Plan, inside: Inside) -> dict[str, Any]:
    """The whole config.json."""
    user = plan.user
    capabilities = list(ROOT_CAPABILITIES) if user.uid == 0 else []
    sets = ("bounding", "effective", "permitted", "inheritable")
    seccomp = dict(inside.seccomp)
    if inside.listener is not None:
        seccomp["listenerPath"] = str(inside.listener)
    kinds = ["pid", "ipc", "uts", "mount", "cgroup"]
    namespaces: list[dict[str, str]] = [{"type": kind} for kind in kinds]
    if inside.netns is not None:
        namespaces.append({"type": "network", "path": inside.netns})
    return {
        "ociVersion": "1.0.2",
        "hostname": "agent",
        "process": {
            "terminal": plan.tty,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
            "args": [SHIM, str(LIFELINE), "--", *plan.command],
            "env": [f"{name}={value}" for name, value in plan.env],
            "cwd": str(plan.cwd),
            "noNewPrivileges": True,
            "capabilities": {name: capabilities for name in sets if name != "inheritable"},
            "rlimits": [
                {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
                {"type": "RLIMIT_NOFILE", "hard": 65536, "soft": 4096},
            ],
            "oomScoreAdj": 500,
        },
        "root": {"path": str(inside.root)},
        "mounts": mounts(plan, inside),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": inside.cgroups_path,
            "resources": resources(plan.limits, swap=inside.swap),
            "seccomp": seccomp,
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READONLY_PATHS),
        },
    }


def mounts(plan: Plan, inside: Inside) -> list[dict[str, Any]]:
    """Every mount, in an order in which later ones may lie inside earlier ones."""
    found = [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _tmpfs("/dev", "mode=755", "size=64k", "noexec"),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
        ),
        _tmpfs("/dev/shm", "mode=1777", "size=256m", "noexec", "nodev"),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        _tmpfs("/run", "mode=755", "size=16m", "nodev"),
        _tmpfs("/tmp", "mode=1777", "nodev"),
        _tmpfs("/var/tmp", "mode=1777", "nodev"),
    ]
    found += [_bind(path, path, "ro", "nosuid", "nodev", "rbind") for path in inside.extra]
    # Hidden folders first: the workspace may lie inside one.
    for path, is_folder in inside.hidden:
        if path == plan.user.home:
            continue
        if is_folder:
            found.append(_tmpfs(path, "mode=755", "size=4m", "nodev"))
        else:
            found.append(_bind("/dev/null", path, "ro", "bind"))
    if plan.user.home not in ("/", "/nonexistent"):
        # An empty home of its own: programs expect one, and the real one is not the agent's.
        owner = (f"uid={plan.user.uid}", f"gid={plan.user.gid}")
        found.append(_tmpfs(plan.user.home, "mode=700", *owner, "nodev"))
    found.append(_bind(inside.shim, SHIM, "ro", "nosuid", "nodev", "bind"))
    for name in ("resolv.conf", "hosts", "hostname"):
        found.append(_bind(inside.files / name, f"/etc/{name}", "ro", "bind"))
    found.append(_bind(plan.cwd, plan.cwd, "rw", "nosuid", "nodev", "rbind"))
    for bind in plan.binds:
        mode = "ro" if bind.readonly else "rw"
        found.append(_bind(bind.source, bind.target, mode, "nosuid", "nodev", "rbind"))
    found += [_bind(path, path, "ro", "nosuid", "nodev", "bind") for path in plan.protected]
    return found


def resources(limits: Limits, *, swap: bool) -> dict[str, Any]:
    """OCI ``linux.resources``; the runtime writes them into v1 or v2 files."""
    found: dict[str, Any] = {}
    if limits.memory is not None:
        found["memory"] = {"limit": limits.memory}
        if limits.swap is not None and swap:
            found["memory"]["swap"] = limits.memory + limits.swap
    if limits.cpus is not None:
        found["cpu"] = {"quota": max(1000, int(limits.cpus * PERIOD)), "period": PERIOD}
    if limits.pids is not None:
        # The shim is one process too, and not the agent's.
        found["pids"] = {"limit": limits.pids + 1}
    return found


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _tmpfs(target: str, *options: str) -> dict[str, Any]:
    return _mount(target, "tmpfs", "tmpfs", "nosuid", *options)


def _bind(source: Path | str, target: Path | str, *options: str) -> dict[str, Any]:
    kind = "bind" if "bind" in options or "rbind" in options else "none"
    return _mount(os.fspath(target), kind, os.fspath(source), *options)
