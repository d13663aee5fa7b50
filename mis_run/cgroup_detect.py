"""Which cgroup hierarchies this machine has, and whether we can make cgroups there.

Read from ``/proc/self/mountinfo`` (proc_pid_mountinfo(5)) and ``/proc/self/cgroup`` (cgroups(7)),
then tried.  Out of scope: the cgroup of a run (`cgroup`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mis_run.errors import SetupError
from mis_run.linux import mountinfo
from mis_run.model import Finding

PARENT = "mis"
"""The directory below each hierarchy's root that holds one directory per run."""
PROBE = f"{PARENT}.probe."
"""With a process id behind it, the cgroup in which that process tries what works."""

LIMITS = ("memory", "cpu", "pids", "io")
"""What limits are made of, by their v2 names; v1 calls ``io`` ``blkio``."""

V1_NAMES: Mapping[str, str] = {"io": "blkio"}

Detected = tuple[str, Path | None, dict[str, Path]]


def detect(proc: Path = Path("/proc/self")) -> Detected:
    """``(kind, unified, controllers)`` of this mount namespace.

    ``kind`` is ``v2`` (no v1 controller mounted), ``hybrid`` (both) or ``v1`` (no cgroup2 mount).
    ``unified`` is the mount point of cgroup2.  ``controllers`` maps each controller, by the
    kernel's own name, to the mount point of the hierarchy it lives in; named v1 hierarchies appear
    as ``name=systemd``, because the runtime makes directories there too.
    """
    names = {name for name in places(proc) if name}
    unified: Path | None = None
    controllers: dict[str, Path] = {}
    for point, kind, options in _mounts((proc / "mountinfo").read_text()):
        if kind == "cgroup2":
            unified = _better(unified, point)
        else:
            controllers |= dict.fromkeys(sorted(names & set(options.split(","))), point)
    v1 = any(not name.startswith("name=") for name in controllers)
    if unified is not None:
        listed = _read(unified / "cgroup.controllers")
        controllers |= {name: unified for name in listed.split() if name not in controllers}
    return ("v1" if unified is None else "hybrid" if v1 else "v2"), unified, controllers


def places(proc: Path = Path("/proc/self")) -> dict[str, str]:
    """controller → path in its hierarchy of the process with this /proc directory; ``""`` is cgroup
    v2 (cgroups(7)). Raises OSError."""
    fields = (line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines())
    return {name: path for _, names, path in fields for name in names.split(",")}


def _mounts(text: str) -> list[tuple[Path, str, str]]:
    """(mount point, cgroup|cgroup2, superblock options), the topmost mount of each point."""
    found: dict[Path, tuple[str, str]] = {}
    for mount in mountinfo.parse(text):
        point = Path(mount.point)
        found.pop(point, None)  # a later mount on the same point hides the earlier one
        if mount.kind in ("cgroup", "cgroup2"):
            found[point] = (mount.kind, mount.options)
    return [(point, *rest) for point, rest in found.items()]


def _better(old: Path | None, new: Path) -> Path:
    """Of two cgroup2 mounts the customary one, else the first: private ones come later."""
    usual = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    return new if old is None or (new in usual and old not in usual) else old


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # hidden or unreadable: no controller can be used from there


def mount_private(where: Path) -> Path:
    """Mount cgroup2 at ``where``, for a host that mounts only v1; returns ``where``.

    The caller must have unshared its mount namespace (`rootfs.isolate`), told by comparing it with
    its parent's: the mount must not be seen by anybody else, and ends with the namespace.  The
    kernel gives controllers to v2 only if no v1 hierarchy holds them, so here it serves identity,
    kill, freeze and BPF.
    Raises SetupError when the kernel refuses.
    """
    import ctypes

    try:
        theirs = Path(f"/proc/{os.getppid()}/ns/mnt").readlink()
    except OSError:
        theirs = None  # our parent's is hidden from us: in doubt do not mount
    if theirs in (None, Path("/proc/self/ns/mnt").readlink()):
        raise SetupError(f"{where}: mounting cgroup2 needs an own mount namespace first")
    where.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    flags = 0x2 | 0x4 | 0x8  # MS_NOSUID | MS_NODEV | MS_NOEXEC, mount(2)
    if libc.mount(b"cgroup2", os.fsencode(where), b"cgroup2", ctypes.c_ulong(flags), None) != 0:
        raise SetupError(
            f"mount -t cgroup2 {where}: {os.strerror(ctypes.get_errno())}",
            hint="use a kernel with cgroup v2 (4.5 or later, CONFIG_CGROUPS=y)",
        )
    return where


