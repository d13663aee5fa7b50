"""The nouns of a run as frozen dataclasses: what was asked, what the host has, what will be done.

Options (words of the command line) + Profile (words of the user's file) + Host (what this machine
can do) go through the pure function `plan.make` and come out as a Plan.  Nothing here acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from mis_run.dataclass import dataclass, field
from mis_run.events import Guarantee
from mis_run.hints import Any

ALWAYS = -1
"""`Options.restart` without an end."""


class NetMode(StrEnum):
    """What network the agent sees."""

    NONE = "none"  # own namespace with loopback only
    GUARDED = "guarded"  # own namespace, veth with XDP, NAT, rules
    HOST = "host"  # the host's namespace, cgroup guard only


class PlaneChoice(StrEnum):
    """Which plane was asked for."""

    AUTO = "auto"  # the kernel plane where it works
    HOST = "host"
    KERNEL = "kernel"


class OnLoss(StrEnum):
    """What happens to the agent when nobody supervises it any more."""

    CLOSED = "closed"
    OPEN = "open"


@dataclass(frozen=True)
class Bind:
    """A host path shown to the agent; ``readonly`` as in ``--bind SRC:DST:ro``."""

    source: Path
    target: Path
    readonly: bool = False


# ---- what the user wrote ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, parsed but not interpreted. ``None`` means: the profile decides.

    Sizes are bytes, times seconds, cpus CPU cores.
    """

    command: tuple[str, ...]  # empty: the image's
    workdir: Path | None  # None: the image's, with nothing of the host's there
    profile: str = "default"
    binds: tuple[Bind, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    rootfs: Path | None = None
    image: str | None = None
    entrypoint: str | None = None  # "": none, not the image's either
    net: NetMode | None = None
    allow_net: tuple[str, ...] = ()
    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None
    timeout: float | None = None
    name: str | None = None
    user: str | None = None
    tty: bool = False
    allow_missing: frozenset[Guarantee] = frozenset()
    json: bool = False
    log: Path | None = None
    restart: int = 0  # new attempts after a failure of the agent's own
    plane: PlaneChoice = PlaneChoice.AUTO


@dataclass(frozen=True, kw_only=True)
class Files:
    """``[files]``: patterns (paths, globs, ``@sets``) as written; resolved at plan time."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()  # inside writable places, mounted read-only
    kill: tuple[str, ...] = ()  # denied, and at once DEFCON 1
    taint: tuple[str, ...] = ()  # whoever opens one is marked: `Defcon.tainted`


@dataclass(frozen=True, kw_only=True)
class Exec:
    """``[exec]``: names, paths, ``@sets``; an entry may end in ``#sha256:HEX``."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Network:
    """``[network]``: rules are ``HOST[:PORT[-PORT]][/PROTO]`` as `rules.parse` reads them."""

    mode: NetMode = NetMode.GUARDED
    allow: tuple[str, ...] = ()
    listen: tuple[str, ...] = ("loopback",)
    resolvers: tuple[str, ...] = ()  # ADDR[:PORT]; empty: those of /etc/resolv.conf


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``[limits]``: bytes, cores, counts, seconds; ``None`` is no limit of ours.

    ``on_…``: what follows when one is hit, in the words of `reaction.ACTIONS`.
    """

    memory: int | None = None
    swap: int | None = 0  # on top of memory
    cpus: float | None = None
    pids: int | None = None
    timeout: float | None = None
    io_read: int | None = None  # bytes per second on the device that holds the workspace
    io_write: int | None = None
    scratch: int | None = None  # bytes of the throw-away upper layer
    on_oom: str = "log"
    on_pids: str = "log"
    on_throttled: str = "log"
    on_pressure: str = "log"

    def controllers(self) -> list[str]:
        """The cgroup controllers that these limits need, by their v2 names."""
        values = {
            "memory": self.memory,
            "cpu": self.cpus,
            "pids": self.pids,
            "io": self.io_read or self.io_write,
        }
        return [name for name, value in values.items() if value is not None]


@dataclass(frozen=True, kw_only=True)
class Defcon:
    """``[defcon]``: violations at which levels 4, 3, 2, 1 begin; answers late by ``delays``
    (seconds at levels 4, 3, 2); the count halves after ``decay`` seconds without a violation."""

    thresholds: tuple[int, int, int, int] = (3, 6, 10, 15)
    delays: tuple[float, float, float] = (0.0001, 0.001, 0.01)
    decay: float = 60.0
    weights: Mapping[str, int] = field(default_factory=dict)  # event kind → violations it counts
    effects: Mapping[str, int] = field(default_factory=dict)  # effect → level, `defcon.EFFECTS`
    act: bool = True  # False: count and report only
    tainted: int = 3  # the level of a marked agent is at most this; 0: only recorded


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """``[liveness]``: seconds; ``beat`` proves the loop, ``canary`` the guards end to end."""

    on_loss: OnLoss = OnLoss.CLOSED
    deadline: float = 1.0
    beat: float = 0.1
    canary: float = 5.0
    on_starved: str = "log"  # one of `reaction.ACTIONS`


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One profile with everything it extends merged in. ``source`` is the file it came from,
    ``sources`` that one and all that it extends."""

    name: str
    source: str = ""
    sources: tuple[str, ...] = ()
    description: str = ""
    require: frozenset[Guarantee] = frozenset()
    files: Files = field(default_factory=Files)
    exec: Exec = field(default_factory=Exec)
    network: Network = field(default_factory=Network)
    limits: Limits = field(default_factory=Limits)
    defcon: Defcon = field(default_factory=Defcon)
    liveness: Liveness = field(default_factory=Liveness)
    counters: tuple[str, ...] = ()  # perf event names
    env: tuple[str, ...] = ()  # names of variables passed on from the caller
    enforce: bool = True


# ---- what the machine can do --------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One mechanism, tried: whether it works; if not, why and what to do about it."""

    ok: bool
    detail: str = ""  # what works (a version, a path) or why it does not
    fix: str = ""  # the next command, empty when there is none


@dataclass(frozen=True, kw_only=True)
class Host:
    """This machine, each mechanism tried. Keys of ``mechanisms`` are those in `host.MECHANISMS`."""

    mechanisms: Mapping[str, Finding]
    cgroup: str  # v2 | hybrid | v1
    unified: Path | None  # where cgroup v2 is mounted
    controllers: Mapping[str, Path]  # controller → root of its hierarchy (v1 or v2)
    runtime: Path | None  # the OCI runtime chosen
    mounts: tuple[tuple[str, str], ...] = ()  # (mount point, file system type) of the host
    addresses: tuple[str, ...] = ()  # the host's own IP addresses
    cpus: int = 1
    systemd: bool = False
    engine: tuple[str, ...] = ()  # our own code: an agent must not change what root runs next

    def works(self, mechanism: str) -> bool:
        """Whether the named mechanism was tried and worked."""
        found = self.mechanisms.get(mechanism)
        return found is not None and found.ok


# ---- what will be done --------------------------------------------------------------------


@dataclass(frozen=True)
class User:
    """Who the agent runs as. A uid of -1: known once the image is unpacked."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image's content and its own words on how to run it. Digests are ``sha256:…``."""

    name: str  # as the user wrote it
    digest: str  # the image's id: of its configuration, which names the layers
    layers: tuple[str, ...]  # digests of the layers' tars, lowest first
    user: str = ""  # NAME, UID, NAME:GROUP …, to be looked up in the image
    env: tuple[tuple[str, str], ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workdir: str = "/"


@dataclass(frozen=True)
class Mechanism:
    """How one guarantee will be given, or why it will not (``finding.ok`` false)."""

    guarantee: Guarantee
    name: str
    finding: Finding
    extra: bool = False  # better than promised: where it is missing nothing is refused


@dataclass(frozen=True, kw_only=True)
class NetPlan:
    """The network half of a plan. Rules are texts that `rules.parse` accepted."""

    mode: NetMode
    ipv6: bool  # False: no IPv6 address and no IPv6 stack in the agent's namespace
    allow: tuple[str, ...]
    listen: tuple[str, ...]
    resolvers: tuple[str, ...]
    host_addresses: tuple[str, ...]  # denied unless a rule names them at least as exactly
    forwards: bool = True  # False: no packet may leave, so the machine is left as it is


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a launch does, decided. Pure data: ``json()`` is what ``--dry-run`` prints."""

    name: str | None
    command: tuple[str, ...]
    cwd: Path
    env: tuple[tuple[str, str], ...]
    user: User
    tty: bool
    rootfs: Path | None  # None: the host's root, read-only, under a throw-away layer
    binds: tuple[Bind, ...]
    masked: tuple[str, ...]  # paths hidden from the agent
    protected: tuple[str, ...]  # paths read-only inside writable binds
    mechanisms: tuple[Mechanism, ...]
    profile: Profile  # with the options applied
    network: NetPlan
    limits: Limits
    host: Host
    log: Path | None = None
    json_report: bool = False
    waived: frozenset[Guarantee] = frozenset()
    image: Image | None = None  # the root instead of the host's or ``rootfs``
    own: tuple[str, ...] = ()  # those of ``protected`` without which there is no launch
    workspace: bool = True  # whether ``cwd`` is the host's, bound read-write at the same path

    def shared(self) -> dict[str, Bind]:
        """Everything of the host that the agent sees beside its root, by its path inside."""
        found = {str(self.cwd): Bind(self.cwd, self.cwd)} if self.workspace else {}
        return found | {str(bind.target): bind for bind in self.binds}

    def writable(self) -> dict[str, Bind]:
        """Those of `shared` that the agent may write to."""
        return {path: bind for path, bind in self.shared().items() if not bind.readonly}

    def untrusted(self) -> list[Path]:
        """The host's folders in which agents may have left anything, links included."""
        return [bind.source for bind in self.writable().values()]

    def uses(self, name: str) -> bool:
        """Whether the mechanism is part of this plan, and works here."""
        return any(one.name == name and one.finding.ok for one in self.mechanisms)

    def runtime(self) -> Path:
        """The OCI runtime; `plan.check` has refused a plan without one."""
        assert self.host.runtime is not None
        return self.host.runtime

    def json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        from mis_run.jsonable import plain

        return dict(plain(self))
