"""What the kernel plane counted of one agent (struct mis_state), and what of it nobody was told."""

from __future__ import annotations

from collections.abc import Mapping

from mis_run.dataclass import dataclass, field
from mis_run.events import Event
from mis_run.guards.lsm_abi import ACTS, STATE, kind_of


@dataclass(frozen=True)
class Counts:
    """What the kernel counted; ``count`` is the decaying sum that the level follows from, ``asked``
    the acts on files that what ``walks`` remembered did not allow, ``lost`` the events, by kind,
    that the ring had no room for."""

    count: int
    denied: int
    audited: int
    killed: int
    canaries: int = 0
    asked: int = field(default=0, compare=False)
    walks: int = field(default=0, compare=False)
    lost: Mapping[str, int] = field(default_factory=dict)


def counts(state: bytes) -> Counts:
    """A value of the map ``states``."""
    _, count, _, denied, audited, killed, canaries, asked, walks, _, _, *lost = STATE.unpack(state)
    kinds = {kind_of(act)[0]: number for act, number in enumerate(lost[: len(ACTS)]) if number}
    return Counts(count, denied, audited, killed, canaries, asked, walks, kinds)


class Lost:
    """Tells each lost event once."""

    def __init__(self) -> None:
        self._told: Mapping[str, int] = {}

    def events(self, lost: Mapping[str, int]) -> list[Event]:
        """What was lost since the last time; fewer than then: they were counted anew."""
        told, self._told = self._told, lost
        more = {
            kind: number - told.get(kind, 0)
            for kind, number in lost.items()
            if number > told.get(kind, 0)
        }
        return [Event(kind="kernel.lost", subject={"events": more})] if more else []
