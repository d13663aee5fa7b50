"""From a denial to plain words and to the exact line or flag that would allow it.

Pure: one event (as `events.Event.json` makes it) in, one `Advice` out.  What must never be allowed
says so instead of naming a flag.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from mis_run import quoting, taint
from mis_run.dataclass import dataclass
from mis_run.hints import Any


@dataclass(frozen=True)
class Advice:
    """What was denied and why, and what to change: ``line`` for a profile, ``flag`` for a launch.

    Both are empty when nothing may allow it; ``why`` then says so.
    """

    what: str
    why: str
    line: str = ""
    flag: str = ""


def concerns(event: Mapping[str, Any]) -> bool:
    """Whether there is advice on an event: a violation, or what marked the agent."""
    return event.get("verdict") in ("deny", "audit", "kill") or event.get("kind") == taint.KIND


def advise(event: Mapping[str, Any]) -> Advice:
    """The advice for one event that it `concerns`."""
    kind = str(event.get("kind", ""))
    subject = event.get("subject", {})
    rule = str(event.get("rule") or "default")
    area, _, verb = kind.partition(".")
    who = str(event.get("comm") or "a process")
    if area == "net":
        return _network(verb, subject, who, rule)
    if kind == taint.KIND:
        return _mark(subject, who, rule)
    if area in ("file", "exec"):
        return _object(area, subject, who, rule)
    if area == "escape" and "mode" in subject:
        return Advice(
            f"{who} wanted to make a file set-user-ID or set-group-ID (mode {subject['mode']})",
            "on the host anybody could run it as the agent's user; it is allowed only where no "
            "folder of the host is writable: mis-run --image IMAGE",
        )
    if area == "escape":
        return Advice(
            f"{who} called {verb}",
            "this call can change or leave the container; no profile allows it",
        )
    if area == "limits":
        return Advice(
            f"the agent hit a limit ({kind})",
            f"{rule} has it count as a violation; a higher limit under [limits] would avoid it",
        )
    return Advice(f"{who}: {kind}", f"rule: {rule}")


def _network(verb: str, subject: Mapping[str, Any], who: str, rule: str) -> Advice:
    if verb == "resolve":
        name = subject.get("name", "?")
        return Advice(
            f"{who} looked up {name}",
            "the agent's resolver answers only names that a rule allows",
            _line("[network] allow", f"{name}:443"),
            _flag(f"{name}:443"),
        )
    if verb == "socket":
        what = " ".join(str(value) for value in subject.values())
        return Advice(
            f"{who} opened a socket of kind {what}",
            "only TCP and UDP sockets can be judged by rules; no profile allows others",
        )
    where = str(subject.get("destination", "?"))
    protocol = str(subject.get("protocol", ""))
    if verb == "route":
        return Advice(
            f"{who} sent a packet with IP options or a routing header by way of {where}",
            "such a packet goes elsewhere than it was judged for; no profile allows it",
        )
    if verb == "bind":
        return Advice(
            f"{who} wanted to listen on {where}",
            f"rule: {rule}",
            _line("[network] listen", where),
        )
    if rule.startswith("builtin"):
        return Advice(
            f"{who} wanted {protocol} to {where}",
            f"{rule}: only a rule that names this very address allows it",
            _line("[network] allow", where),
            _flag(where),
        )
    suffix = f"/{protocol}" if protocol in ("tcp", "udp") else ""
    return Advice(
        f"{who} wanted {protocol or 'a connection'} to {where}",
        "no rule allows this destination" if rule == "default" else f"rule: {rule}",
        _line("[network] allow", f"{where}{suffix}"),
        _flag(f"{where}{suffix}"),
    )


def _object(area: str, subject: Mapping[str, Any], who: str, rule: str) -> Advice:
    path = str(subject.get("path", "?"))
    verb, where = ("execute", "[exec] allow") if area == "exec" else ("open", "[files] read")
    why = "no rule names it" if rule == "default" else f"rule: {rule}"
    if rule.startswith(("deny", "@secrets", "kill")):
        why += "; a more specific rule would have to allow it"
    return Advice(f"{who} wanted to {verb} {path}", why, _line(where, quoting.pattern(path)))


def _mark(subject: Mapping[str, Any], who: str, rule: str) -> Advice:
    """What the mark brings."""
    level = subject.get("acts", True) and subject.get("level", 0)
    return Advice(
        f"{who} opened {subject.get('path', '?')}, which marks the agent",
        f"rule: {rule}; "
        + (f"DEFCON {level} or stricter from here on" if level else "it is only recorded"),
    )


def _line(where: str, entry: str) -> str:
    """The line of a profile that adds an entry to the inherited ones."""
    return f'{where} = ["...", {quoting.toml(entry)}]'


def _flag(destination: str) -> str:
    """The option, to be pasted into a shell."""
    return f"--allow-net {shlex.quote(quoting.printable(destination))}"


def text(events: Iterable[Mapping[str, Any]]) -> str:
    """Each different denial once, with how often, in the order of first appearance; and what marked
    the agent."""
    counted: dict[Advice, int] = {}
    for event in events:
        if concerns(event):
            advice = advise(event)
            counted[advice] = counted.get(advice, 0) + 1
    lines = []
    for advice, times in counted.items():
        often = f" ({times} times)" if times > 1 else ""
        lines.append(quoting.printable(f"{advice.what}{often}: {advice.why}"))
        if advice.flag:
            lines.append(f"  allow once:      {advice.flag}")
        if advice.line:
            lines.append(f"  allow by profile: {advice.line}")
    return "\n".join(lines) if lines else "nothing was denied"
