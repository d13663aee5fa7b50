"""What the agent is told about itself: its rules, and what was denied, in words and as JSON.

Shown read-only inside the container (`bundle.INFO`), so that a model can adapt instead of trying
again.  Nothing here is secret to the agent: it is what it could find out by trying.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mis_run import explain, report, taint
from mis_run.bundle import INFO
from mis_run.events import Event
from mis_run.hints import Any
from mis_run.model import NetMode, Plan

MOST = 256 << 10
"""Bytes of denials kept: an agent that collects more does not read them either."""
TEXT, RULES, DENIALS = "README", "rules.json", "denials.jsonl"


def rules(plan: Plan) -> dict[str, Any]:
    """The agent's own rules as data."""
    profile = plan.profile
    return {
        "profile": profile.name,
        "enforced": profile.enforce,
        "workspace": str(plan.cwd),
        "files": {
            "read": list(profile.files.read),
            "write": list(profile.files.write),
            "deny": [*profile.files.deny, *profile.files.kill],
            "read_only": list(profile.files.protect),
            "taint": list(profile.files.taint),
        },
        "exec": {"allow": list(profile.exec.allow), "deny": list(profile.exec.deny)},
        "network": {"mode": plan.network.mode.value, "allow": list(plan.network.allow)},
        "limits": {
            "memory": plan.limits.memory,
            "cpus": plan.limits.cpus,
            "pids": plan.limits.pids,
            "seconds": plan.limits.timeout,
        },
        "level_once_tainted": taint.follows(profile) if profile.files.taint else None,
        "violations_until_killed": profile.defcon.thresholds[3] if profile.defcon.act else None,
    }


def text(plan: Plan) -> str:
    """The same in plain words."""
    profile, limits = plan.profile, plan.limits
    mode = plan.network.mode
    reach = ", ".join(plan.network.allow) or "nowhere"
    caps = [
        f"memory {report.size(limits.memory)}" if limits.memory else "",
        f"{limits.cpus:g} CPU cores" if limits.cpus else "",
        f"{limits.pids} processes" if limits.pids else "",
        f"{limits.timeout:g} seconds" if limits.timeout else "",
    ]
    lines = [
        f"You run under mis-run, profile '{profile.name}'.",
        "",
        f"Files you may open: {', '.join(profile.files.read) or 'none'}.",
        f"Files you may change: {', '.join(profile.files.write) or 'none'}.",
        f"Never: {', '.join((*profile.files.deny, *profile.files.kill)) or 'nothing more'}.",
        f"Programs you may execute: {', '.join(profile.exec.allow) or 'none'}"
        + (f"; never: {', '.join(profile.exec.deny)}." if profile.exec.deny else "."),
        "Network: none." if mode is NetMode.NONE else f"Network: you may reach {reach}.",
        f"Limits: {', '.join(filter(None, caps)) or 'none'}.",
        f"{_lost(plan)} are thrown away when you end.",
        "",
        "What is denied fails with EPERM (Operation not permitted); a name has no address then.",
        f"{INFO}/{DENIALS} says what was denied, why, and what would allow it; trying the same",
        "again does not help.",
    ]
    if profile.defcon.act:
        most = profile.defcon.thresholds[3]
        lines.append(f"Each denial slows you down; after {most} of them you are killed.")
    lines += taint.words(profile)
    lines.append("If your task needs more, stop and tell the person who started you which rule.")
    return "\n".join(lines) + "\n"


def _lost(plan: Plan) -> str:
    if plan.workspace:
        return f"Changes outside {plan.cwd}"
    return "Changes outside what was bound" if plan.binds else "All changes"


class Denials:
    """The file of denials that the agent can read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / DENIALS
        self._left = MOST

    def add(self, event: Event) -> None:
        """Append one violation, or what marked the agent, while there is room."""
        line = json.dumps(entry(event.json()), ensure_ascii=False, default=str) + "\n"
        self._left -= len(line.encode(errors="replace"))
        if self._left > 0:
            with self._path.open("a", errors="replace") as file:
                file.write(line)


def entry(event: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the file: the act, what it was about, why, and what would allow it."""
    advice = explain.advise(event)
    found: dict[str, Any] = {"time": event.get("time"), "kind": event.get("kind")}
    found |= {"what": advice.what, "why": advice.why, **event.get("subject", {})}
    if advice.line:
        found["allow_by_profile"] = advice.line
    if advice.flag:
        found["allow_by_flag"] = advice.flag
    return found


def write(plan: Plan, folder: Path) -> None:
    """Everything that does not change, and an empty file of denials."""
    (folder / TEXT).write_text(text(plan))
    (folder / RULES).write_text(json.dumps(rules(plan), indent=2) + "\n")
    (folder / DENIALS).touch()
    for name in (TEXT, RULES, DENIALS):
        (folder / name).chmod(0o644)
