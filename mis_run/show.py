"""What people see: plans, tables, events, doctor's findings. Text in, text out; no decisions.

Plain strings where they are enough; rich (imported late) only for the live view.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from mis_run import taint
from mis_run.hints import Any
from mis_run.model import Mechanism, NetMode, Plan
from mis_run.quoting import printable
from mis_run.report import counters_line, size

GREEN, RED, YELLOW, PLAIN = "\033[32m", "\033[31m", "\033[33m", "\033[0m"


def _colour(code: str, text: str) -> str:
    import os

    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"{code}{text}{PLAIN}"
    return text


def table(head: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Left-aligned columns; a row's values are taken in the order of ``head`` (lower-cased)."""
    cells = [[str(row.get(name.lower(), "")) for name in head] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [head, *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """``mis ps``."""
    head = ("ID", "NAME", "PHASE", "SECONDS", "PROFILE", "NETWORK", "COMMAND")
    shown = [{**row, "command": _line(shlex.join(row["command"]))} for row in rows]
    return table(head, shown)


def _line(text: str, width: int = 48) -> str:
    """One printable line: an agent's words must not write escape sequences to a terminal."""
    clean = printable(text)
    return clean if len(clean) <= width else f"{clean[: width - 1]}…"


def plan(made: Plan) -> str:
    """``--dry-run``: what will be done, how each guarantee is given, what is missing."""
    limits = made.limits
    net = made.network
    lines = [
        f"command      {shlex.join(made.command)}",
        f"profile      {made.profile.name} ({made.profile.source or 'built in'})",
        f"user         {_user(made)}",
        f"workspace    {made.cwd} ({'read-write' if made.workspace else 'of the image'})",
        f"root         {_root(made)} (read-only, writes are thrown away)",
    ]
    if made.image:
        lines.append(f"image        {made.image.digest}")
        lines += [f"  layer      {digest}" for digest in made.image.layers]
    for bind in made.binds:
        mode = "read-only" if bind.readonly else "read-write"
        lines.append(f"bind         {bind.source} at {bind.target} ({mode})")
    inside = [p for p in made.protected if made.workspace and p.startswith(f"{made.cwd}/")]
    lines += [f"protected    {path} (read-only)" for path in inside]
    lines.append(f"hidden       {', '.join(made.masked) or 'nothing'}")
    if made.profile.files.taint:
        level = taint.follows(made.profile)
        shown = f"marks: DEFCON {level}" if level else "is recorded only"
        lines.append(f"taint        {', '.join(made.profile.files.taint)} ({shown})")
    kind = {
        NetMode.NONE: "none: loopback only",
        NetMode.GUARDED: f"guarded: own namespace, IPv6 {'on' if net.ipv6 else 'off'}",
        NetMode.HOST: "host: the host's own, guarded at the cgroup",
    }
    lines.append(f"network      {kind[net.mode]}")
    lines += [f"  allow      {rule}" for rule in net.allow]
    if net.mode is NetMode.GUARDED and not net.forwards:
        lines.append("  allow      nothing: the machine's forwarding and nftables are not touched")
    lines.append(f"  listen     {', '.join(net.listen) or 'nothing'}")
    given = [
        f"memory {size(limits.memory)}" if limits.memory else "",
        f"swap {size(limits.swap)}" if limits.swap else "",
        f"cpus {limits.cpus:g}" if limits.cpus else "",
        f"pids {limits.pids}" if limits.pids else "",
        f"timeout {limits.timeout:g} s" if limits.timeout else "",
    ]
    lines.append(f"limits       {', '.join(filter(None, given)) or 'none'}")
    lines.append(f"mode         {'enforce' if made.profile.enforce else 'audit: deny nothing'}")
    lines.append("guarantees")
    lines += [f"  {_mechanism(made, mechanism)}" for mechanism in made.mechanisms]
    return "\n".join(lines)


def _user(made: Plan) -> str:
    user = made.user
    if -1 in (user.uid, user.gid):
        return f"{user.name} (of the image, looked up when it is unpacked)"
    return f"{user.name} ({user.uid}:{user.gid})"


def _root(made: Plan) -> str:
    if made.image:
        return f"image {made.image.name}"
    return str(made.rootfs or "/")


def _mechanism(made: Plan, mechanism: Mechanism) -> str:
    name = f"{mechanism.guarantee:<10} {mechanism.name:<15}"
    if mechanism.finding.ok:
        return f"{name} {_colour(GREEN, 'ok')}       {mechanism.finding.detail}"
    if mechanism.guarantee in made.waived:
        state = "waived"
    elif mechanism.guarantee in made.profile.require and not mechanism.extra:
        state = _colour(RED, "MISSING")
    else:
        state = "absent"
    return f"{name} {state:<8} {mechanism.finding.detail}"


def event(line: Mapping[str, Any]) -> str:
    """One record line for people."""
    when = time.strftime("%H:%M:%S", time.localtime(line.get("time", 0)))
    subject = line.get("subject", {})
    what = _line(" ".join(f"{key}={value}" for key, value in subject.items()), 400)
    verdict = str(line.get("verdict", ""))
    colour = {"deny": RED, "kill": RED, "audit": YELLOW}.get(verdict)
    shown = _colour(colour, verdict) if colour else verdict
    who = f" by {_line(str(line.get('comm', '?')))}[{line['pid']}]" if line.get("pid") else ""
    rule = f" (rule: {line['rule']})" if line.get("rule") else ""
    return " ".join(filter(None, (when, str(line.get("kind", "?")), shown, what))) + who + rule


def top(readings: Mapping[str, Mapping[str, Any]]) -> str:
    """``mis top --once``."""
    head = ("RUN", "SECONDS", "CPU", "MEMORY", "PIDS", "DENIED", "DEFCON", "COUNTERS")
    rows = []
    for run, facts in readings.items():
        usage = facts.get("usage", {})
        cpu = usage.get("cpu_seconds")
        rows.append(
            {
                "run": facts.get("name") or run,
                "seconds": f"{facts.get('seconds', 0):.1f}",
                "cpu": "unavailable" if cpu is None else f"{cpu:.2f} s",
                "memory": size(usage.get("memory_bytes")),
                "pids": usage.get("pids"),
                "denied": facts.get("violations", 0),
                "defcon": facts.get("level", 5),
                "counters": counters_line(facts.get("counters", {})),
            }
        )
    return table(head, rows)


def live_top(readings: Callable[[], Mapping[str, Mapping[str, Any]]], interval: float) -> None:
    """``mis top``: redraw until Ctrl-C; on a pipe, one reading after another."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    try:
        with Live(Text(top(readings())), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(interval)
                live.update(Text(top(readings())))
    except KeyboardInterrupt:
        return


def doctor(report: Mapping[str, Any]) -> str:
    """``mis doctor``: each mechanism, then what follows for each guarantee."""
    lines = []
    for name, finding in report["mechanisms"].items():
        ok = _colour(GREEN, "works  ") if finding["ok"] else _colour(RED, "missing")
        lines.append(f"{ok}  {name:<15} {finding['detail']}")
        if finding["fix"] and not finding["ok"]:
            lines.append(f"{'':9}{'':15}  fix: {finding['fix']}")
    lines.append("")
    for name, finding in report["guarantees"].items():
        ok = _colour(GREEN, "given  ") if finding["ok"] else _colour(RED, "missing")
        lines.append(f"{ok}  {name:<15} {finding['detail']}")
    verdict = report["default_profile"]
    lines.append("")
    lines.append(
        "mis-run can run the default profile here"
        if verdict["ok"]
        else f"mis-run cannot run the default profile here: {verdict['detail']}"
    )
    if verdict["fix"] and not verdict["ok"]:
        lines.append(f"fix: {verdict['fix']}")
    return "\n".join(lines)
