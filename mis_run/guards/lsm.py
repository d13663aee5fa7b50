"""One agent's guard in the kernel plane: its cgroup, told to the programs of `lsm_plane`.

``supported`` → ``attach`` → ``verify`` → ``read``, ``renew`` → detach, the context's end.
Adding an agent only writes maps.  If we are killed its entries stay, and with them the guard: when
the deadline has passed every act of the agent is denied and kills it (`lsm_plane.sweep` tidies up),
or all is only told until another supervisor takes it over (`resume`).
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mis_run.dataclass import replace
from mis_run.defcon import NORMAL, SPIN
from mis_run.errors import SetupError, VerifyError
from mis_run.events import Event
from mis_run.guards import lsm_abi, lsm_plane
from mis_run.guards.file import NO_CHILD
from mis_run.guards.lsm_abi import AGENT, OWN, PLACE, RULE, STATE, own_words
from mis_run.guards.lsm_counts import Counts, Lost, counts
from mis_run.guards.lsm_plane import supported
from mis_run.guards.lsm_policy import Compiled
from mis_run.guards.lsm_settings import LsmPolicy, Settings
from mis_run.linux import abi, bpf_pins, libbpf, libc
from mis_run.model import Defcon

__all__ = ["Compiled", "Counts", "Defcon", "LsmGuard", "LsmPolicy", "attach", "supported"]

DEEPEST = 32  # scope.bpf.h
RING = 256 * 1024
BATCH = 128  # events per read: a storm must not keep the loop from its other work


class LsmGuard:
    """An attached guard."""

    def __init__(
        self, cgroup: Path, policy: LsmPolicy, plane: lsm_plane.Plane, ring: int | None = None
    ) -> None:
        """``ring`` is a descriptor, from now on ours, of the ring that the agent has already."""
        self.id = cgroup.stat().st_ino
        self._cgroup = cgroup
        self._policy = policy
        self._plane = plane
        self._key = struct.pack("=Q", self.id)
        self._slot = -1  # none yet
        self._placed: set[bytes] = set()  # where our rules are
        self._lost = Lost()
        self._proving = bool(policy.canary)  # until `arm` there is no agent, only guards that try
        depth = _depth(cgroup)
        if depth > DEEPEST:
            raise SetupError(f"{cgroup} is nested more than {DEEPEST} deep")
        own = own_words(policy.rules.entries)
        self._settings = Settings(id=self.id, depth=depth, own=own, deadline=policy.deadline)
        self.ring = bpf_pins.make_ring(RING) if ring is None else ring
        self._ring = libbpf.Ring(libbpf.Map(self.ring))

    # ---- the agent's settings -------------------------------------------------------------

    def renew(self) -> None:
        """We live: the agent may act until the deadline from now."""
        self._plane.agents.write(self._slot, self._settings.pack(self._policy))

    def set_level(self, level: int) -> None:
        """An operator's word: the level is at most this, whatever was counted."""
        self._settings.level = level
        self.renew()

    def recount(self, count: int) -> None:
        """An operator's word on how many violations count, whatever was counted."""
        _, _, _, *rest = STATE.unpack(self._state())
        self._put_state(STATE.pack(0, count, time.monotonic_ns(), *rest))

    def arm(self, deadline: float) -> None:
        """Here the agent begins: what was tried until now was tried by us.

        From now on it may act for ``deadline`` seconds without `renew`, no longer.
        """
        while self._ring.drain(BATCH):
            continue
        self._reset()
        self._proving = False
        self._settings.deadline = deadline
        self.renew()

    def counts(self) -> Counts:
        """What the kernel counted so far."""
        return counts(self._state())

    def level(self) -> int:
        """DEFCON as the kernel has it from its own count (level_of in verdict.bpf.h)."""
        settings = self._policy.defcon
        fields: tuple[int, ...] = STATE.unpack(self._state())
        _, count, last, *_ = fields
        if count < settings.thresholds[3]:
            count >>= int((time.monotonic_ns() - last) / (settings.decay * 1e9))
        return NORMAL - sum(count >= threshold for threshold in settings.thresholds)

    # ---- attaching ------------------------------------------------------------------------

    def register(self) -> None:
        """From here on the agent is judged. The rules are complete before it is known."""
        plane = self._plane
        self._put_rules(self._policy.rules)
        with lsm_plane.locked():
            others = plane.registered()
            self._slot = plane.free_slot(others)
            self._settings.generation = plane.next_epoch()
            self._reset()
            plane.rings.update(self._key, struct.pack("=I", self.ring))
            self.renew()
            plane.slots.update(self._key, struct.pack("=I", self._slot))
            plane.announce(len({*others, self.id}))

    def take_over(self, level: int) -> None:
        """Instead of `register`, for an agent that the plane knows: its rules and its count stay as
        they are, its level is at most this.  Raises SetupError."""
        slot = self._plane.slot(self.id)
        if slot is None:
            raise SetupError("kernel plane: it does not know the agent any more", hint="mis ps")
        self._slot, self._proving = slot, False
        _, self._settings.generation, *words = AGENT.unpack(self._plane.agents.read(slot))
        self._settings.own = words[-OWN:]  # our way to find a bit may be another
        self.set_level(level)

    def replace(self, rules: Compiled) -> None:
        """Other rules for what begins after this; until then an act may meet some of both.

        A file never falls between them: the new ones are there before the old ones go, and what
        was remembered is void in between.
        """
        old, settings = self._policy.rules, self._settings
        wanted = own_words(rules.entries)
        settings.own = [a | b for a, b in zip(settings.own, wanted, strict=True)]
        self.renew()
        self._put_rules(rules)
        self._void()
        for place in old.entries.keys() - rules.entries.keys():
            key = PLACE.pack(self.id, place.inode, place.device, 0)
            self._plane.rules.delete(key)
            self._placed.discard(key)
        self._void()
        settings.own = wanted
        self.renew()
        self._policy = replace(self._policy, rules=rules)
        old.release()

    def _void(self) -> None:
        """Make all void that was remembered of this agent's rights until here."""
        with lsm_plane.locked():
            self._settings.generation = self._plane.next_epoch()
            self.renew()
            self._plane.announce()

    def _put_rules(self, rules: Compiled) -> None:
        for place, entry in rules.entries.items():
            key = PLACE.pack(self.id, place.inode, place.device, 0)
            self._placed.add(key)
            value = RULE.pack(entry.allow, entry.deny, entry.number, entry.flags)
            self._plane.rules.update(key, value)

    def close(self) -> None:
        """The agent is known no more, and nothing of it is left in the maps."""
        with lsm_plane.locked():
            self._plane.forget(self.id, self._placed)
        self.release()

    def release(self) -> None:
        """Close our descriptors; the agent is judged as before."""
        self._ring.close()
        os.close(self.ring)
        self._plane.close()
        self._policy.rules.release()

    def _reset(self) -> None:
        self._put_state(bytes(STATE.size))

    def _state(self) -> bytes:
        raw = self._plane.states.lookup(struct.pack("=I", self._slot), STATE.size)
        return raw or bytes(STATE.size)

    def _put_state(self, value: bytes) -> None:
        self._plane.states.update(struct.pack("=I", self._slot), value, libbpf.BPF_F_LOCK)

    # ---- events ---------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._ring.fileno()

    def read(self) -> list[Event]:
        """The oldest BATCH events; the others stay for the next turn."""
        samples = self._ring.drain(BATCH)
        if self._proving:
            return []
        texts = self._policy.rules.texts
        events = [lsm_abi.event(sample, texts) for sample in samples]
        # Only behind events, which filled the ring.
        return events + self._lost.events(self.counts().lost) if events else []

    # ---- proof ----------------------------------------------------------------------------

    def answers_late(self, delay: float) -> bool:
        """As long as a hook may wait."""
        return delay <= SPIN

    def verify(self, probe: Callable[[str], int] | None = None) -> None:
        """A read, an exec and a mount that no rule allows, by a child of ours in the agent's
        cgroup: refused (unless audited) *and* counted; before, the canary by the container's own
        init.  Raises VerifyError.
        """
        if probe is not None:
            self.beat(probe)
        self._settings.quiet = True  # what we try must not end in the effects of a level
        self.renew()
        with tempfile.TemporaryFile() as canary, ExitStack() as stack:
            os.fchmod(canary.fileno(), 0o755)
            stack.callback(self._unquiet)
            path = f"/proc/self/fd/{canary.fileno()}"
            acts: dict[str, Callable[[], object]] = {
                "file": lambda: os.close(os.open(path, os.O_RDONLY)),
                "exec": lambda: os.execv(path, [path]),
                # Without the guard ENODEV: there is no such file system.
                "escape": lambda: libc.mount("none", "/", "mis-canary"),
            }
            for name, act in acts.items():
                before = self.counts()
                error = in_cgroup(self._policy.processes or self._cgroup, act)
                after = self.counts()
                if self._policy.enforce and error != errno.EPERM:
                    met = os.strerror(error) if error else "it succeeded"
                    raise VerifyError(f"kernel plane, {name}: a forbidden act went on: {met}")
                if after.denied + after.audited == before.denied + before.audited:
                    raise VerifyError(f"kernel plane, {name}: a forbidden act was not counted")

    def _unquiet(self) -> None:
        """What was tried so far was tried by us."""
        self.read()
        self._reset()
        self._settings.quiet = False
        self.renew()

    def beat(self, probe: Callable[[str], int]) -> None:
        """The canary opened by the container's init: refused and counted. Raises VerifyError."""
        met = self._tried(probe)
        if met == 0 and self._policy.on_loss == "open":
            met = self._tried(probe)  # were we late, it was only told of: that proves nothing
        if self._policy.enforce and met not in (errno.EPERM, *NO_CHILD):
            raise VerifyError(f"kernel plane: the canary met {abi.error(met)}, not EPERM")

    def _tried(self, probe: Callable[[str], int]) -> int:
        self._settings.trying = True
        self.renew()
        before = self.counts().canaries
        try:
            met = probe(f"open 0 {self._policy.canary}")
        finally:
            self._settings.trying = False
            self.renew()
        if met not in NO_CHILD and self.counts().canaries == before:
            raise VerifyError(
                f"kernel plane: the canary inside the container was not refused by it "
                f"(it met {abi.error(met)})",
                hint="mis doctor",
            )
        return met