def supported(
    kind: str, unified: Path | None, controllers: Mapping[str, Path]
) -> dict[str, Finding]:
    """Findings for ``cgroup-v2``, each of `LIMITS`, ``cgroup-kill`` and ``cgroup-freeze``.

    A directory is really made and removed in the unified hierarchy.  Limits are not set here:
    that needs the run's own cgroup, where `cgroup.create` refuses what does not work.
    """
    if unified is None:
        no = Finding(
            False,
            "cgroup2 is not mounted",
            "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
        )
        found = {"cgroup-v2": no, "cgroup-kill": no, "cgroup-freeze": no}
    else:
        found = _try_unified(kind, unified)
    for name in LIMITS:
        root = controllers.get(name) or controllers.get(V1_NAMES.get(name, name))
        if root is None:
            fix = f"enable it (kernel command line: cgroup_enable={name})"
            found[name] = Finding(False, f"the kernel offers no {name} controller here", fix)
        elif not found["cgroup-v2"].ok and root == unified:
            found[name] = found["cgroup-v2"]
        else:
            found[name] = _limit(name, root, v2=root == unified)
    return found


def _limit(name: str, root: Path, *, v2: bool) -> Finding:
    if os.statvfs(root).f_flag & os.ST_RDONLY:
        return _readonly(root)
    if not v2:
        return Finding(True, f"v1 at {root}")
    enabled = name in (root / "cgroup.subtree_control").read_text().split()
    # Only a cgroup that is not the real root has cgroup.type; there processes forbid children
    # with controllers ("no internal process constraint", cgroup-v2.rst).
    if not enabled and (root / "cgroup.type").exists() and (root / "cgroup.procs").read_text():
        return Finding(
            False,
            f"processes live in {root} itself, so {name} cannot be given to cgroups below it",
            f"mkdir {root}/init && for p in $(cat {root}/cgroup.procs); "
            f"do echo $p > {root}/init/cgroup.procs; done",
        )
    return Finding(True, f"v2 at {root}")


def _readonly(mount: Path) -> Finding:
    return Finding(
        False,
        f"{mount} is mounted read-only (are we inside a container?)",
        "start the container with --privileged --cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup",
    )


def _try_unified(kind: str, unified: Path) -> dict[str, Finding]:
    """Make a cgroup and look at what it offers."""
    probe = unified / f"{PROBE}{os.getpid()}"
    try:
        probe.mkdir(exist_ok=True)  # somebody of this number may have been killed here
    except OSError as error:
        if os.statvfs(unified).f_flag & os.ST_RDONLY:
            no = _readonly(unified)
        else:
            fix = "sudo mis-run …" if os.geteuid() != 0 else f"see: mkdir {unified}/test"
            no = Finding(False, f"mkdir {probe}: {error.strerror}", fix)
        return {"cgroup-v2": no, "cgroup-kill": no, "cgroup-freeze": no}
    try:
        kill, freeze = ((probe / f"cgroup.{what}").exists() for what in ("kill", "freeze"))
    finally:
        probe.rmdir()
    # Both have an equivalent (see `cgroup_kill`), so neither is needed: the detail says which.
    return {
        "cgroup-v2": Finding(True, f"{kind}, {unified}"),
        "cgroup-kill": Finding(True, "cgroup.kill" if kill else "freeze, kill each, thaw"),
        "cgroup-freeze": Finding(True, "cgroup.freeze" if freeze else "v1 freezer"),
    }
