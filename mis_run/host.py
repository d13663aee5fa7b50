"""What this machine can do: every mechanism tried, each "no" with its reason and its fix.

Nothing is concluded from a version or a configuration file: a mechanism works when a probe of it
worked.  Probes are cheap (no subprocess), since every launch runs them; `diagnose` adds the slow
checks of ``mis doctor``.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Mapping
from pathlib import Path

from mis_run import cgroup, network_detect, rootfs, runtime, startup
from mis_run.build import ROOT
from mis_run.dataclass import dataclass
from mis_run.errors import MissingGuarantee, UsageError
from mis_run.guards import counters, escape, file, net, scope
from mis_run.hints import Any
from mis_run.jsonable import plain
from mis_run.linux import mountinfo
from mis_run.model import Finding, Host, Options, User

ACTIVE_LSMS = Path("/sys/kernel/security/lsm")


@dataclass(frozen=True)
class Caller:
    """Who asks: the user the agent runs as, and the environment it may inherit from."""

    user: User
    environ: Mapping[str, str]


def caller(spec: str | None, environ: Mapping[str, str]) -> Caller:
    """The agent's user: ``spec`` (``NAME``, ``UID`` or ``UID:GID``), else who called sudo, else us.

    Raises UsageError for a user that does not exist or a number out of range.
    """
    if spec is None:
        spec = environ.get("SUDO_UID") if os.geteuid() == 0 else None
        spec = spec or str(os.getuid())
    name, _, group = spec.partition(":")
    hint = "use a name, a UID or UID:GID"
    try:
        if not name.isdecimal():
            entry = pwd.getpwnam(name)
        else:
            if int(name) >= 2**32 - 1:
                raise UsageError(f"--user {spec}: UID out of range", hint=hint)
            entry = pwd.getpwuid(int(name))
    except KeyError:
        if not name.isdecimal():
            raise UsageError(f"--user {spec}: no such user", hint=hint) from None
        # A number without an entry is fine, as for docker: it owns what it makes, no more.
        entry = pwd.struct_passwd((name, "x", int(name), int(name), "", "/", "/bin/sh"))
    gid = entry.pw_gid
    if group:
        if not group.isdecimal() or int(group) >= 2**32 - 1:
            raise UsageError(f"--user {spec}: the group must be a number", hint=hint)
        gid = int(group)
    return Caller(
        # No supplementary groups: docker, disk or sudo membership must not follow the agent.
        User(uid=entry.pw_uid, gid=gid, groups=(), name=entry.pw_name, home=entry.pw_dir),
        dict(environ),
    )


def probe() -> Host:
    """Try every mechanism once."""
    kind, unified, controllers = cgroup.detect()
    chosen = runtime.find()
    mechanisms: dict[str, Finding] = {
        "root": _root(),
        "runtime": chosen.finding,
        "overlay": rootfs.supported(),
        **cgroup.supported(kind, unified, controllers),
        **net.supported(),
        **network_detect.supported(),
        **counters.supported(),
        **escape.supported(),
        **scope.supported(),
        **file.supported(),
        **_kernel_plane(),
        "watchdog": Finding(True, "a process of its own"),
    }
    return Host(
        mechanisms=mechanisms,
        cgroup=kind,
        unified=unified,
        controllers=controllers,
        runtime=chosen.path,
        mounts=tuple((mount.point, mount.kind) for mount in mountinfo.read()),
        addresses=network_detect.host_addresses(),
        cpus=len(os.sched_getaffinity(0)),
        systemd=Path("/run/systemd/system").is_dir(),
        engine=_engine(),
    )


def _engine() -> tuple[str, ...]:
    """Where our own code lies, and the Python that runs it."""
    return tuple(map(str, (*startup.ours(), startup.environment(), Path(sys.base_prefix))))


def _kernel_plane() -> dict[str, Finding]:
    """``bpf-lsm``. Tried where the LSM is in the kernel's own list: trying takes 20 ms."""
    boot = "boot with lsm=…,bpf: docs/decisions/kernel-plane.md"
    try:
        active = ACTIVE_LSMS.read_text().strip().split(",")
    except OSError as error:
        why = f"{ACTIVE_LSMS}: {error.strerror}"
        return {"bpf-lsm": Finding(False, why, "mount -t securityfs none /sys/kernel/security")}
    if "bpf" not in active:
        return {"bpf-lsm": Finding(False, "the BPF LSM is not active on this machine", boot)}
    from mis_run.guards import lsm_plane

    return lsm_plane.supported()


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding(True, "running as root")
    return Finding(
        False,
        "mis-run needs root to make cgroups, mounts and BPF programs",
        f"sudo {_own_name()} …",
    )


def _own_name() -> str:
    """How a person calls us: in a checkout nothing is installed in PATH."""
    return "./mis-run" if (ROOT / "mis-run").exists() else "mis-run"


def needs_root(what: str) -> None:
    """Raise MissingGuarantee unless we are root."""
    if not (finding := _root()).ok:
        raise MissingGuarantee(f"{what} needs root", hint=finding.fix)


def diagnose() -> dict[str, Any]:
    """``mis doctor``: `probe`, the slow checks, and what follows for each guarantee."""
    from mis_run import plan, profiles

    found = probe()
    mechanisms = {**found.mechanisms, **network_detect.diagnose()}
    given = {}
    for guarantee, names in plan.GIVEN_BY.items():
        missing = [name for name in names if not found.works(name)]
        detail = f"missing: {', '.join(missing)}" if missing else ", ".join(names)
        given[guarantee.value] = Finding(not missing, detail)
    default = Finding(True)
    try:
        options = Options(command=("true",), workdir=Path("/srv/workspace"))
        plan.check(plan.make(options, profiles.load("default"), found, caller(None, os.environ)))
    except MissingGuarantee as error:
        default = Finding(False, error.message, error.hint)
    report = {"mechanisms": mechanisms, "guarantees": given, "default_profile": default}
    return dict(plain(report))
