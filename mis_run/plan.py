"""Options + Profile + Host → Plan: what a launch will do, decided before anything exists.

`make` is pure: the same words on the same host give the same plan, and ``--dry-run`` prints it.
`check` refuses a plan whose required guarantees this host cannot give.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mis_run import planes, profiles, rules
from mis_run.dataclass import replace
from mis_run.errors import MissingGuarantee, UsageError
from mis_run.events import Guarantee
from mis_run.hints import TYPE_CHECKING, Any
from mis_run.model import (
    Finding,
    Host,
    Image,
    Limits,
    Mechanism,
    NetMode,
    NetPlan,
    OnLoss,
    Options,
    Plan,
    Profile,
)

if TYPE_CHECKING:
    from mis_run.host import Caller  # it tries this machine, which a plan does not

# What no flag can waive: without these there is no agent apart from the host.
BASICS = ("root", "cgroup-v2", "runtime", "overlay")

NET_MECHANISMS: Mapping[NetMode, tuple[str, ...]] = {
    NetMode.NONE: ("netns", "cgroup-bpf"),
    NetMode.GUARDED: ("netns", "veth", "cgroup-bpf", "xdp"),
    NetMode.HOST: ("cgroup-bpf",),
}
FORWARDING = "nftables"  # beside those, where a packet may leave

# What `mis doctor` asks for each guarantee; a plan asks for what its profile uses.
GIVEN_BY: Mapping[Guarantee, tuple[str, ...]] = {
    Guarantee.FILE: ("fanotify",),
    Guarantee.EXEC: ("fanotify",),
    Guarantee.NET: (*NET_MECHANISMS[NetMode.GUARDED], FORWARDING),
    Guarantee.ESCAPE: ("runtime", "seccomp-notify"),
    Guarantee.LIMITS: ("memory", "cpu", "pids"),
    Guarantee.COUNTERS: ("perf-cgroup",),
    Guarantee.LIVENESS: ("watchdog",),
}

# A workspace here would hand the agent the host itself, or every secret of a user.
NOT_A_WORKSPACE = frozenset(
    {"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/opt", "/proc", "/root"}
    | {"/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/tmp"}
)

PASSED_ON = ("LANG", "LC_ALL", "LC_CTYPE", "LANGUAGE", "TZ", "TERM", "COLORTERM", "NO_COLOR")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def make(
    options: Options, profile: Profile, host: Host, caller: Caller, image: Image | None = None
) -> Plan:
    """Decide everything. Raises UsageError for words that make no sense together."""
    profile = _with_options(profile, options)
    if image is not None:
        profile = profiles.for_an_image(profile)
    if options.workdir is not None:
        _check_workspace(options.workdir, caller)
    cwd = options.workdir or Path(image.workdir if image else "/")
    network = _network(profile, host)
    limits = _limits(profile.limits, host, options.allow_missing)
    facts = {"HOME": caller.user.home, "WORKSPACE": str(cwd)}
    secrets = () if image else ("@secrets",)
    masked = profiles.expand((*secrets, *profile.files.deny), facts)
    made = Plan(
        name=options.name,
        command=_command(options, image),
        cwd=cwd,
        env=_environment(options, profile, caller, masked, image),
        user=caller.user,
        tty=options.tty,
        rootfs=options.rootfs,
        binds=options.binds,
        masked=masked,
        protected=(*profiles.expand(profile.files.protect, facts), *host.engine),
        mechanisms=tuple(_mechanisms(options, profile, host, network)),
        profile=profile,
        network=network,
        limits=limits,
        host=host,
        log=options.log,
        json_report=options.json,
        waived=options.allow_missing,
        image=image,
        workspace=options.workdir is not None,
    )
    own = _own(made)
    return replace(made, own=own, protected=(*made.protected, *own))


def _own(plan: Plan) -> tuple[str, ...]:
    """Where the agent could write to the rules of its next launch, or to the record of this one."""
    log = [os.path.normpath(plan.log)] if plan.log else []
    return tuple(
        f"{target.rstrip('/')}/{Path(path).relative_to(bind.source)}"
        for target, bind in plan.writable().items()
        for path in (*plan.profile.sources, *log)
        if Path(path).is_relative_to(bind.source)
    )


def need(host: Host, names: Iterable[str], what: str) -> None:
    """Raise MissingGuarantee, "cannot WHAT here", unless each mechanism in ``names`` works."""
    for name in names:
        finding = host.mechanisms[name]
        if not finding.ok:
            raise MissingGuarantee(f"cannot {what} here: {finding.detail}", hint=finding.fix)


def _command(options: Options, image: Image | None) -> tuple[str, ...]:
    """As Docker puts it together: a command replaces the image's, an entrypoint stays before it;
    another entrypoint leaves the image's command out."""
    if image is None:
        return options.command
    if options.entrypoint is not None:
        found = ((options.entrypoint,) if options.entrypoint else ()) + options.command
    else:
        found = (*image.entrypoint, *(options.command or image.command))
    if not found or not found[0]:
        raise UsageError(
            f"image {image.name} names no command", hint="mis-run --image IMAGE -- CMD [ARG]…"
        )
    return found


