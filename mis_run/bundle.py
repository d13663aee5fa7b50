"""Plan → OCI runtime configuration (config.json). Pure: nothing is looked up or made here.

What a container is (namespaces, mounts, masks, capabilities, limits) is decided in this one file;
`runtime` runs it.  docs/decisions/user-mapping.md argues the user and the capabilities,
container-rootfs.md what lies where.  Fields: OCI runtime specification 1.0.2.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from mis_run.dataclass import dataclass, field
from mis_run.hints import Any
from mis_run.model import Limits, Plan

LIFELINE = 3  # the shim's descriptor, see shim/init.c
INFO = "/run/mis"  # what the agent is told about itself, and the shim
SHIM = f"{INFO}/init"

# What root inside may do: own and change files, drop to other users, signal its own children.
# No CAP_NET_*, SYS_*, MKNOD, SETPCAP, SYS_CHROOT: nothing that reaches the kernel or the host; no
# FSETID: files on the host that it writes are never set-user-ID (escape_rules.mode_rules).
ROOT_CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL"),
    *("CAP_SETGID", "CAP_SETUID"),
)

# As runc's and moby's defaults, and what tells of the host's other users and hardware.
MASKED_PATHS = (
    *("/proc/acpi", "/proc/asound", "/proc/keys", "/proc/key-users", "/proc/latency_stats"),
    *("/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/proc/kallsyms", "/proc/interrupts"),
    *("/proc/modules", "/sys/firmware", "/sys/devices/virtual/powercap", "/sys/kernel"),
)
# Modes 0400 and 0200 in the kernel: without capabilities a user cannot open them, root could.
MASKED_FROM_ROOT = (
    *("/proc/kcore", "/proc/kmsg", "/proc/kpagecount", "/proc/kpageflags", "/proc/kpagecgroup"),
    *("/proc/sysrq-trigger", "/proc/timer_list", "/proc/vmallocinfo", "/proc/slabinfo"),
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys")

PERIOD = 100_000  # microseconds, the kernel's default CFS period
SHORTEST = 1_000  # microseconds, the kernel's smallest quota
SHM = 256 << 20  # bytes of /dev/shm; they count as the agent's memory
FILES = 65536  # descriptors the agent may ask for, where we may give as many
QUIET = ("nosuid", "nodev")


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What the launch already made, as the configuration needs to name it."""

    root: Path  # merged root file system
    netns: str | None  # path of a network namespace; None: the host's; "": a new empty one
    cgroups_path: str
    shim: Path
    info: Path  # folder shown read-only at INFO; holds an empty file ``init`` for the shim
    seccomp: Mapping[str, Any]
    hidden: Mapping[str, bool] = field(default_factory=dict)  # path inside a bind → is a folder
    protected: Sequence[str] = ()  # existing paths to make read-only inside writable binds
    single: Collection[str] = ()  # those of ``protected`` and of the binds' targets that are files
    swap: bool = True  # whether the kernel accounts swap for a cgroup
    device: str | None = None  # MAJOR:MINOR of the disk that holds the workspace
    files: int = FILES  # our own hard limit of descriptors: raising it takes CAP_SYS_RESOURCE
    listener: Path | None = None  # where the runtime sends the seccomp-notify descriptor


def config(plan: Plan, inside: Inside) -> dict[str, Any]:
    """The whole config.json."""
    user = plan.user
    capabilities = list(ROOT_CAPABILITIES) if user.uid == 0 else []
    seccomp = dict(inside.seccomp)
    if inside.listener is not None:
        seccomp["listenerPath"] = str(inside.listener)
    kinds = ["pid", "ipc", "uts", "mount", "cgroup"]
    namespaces: list[dict[str, str]] = [{"type": kind} for kind in kinds]
    if inside.netns is not None:
        path = {"path": inside.netns} if inside.netns else {}
        namespaces.append({"type": "network", **path})
    files = min(FILES, inside.files)
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
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "rlimits": [
                {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
                {"type": "RLIMIT_NOFILE", "hard": files, "soft": min(4096, files)},
            ],
        },
        "root": {"path": str(inside.root)},
        "mounts": mounts(plan, inside),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": inside.cgroups_path,
            "resources": resources(plan.limits, swap=inside.swap, device=inside.device),
            "seccomp": seccomp,
            "maskedPaths": [*MASKED_PATHS, *(MASKED_FROM_ROOT if user.uid == 0 else ())],
            "readonlyPaths": list(READONLY_PATHS),
        },
    }


