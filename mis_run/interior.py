"""What the container's configuration needs to know of this run and this machine.

Between the pure `bundle` and the machine: looks at limits and devices, makes the folder that the
agent reads its own rules in.
"""

from __future__ import annotations

import resource
from pathlib import Path

from mis_run import briefing, bundle, disk, rootfs, rules, seccomp
from mis_run.build import built
from mis_run.cgroup import Cgroup
from mis_run.errors import SetupError
from mis_run.events import Guarantee
from mis_run.guards import escape_rules
from mis_run.hints import Any
from mis_run.linux import memfd
from mis_run.model import NetMode, Plan
from mis_run.network import Link

MEMSW = Path("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")


def etc(plan: Plan) -> dict[str, str]:
    """The agent's own files of /etc.

    In a namespace of its own the agent asks our resolver; on the host's network, the host's.
    """
    if plan.network.mode is NetMode.HOST:
        from mis_run import resolve

        resolvers = [address for address, _ in resolve.upstream(())]
    else:
        resolvers = ["127.0.0.1"]
    return rootfs.etc_files(resolvers, _static_hosts(plan))


def describe(
    plan: Plan, folder: Path, root: rootfs.Root, link: Link | None, group: Cgroup
) -> bundle.Inside:
    """Everything `bundle.config` needs beside the plan. ``folder`` is the run's own."""
    info = folder / "info"
    info.mkdir(mode=0o755)
    (info / "init").touch()
    for name in ("canary", "kernel-canary"):
        (info / name).touch(mode=0o555)
    briefing.write(plan, info)
    notified = plan.uses("seccomp-notify")
    protected = rootfs.protected(plan)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return bundle.Inside(
        root=root.path,
        netns=link.path if link else None,
        cgroups_path=group.oci_path,
        shim=built("mis-init"),
        info=info,
        seccomp=_notifying(plan) if notified else seccomp.profile(),
        listener=folder / "seccomp.sock" if notified else None,
        hidden=rootfs.hidden(plan),
        protected=protected,
        single=rootfs.single(plan, protected),
        swap=_swap_is_accounted(plan, group),
        device=_device(plan),
        files=files if files != resource.RLIM_INFINITY else bundle.FILES,
    )


def _notifying(plan: Plan) -> dict[str, Any]:
    """The filter that hands over what the escape guard judges."""
    notify = escape_rules.notify_rules(sealed_memfds=memfd.sealable())
    governed = escape_rules.NAMES
    if plan.writable():
        notify += escape_rules.mode_rules(plan.user.uid)
        governed |= escape_rules.MODE_AT.keys()
    return seccomp.profile(notify, left_out=governed)


def _device(plan: Plan) -> str | None:
    """MAJOR:MINOR of the disk that the agent reads and writes; none where nothing is the host's, or
    nothing of that is limited. Raises SetupError where it cannot be, unless that is waived."""
    if not plan.workspace or not (plan.limits.io_read or plan.limits.io_write):
        return None
    try:
        return disk.of(plan.cwd)
    except SetupError:
        if Guarantee.LIMITS in plan.waived:
            return None
        raise


def _swap_is_accounted(plan: Plan, group: Cgroup) -> bool:
    """Kernels without swap accounting have no such file, and refuse the limit."""
    if plan.host.controllers.get("memory") == plan.host.unified:
        return (group.unified / "memory.swap.max").exists()
    return MEMSW.exists()


def _static_hosts(plan: Plan) -> dict[str, str]:
    """Names of the host's /etc/hosts that rules allow, for programs that read only that file."""
    wanted = [name for text in plan.network.allow if (name := rules.parse(text).name)]
    if not wanted:
        return {}
    from mis_run import resolve

    return {name: found[0] for name in wanted if (found := resolve.from_hosts(name))}