def check(plan: Plan) -> None:
    """Raise MissingGuarantee unless the host gives every basic and every required guarantee."""
    need(plan.host, BASICS, "start an agent")
    for mechanism in plan.mechanisms:
        if mechanism.finding.ok or mechanism.extra:
            continue
        missing = f"{mechanism.name} is missing: {mechanism.finding.detail}"
        fix = f"{mechanism.finding.fix}; or " if mechanism.finding.fix else ""
        if mechanism.name == planes.LSM:  # only where it was asked for by name
            raise MissingGuarantee(f"no kernel plane here: {missing}", hint=f"{fix}--plane host")
        if mechanism.guarantee is Guarantee.NET:
            # A network without its guard is not a weaker promise but none: never waived.
            other = "" if plan.network.mode is NetMode.NONE else "run without a network: --net none"
            raise MissingGuarantee(
                f"no guarded network here: {missing}", hint=f"{fix}{other}".removesuffix("; or ")
            )
        if mechanism.guarantee in plan.waived or mechanism.guarantee not in plan.profile.require:
            continue
        raise MissingGuarantee(
            f"profile {plan.profile.name} requires '{mechanism.guarantee}', but {missing}",
            hint=f"{fix}run without it: --allow-missing {mechanism.guarantee}",
        )


def _with_options(profile: Profile, options: Options) -> Profile:
    """The profile with what the command line says on top."""
    network = profile.network
    if options.net is not None:
        network = replace(network, mode=options.net)
    if options.allow_net:
        if network.mode is NetMode.NONE:
            raise UsageError(
                "--allow-net with a network mode of 'none': there is no network to allow",
                hint="--net guarded",
            )
        network = replace(network, allow=(*network.allow, *options.allow_net))
    for text in network.allow:
        rules.parse(text)
    given = {
        key: getattr(options, key)
        for key in ("memory", "cpus", "pids", "timeout")
        if getattr(options, key) is not None
    }
    return replace(profile, network=network, limits=replace(profile.limits, **given))


def _check_workspace(workdir: Path, caller: Caller) -> None:
    hint = "cd into a project first, or name one: --workdir DIR"
    if str(workdir) in NOT_A_WORKSPACE or str(workdir) == caller.user.home:
        raise UsageError(
            f"{workdir} cannot be the agent's workspace: too much lies in it", hint=hint
        )
    for kernel in ("/proc", "/sys", "/dev", "/run"):
        if workdir.is_relative_to(kernel):
            raise UsageError(f"{workdir} cannot be the agent's workspace", hint=hint)