def mounts(plan: Plan, inside: Inside) -> list[dict[str, Any]]:
    """Every mount, in an order in which later ones may lie inside earlier ones."""
    quiet = (*QUIET, "noexec")
    pts = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")
    found = [
        _mount("/proc", "proc", "proc", *quiet),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "noexec", "mode=755", "size=64k"),
        _mount("/dev/pts", "devpts", "devpts", *pts),
        _mount("/dev/shm", "tmpfs", "tmpfs", *quiet, "mode=1777", f"size={SHM}"),
        _mount("/dev/mqueue", "mqueue", "mqueue", *quiet),
        _mount("/sys", "sysfs", "sysfs", *quiet, "ro"),
    ]
    if plan.host.cgroup == "v2":
        # Programs read their own limits here; in hybrid mode it would be a dozen mounts.
        found.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", *quiet, "ro"))
    layers = [
        bound(
            bind.source,
            target,
            "ro" if bind.readonly else "rw",
            folder=target not in inside.single,
        )
        for target, bind in plan.shared().items()
    ]
    layers += [_cover(path, is_folder) for path, is_folder in inside.hidden.items()]
    # What lies higher is mounted first, else it would cover what lies inside it.
    layers.sort(key=lambda mount: len(PurePosixPath(mount["destination"]).parts))
    found += layers
    found += [
        bound(path, path, mode, folder=path not in inside.single)
        for path, mode in _pinned(plan, inside.protected)
    ]
    found.append(_alone(inside.info, INFO))
    found.append(_alone(inside.shim, SHIM))
    return found


def _pinned(plan: Plan, protected: Sequence[str]) -> list[tuple[str, str]]:
    """(path, mode) of the protected paths and of every folder between them and their bind.

    A folder above a mount can be renamed, and a new one made in its place; one that is itself a
    mount cannot (EBUSY, rename(2)).  So each folder on the way is mounted on itself.
    """
    targets = plan.shared()
    found: dict[str, str] = {}
    for path in protected:
        for parent in PurePosixPath(path).parents:
            if str(parent) in targets:
                break
            found.setdefault(str(parent), "rw")
        found[path] = "ro"
    return sorted(found.items(), key=lambda item: len(PurePosixPath(item[0]).parts))


def resources(limits: Limits, *, swap: bool, device: str | None = None) -> dict[str, Any]:
    """OCI ``linux.resources``; the runtime writes them into v1 or v2 files."""
    # The runtime adds the harmless devices (null, zero, full, random, urandom, tty, pts) itself.
    found: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if limits.memory is not None:
        found["memory"] = {"limit": limits.memory}
        if limits.swap is not None and swap:
            found["memory"]["swap"] = limits.memory + limits.swap
    if limits.cpus is not None:
        quota = max(SHORTEST, int(limits.cpus * PERIOD))
        found["cpu"] = {"quota": quota, "period": PERIOD}
    if limits.pids is not None:
        # The shim is one process too, and not the agent's.
        found["pids"] = {"limit": limits.pids + 1}
    if device is not None and (limits.io_read or limits.io_write):
        major, minor = map(int, device.split(":"))
        found["blockIO"] = {
            name: [{"major": major, "minor": minor, "rate": rate}]
            for name, rate in (
                ("throttleReadBpsDevice", limits.io_read),
                ("throttleWriteBpsDevice", limits.io_write),
            )
            if rate
        }
    return found


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _cover(path: str, is_folder: bool) -> dict[str, Any]:
    if is_folder:
        return _mount(path, "tmpfs", "tmpfs", *QUIET, "noexec", "ro", "mode=755", "size=4k")
    return _alone("/dev/null", path)


def bound(
    source: Path | str, target: Path | str, mode: str, *more: str, folder: bool = True
) -> dict[str, Any]:
    """A bind mount, ``mode`` "ro" or "rw", of ``source`` and of the mounts below it.

    Words without r are for the mount itself only; those with it reach the mounts below
    (mount_setattr(2), since Linux 5.12), which would stay writable otherwise.  crun takes them for
    folders only.
    """
    if not folder:
        return _mount(os.fspath(target), "bind", os.fspath(source), "bind", *more, mode, *QUIET)
    words = ["rbind", *more, mode, *QUIET, *(f"r{word}" for word in QUIET)]
    return _mount(os.fspath(target), "bind", os.fspath(source), *words, *["rro"] * (mode == "ro"))


def _alone(source: Path | str, target: str) -> dict[str, Any]:
    """A bind mount of a file or folder without the mounts below it, read-only."""
    return _mount(target, "bind", os.fspath(source), "bind", "ro", *QUIET)
