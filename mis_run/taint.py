"""Taint: an agent that has opened what ``[files] taint`` names is marked for the rest of its run.

What follows is a DEFCON level (``[defcon] tainted``) that it does not rise above again by itself;
docs/defcon.md says what that promises.  Pure.  Out of scope: seeing the open (`guards.file`), the
level (`defcon.Tracker.mark`), putting it in force (`follow`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mis_run.dataclass import replace
from mis_run.defcon import EFFECTS, NEVER, NORMAL, TAINT, Tracker
from mis_run.events import Event
from mis_run.hints import Any
from mis_run.model import Profile

KIND = "file.tainted"
FOLLOWS = (
    ("kill", "you are killed"),
    ("explicit", "only what a rule names explicitly is allowed"),
    ("destinations", "you reach nobody whom you have not talked to before"),
    ("binaries", "you execute nothing that you have not executed before"),
    ("writes", "you write nowhere but in your workspace"),
    ("wx_memory", "no memory is writable and executable at once"),
)
"""Effect of a level → what an agent has of it."""


def level(profile: Profile) -> int:
    """The level of a marked agent; NEVER where the profile only records."""
    return profile.defcon.tainted if profile.enforce else NEVER


def follows(profile: Profile) -> int:
    """The level that has effects on a marked agent; NEVER when nothing follows for it."""
    return level(profile) if profile.defcon.act else NEVER


def words(profile: Profile) -> list[str]:
    """What the agent is told of it before, in lines."""
    if not profile.files.taint:
        return []
    found = follows(profile)
    begins = {**EFFECTS, **profile.defcon.effects}
    effects = [text for effect, text in FOLLOWS if found and found <= begins[effect]]
    return [
        f"Once you open any of {', '.join(profile.files.taint)}, you are marked until you end:",
        f"{'; '.join(effects) or 'it is recorded, and nothing else follows'}.",
    ]


def told(event: Event, profile: Profile) -> Event:
    """The event as the record and the agent have it: with the ``level`` that follows."""
    subject = {**event.subject, "level": profile.defcon.tainted}
    if not (profile.enforce and profile.defcon.act):
        subject["acts"] = False
    return replace(event, subject=subject)


def restore(tracker: Tracker, events: Iterable[Mapping[str, Any]] | None, profile: Profile) -> None:
    """Give a new tracker the level and the mark that a record ends with: losing a supervisor
    resets neither.  Without a record (None) nobody knows of a mark, so where there are rules for
    one the agent has it.
    """
    counted, marked, lifted = NORMAL, events is None and bool(profile.files.taint), False
    for event in events or ():
        if event.get("kind") == KIND:
            marked = True
        elif event.get("kind") == "defcon.change":
            subject = event.get("subject", {})
            cause, to = subject.get("cause"), int(subject.get("to", counted))
            if cause == "operator" and marked and to > profile.defcon.tainted:
                lifted = True
            if cause != TAINT:  # which counted nothing
                counted = to
    if counted < tracker.level:
        tracker.set(counted)
    if marked:
        tracker.mark(NEVER if lifted else level(profile))
