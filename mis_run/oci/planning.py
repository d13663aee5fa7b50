"""Profile + container + host → Plan, as `plan.make` does for a command. Pure.

What differs: the container, its root, its network and its storage are the engine's; ours are the
rules.  `check` refuses what this machine, or an engine's container, cannot give.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mis_run import profiles, rules
from mis_run.dataclass import replace
from mis_run.errors import MissingGuarantee, UsageError
from mis_run.events import Guarantee
from mis_run.model import (
    Bind,
    Finding,
    Host,
    Limits,
    Mechanism,
    NetMode,
    NetPlan,
    OnLoss,
    Plan,
    Profile,
    User,
)
from mis_run.oci.operator import Operator
from mis_run.oci.order import Order
from mis_run.oci.spec import Spec
from mis_run.plan import need, possible

ENGINES_RESOLVER = "127.0.0.11"
"""Docker's own DNS server inside user-defined networks: asking it anything is a way out."""

BASICS = ("root", "cgroup-v2", "runtime", "cgroup-bpf", "seccomp-notify")
"""Without these there is nothing to guard a container with."""
HOOK_BASICS = ("root", "cgroup-v2", "cgroup-bpf")

SKETCH = Host(mechanisms={}, cgroup="", unified=None, controllers={}, runtime=None)
"""A machine that nobody has looked at: enough for what a configuration needs of a plan. The
supervisor makes the plan that is checked, while the OCI runtime works."""

NOT_HERE = Finding(False, "not given to containers of an engine yet", "leave it out of [require]")


BY_HOOK = Finding(
    False,
    "an OCI hook cannot give it",
    "use the runtime (--runtime mis), or waive it in the hook's file: --allow-missing",
)
HOOKS = frozenset({Guarantee.NET, Guarantee.COUNTERS, Guarantee.LIVENESS})
"""What a hook can give: all that needs nothing but the container's cgroup."""


def of(order: Order, host: Host) -> Plan:
    """The plan for an order. Raises UsageError as `make`, and for what a hook cannot do."""
    plan = make(order.profile, order.spec, order.operator, host, order.name)
    if not order.by_hook:
        return plan
    for text in plan.network.allow:
        if rules.parse(text).name:
            raise UsageError(
                f"profile {plan.profile.name}: network rule {text!r} is by name, and only the "
                "runtime can give a container our resolver",
                hint="use the runtime (--runtime mis), or addresses",
            )
    found = [m if m.guarantee in HOOKS else replace(m, finding=BY_HOOK) for m in plan.mechanisms]
    return replace(plan, mechanisms=tuple(found))


def make(profile: Profile, spec: Spec, operator: Operator, host: Host, name: str | None) -> Plan:
    """Decide everything. Raises UsageError where profile, container and operator contradict."""
    profile = _with_operator(profile, operator)
    network = _network(profile, spec, host)
    variables = spec.environment
    cwd = Path(str(spec.at("process.cwd", "/")))
    home = variables.get("HOME", "/root")
    facts = {"HOME": home, "WORKSPACE": str(cwd)}
    profile = profiles.for_an_image(profile)
    user = spec.at("process.user", {})
    return Plan(
        name=name,
        command=tuple(spec.at("process.args", ())),
        cwd=cwd,
        env=(),
        user=User(int(user.get("uid", 0)), int(user.get("gid", 0)), (), _user(user), home),
        tty=False,  # the engine's, if there is one
        rootfs=spec.root,
        binds=tuple(_binds(spec, cwd)),
        masked=profiles.expand(profile.files.deny, facts),
        protected=profiles.expand(profile.files.protect, facts),
        mechanisms=tuple(_mechanisms(profile, host)),
        profile=profile,
        network=network,
        limits=_limits(profile.limits, host),
        host=host,
        waived=operator.waived - operator.minimum,
        workspace=False,  # one of the binds, or not the host's at all
    )