def in_cgroup(cgroup: Path, act: Callable[[], object]) -> int:
    """Errno of ``act`` in a child that joined ``cgroup``; 0 when it succeeded."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    joining = os.open(cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            try:
                os.write(joining, b"0")
                act()
                code = 0
            except OSError as error:
                code = error.errno or errno.EIO
            os.write(writer, struct.pack("=i", code))
        os._exit(0)
    os.close(writer)
    os.close(joining)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read(4)
    _, status = os.waitpid(pid, 0)
    if len(said) == 4:
        return int(struct.unpack("=i", said)[0])
    # A kill is a refusal too; a program that ran closed the pipe without a word.
    return errno.EPERM if os.WIFSIGNALED(status) else 0


def _depth(cgroup: Path) -> int:
    """How deep a cgroup v2 directory lies below the root of its hierarchy."""
    depth, device = 0, cgroup.stat().st_dev
    while (cgroup / "cgroup.type").exists():  # the root has none
        depth, cgroup = depth + 1, cgroup.parent
        if cgroup.stat().st_dev != device:
            raise SetupError(f"{cgroup}: the root of cgroup v2 is not mounted here")
    return depth


@contextmanager
def attach(cgroup: Path, policy: LsmPolicy) -> Iterator[LsmGuard]:
    """Guard ``cgroup`` (a v2 directory) and everything below until the context ends."""
    plane = lsm_plane.ensure()
    guard = LsmGuard(cgroup, policy, plane)
    try:
        guard.register()
        yield guard
    finally:
        guard.close()
