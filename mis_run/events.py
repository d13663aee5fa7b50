"""The shared words of verdicts and the one record type every guard speaks.

An `Event` is what a person reads in ``mis logs``, what `defcon` counts and what `report` writes
as one JSON line.  Out of scope: where events come from (guards) and go to (report).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum

from mis_run.dataclass import dataclass, field
from mis_run.hints import Any

SCHEMA = 1
"""Version of the JSON-lines record; raised when a field changes its meaning or goes away."""


class Guarantee(StrEnum):
    """What is promised about an agent (docs/threat-model.md says what each covers)."""

    FILE = "file"
    EXEC = "exec"
    NET = "net"
    ESCAPE = "escape"
    LIMITS = "limits"
    COUNTERS = "counters"
    LIVENESS = "liveness"


class Verdict(StrEnum):
    """The answer to one act; AUDIT is an act allowed that enforcement would have denied."""

    ALLOW = "allow"
    DENY = "deny"
    AUDIT = "audit"
    KILL = "kill"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened to one agent.

    ``kind`` is ``area.verb`` (``net.connect``, ``file.open``, ``run.exit``); ``subject`` holds
    what the act was about (``{"destination": "192.0.0.8:9", "protocol": "udp"}``); ``rule`` is
    the profile line that decided, or ``default`` when none named the object.  ``pid`` is the
    host's number, 0 where the kernel cannot tell.  ``time`` is seconds since the epoch;
    ``repeated`` whether the act repeats a violation and does not count, None where that is not
    known: for `defcon` alone, not in the record.
    """

    kind: str
    verdict: Verdict | None = None
    guard: Guarantee | None = None
    pid: int = 0
    comm: str = ""
    subject: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""
    time: float = field(default_factory=time.time)
    repeated: bool | None = None

    @property
    def violation(self) -> bool:
        """Whether DEFCON counts this event: an act denied, or allowed only because of audit."""
        return self.verdict in (Verdict.DENY, Verdict.AUDIT, Verdict.KILL)

    def json(self) -> dict[str, Any]:
        """The record line as a dictionary, empty fields left out."""
        line: dict[str, Any] = {"v": SCHEMA, "time": round(self.time, 6), "kind": self.kind}
        for key in ("verdict", "guard", "pid", "comm", "rule"):
            if value := getattr(self, key):
                line[key] = str(value) if isinstance(value, StrEnum) else value
        if self.subject:
            line["subject"] = dict(self.subject)
        return line
