"""What follows when the agent hits a limit: ``log``, ``defcon``, ``freeze`` or ``kill``.

The profile says it per limit (``[limits] on_oom`` …).  Pure.  Out of scope: seeing that a limit was
hit (`cgroup_stats`), freezing (`pauses`), killing (`follow`).
"""

from __future__ import annotations

from collections.abc import Mapping

from mis_run.dataclass import dataclass, replace
from mis_run.events import Event, Verdict
from mis_run.model import Plan

ACTIONS = ("log", "defcon", "freeze", "kill")
BACK_OFF = 2.0  # seconds for which an agent that hit a limit is frozen


@dataclass(frozen=True)
class Hit:
    """A kind of event: the profile's ``key`` for it, the ``limit`` without which nothing follows
    (empty: it needs none), and how the run ends if the agent is killed for it."""

    key: str
    limit: str
    ending: str


HITS: Mapping[str, Hit] = {
    "limits.oom": Hit("on_oom", "memory", "killed at its memory limit"),
    "limits.pids": Hit("on_pids", "pids", "killed at its process limit"),
    "limits.throttled": Hit("on_throttled", "cpus", "killed at its CPU limit"),
    "limits.pressure": Hit("on_pressure", "", "killed for its want of memory or disks"),
}


def judge(event: Event, plan: Plan) -> tuple[Event, str]:
    """The event as the record has it, and what is to be done now: ``freeze``, ``kill`` or nothing.

    The limits are the plan's: one that is not set here, or was waived, has no consequences.  A
    profile that only records (``enforce = false``, ``[defcon] act = false``) freezes and kills
    nothing; a violation counts there as every other does.
    """
    hit = HITS[event.kind]
    action = str(getattr(plan.limits, hit.key))
    if action == "log" or (hit.limit and getattr(plan.limits, hit.limit) is None):
        return event, ""
    subject = {**event.subject, "action": action}
    rule = f"limits.{hit.key}"
    if action == "defcon":
        return replace(event, verdict=Verdict.AUDIT, subject=subject, rule=rule), ""
    if not (plan.profile.enforce and plan.profile.defcon.act):
        return replace(event, subject={**subject, "acts": False}, rule=rule), ""
    return replace(event, subject=subject, rule=rule), action