def _network(profile: Profile, host: Host) -> NetPlan:
    network = profile.network
    parsed = [rules.parse(text) for text in network.allow]
    wants_v6 = any(rule.family != 4 for rule in parsed)
    return NetPlan(
        mode=network.mode,
        ipv6=network.mode is NetMode.GUARDED and wants_v6 and host.works("ipv6"),
        allow=network.allow,
        listen=network.listen,
        resolvers=network.resolvers,
        host_addresses=host.addresses,
        forwards=network.mode is NetMode.GUARDED
        and (
            bool(network.allow)
            or not profile.enforce
            or profile.liveness.on_loss is OnLoss.OPEN  # which goes on as audit
        ),
    )


def possible(limits: Limits, host: Host) -> Limits:
    """More cores than the machine has is no limit; the kernel would refuse or ignore it."""
    return replace(limits, cpus=None) if (limits.cpus or 0) >= host.cpus else limits


def _limits(limits: Limits, host: Host, waived: frozenset[Guarantee]) -> Limits:
    """The limits that will be set: a waived one that this host cannot give is left out."""
    limits = possible(limits, host)
    if Guarantee.LIMITS in waived:
        fields: dict[str, tuple[str, ...]] = {"memory": ("memory",), "cpu": ("cpus",)}
        fields |= {"pids": ("pids",), "io": ("io_read", "io_write")}
        for controller, names in fields.items():
            if not host.works(controller):
                none: dict[str, Any] = dict.fromkeys(names)
                limits = replace(limits, **none)
    return limits


def _environment(
    options: Options,
    profile: Profile,
    caller: Caller,
    masked: tuple[str, ...],
    image: Image | None = None,
) -> tuple[tuple[str, str], ...]:
    """The agent's variables: a clean slate, what the image sets, what the profile passes on, then
    ``--env``. An image has its own PATH, and does not set what tells of mis-run."""
    # Homes are hidden whole, so programs in them cannot be found.
    hidden = ("/home", caller.user.home, *(path for path in masked if "*" not in path))
    inherited = caller.environ.get("PATH", DEFAULT_PATH).split(":")
    path = [
        entry
        for entry in inherited
        if entry.startswith("/") and not any(_lies_in(entry, folder) for folder in hidden)
    ]
    path += [entry for entry in DEFAULT_PATH.split(":") if entry not in path]
    env = {
        "PATH": DEFAULT_PATH if image else ":".join(path),
        "HOME": caller.user.home,
        "USER": caller.user.name,
        "LOGNAME": caller.user.name,
    }
    env |= {name: caller.environ[name] for name in PASSED_ON if name in caller.environ}
    env |= image.env if image else ()
    env |= {name: caller.environ[name] for name in profile.env if name in caller.environ}
    env |= {"MIS_PROFILE": profile.name, "MIS_NETWORK": profile.network.mode.value}
    env |= {"MIS_INFO": "/run/mis"}
    env.update(options.env)
    return tuple(env.items())


def _lies_in(path: str, folder: str) -> bool:
    """As Path.is_relative_to, a hundred times faster: every launch asks it hundreds of times."""
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _mechanisms(
    options: Options, profile: Profile, host: Host, network: NetPlan
) -> list[Mechanism]:
    """How each guarantee is given."""
    missing = Finding(False, "not part of this version")
    wanted: list[tuple[Guarantee, str]] = []
    wanted += [(Guarantee.NET, name) for name in NET_MECHANISMS[network.mode]]
    wanted += [(Guarantee.NET, FORWARDING)] if network.forwards else []
    asked = _limits(profile.limits, host, frozenset())
    wanted += [(Guarantee.LIMITS, controller) for controller in asked.controllers()]
    wanted += [(Guarantee.COUNTERS, "perf-cgroup")] if profile.counters else []
    wanted += [(Guarantee.ESCAPE, "seccomp-notify")]
    wanted += planes.choose(options, profile, host)
    wanted += [(Guarantee.LIVENESS, "watchdog")]
    found = [
        Mechanism(guarantee, name, host.mechanisms.get(name, missing)) for guarantee, name in wanted
    ]
    if network.mode is NetMode.HOST:  # abstract sockets of the host, from Linux 6.12 on
        finding = host.mechanisms.get("landlock-scope", missing)
        found.append(Mechanism(Guarantee.NET, "landlock-scope", finding, extra=True))
    return found