def _binds(spec: Spec, cwd: Path) -> Iterator[Bind]:
    """The volumes, and where the working directory lies on the host."""
    volumes = {}
    for mount in spec.at("mounts", []):
        source, target = mount.get("source"), mount.get("destination")
        options = mount.get("options") or []
        if source and target and (mount.get("type") == "bind" or {"bind", "rbind"} & {*options}):
            volumes[Path(target)] = Path(source)
            yield Bind(Path(source), Path(target), readonly="ro" in options)
    if cwd not in volumes and cwd != Path("/"):
        above = next((parent for parent in cwd.parents if parent in volumes), Path("/"))
        yield Bind(volumes.get(above, spec.root) / cwd.relative_to(above), cwd)


def _user(user: dict[str, object]) -> str:
    return str(user.get("username") or user.get("uid", 0))


def _with_operator(profile: Profile, operator: Operator) -> Profile:
    if not profile.enforce and "audit" not in operator.allow:
        raise UsageError(
            f"profile {profile.name} only records ([mode] enforce = false)",
            hint='the operator can allow that for containers: allow = ["audit"]',
        )
    if profile.liveness.on_loss is OnLoss.OPEN and "on-loss-open" not in operator.allow:
        raise UsageError(
            f"profile {profile.name}: liveness.on_loss = 'open' would let a container run on "
            "unguarded",
            hint='the operator can allow that for containers: allow = ["on-loss-open"]',
        )
    return replace(profile, require=profile.require - operator.waived | operator.minimum)


def _network(profile: Profile, spec: Spec, host: Host) -> NetPlan:
    mode = profile.network.mode
    shared = spec.shares("network")
    if shared and mode is not NetMode.HOST:
        raise UsageError(
            f"profile {profile.name} has network mode '{mode}', but the container would be in "
            "the host's network namespace",
            hint="leave out --network host, or use a profile with [network] mode = 'host'",
        )
    if not shared and mode is NetMode.HOST:
        mode = NetMode.GUARDED
    for text in profile.network.allow:
        rules.parse(text)
    return NetPlan(
        mode=mode,
        ipv6=True,  # whatever the engine gives
        allow=() if mode is NetMode.NONE else profile.network.allow,
        listen=profile.network.listen,
        resolvers=profile.network.resolvers,
        host_addresses=(*host.addresses, *([] if shared else [ENGINES_RESOLVER])),
    )


def _limits(limits: Limits, host: Host) -> Limits:
    # Input, output and space are the business of the engine's storage driver.
    return replace(possible(limits, host), io_read=None, io_write=None, scratch=None)


def _mechanisms(profile: Profile, host: Host) -> list[Mechanism]:
    wanted = [(Guarantee.NET, "cgroup-bpf"), (Guarantee.ESCAPE, "seccomp-notify")]
    wanted += [(Guarantee.LIMITS, name) for name in _limits(profile.limits, host).controllers()]
    wanted += [(Guarantee.COUNTERS, "perf-cgroup")] if profile.counters else []
    found = [
        Mechanism(guarantee, name, host.mechanisms.get(name, NOT_HERE))
        for guarantee, name in wanted
    ]
    files = host.mechanisms.get("fanotify", NOT_HERE)
    found += [Mechanism(one, "fanotify", files) for one in (Guarantee.FILE, Guarantee.EXEC)]
    found.append(
        Mechanism(Guarantee.LIVENESS, "watchdog", host.mechanisms.get("watchdog", NOT_HERE))
    )
    return found


def check(plan: Plan, *, by_hook: bool = False) -> None:
    """Raise MissingGuarantee unless this host gives every basic and every required guarantee."""
    need(plan.host, HOOK_BASICS if by_hook else BASICS, "guard a container")
    for mechanism in plan.mechanisms:
        if not mechanism.finding.ok and mechanism.guarantee in plan.profile.require:
            raise MissingGuarantee(
                f"profile {plan.profile.name} requires '{mechanism.guarantee}', but "
                f"{mechanism.name} is missing: {mechanism.finding.detail}",
                hint=mechanism.finding.fix,
            )
