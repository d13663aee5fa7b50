"""The record of a run: JSON lines while it goes on, a short human summary at its end.

docs/record.md describes the schema (`events.SCHEMA`).  The file is bounded: after
``MAX_BYTES`` further violations are only counted, so that an agent cannot fill the disk.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mis_run import taint
from mis_run.errors import SetupError
from mis_run.events import Event
from mis_run.hints import Any, TextIO
from mis_run.linux.beneath import open_beneath
from mis_run.model import Plan
from mis_run.quoting import printable

RECORDS = Path("/var/log/mis")
KEEP = 200  # records of ended runs kept in RECORDS
MAX_BYTES = 16 << 20
ALWAYS = ("run.", taint.KIND)  # few, and needed: `resume` reads there that an agent is marked


class Record:
    """Writes events, keeps the counts and the last violations for the summary."""

    def __init__(self, run_id: str, out: TextIO | None, path: Path | None) -> None:
        self.run_id = run_id
        self.path = path
        self.counts: Counter[str] = Counter()  # "net.connect deny" → how often
        self.last: list[Event] = []
        self.dropped = 0
        self._out = out
        self._written = 0

    def write(self, event: Event) -> None:
        """Append one event; whole lines only, flushed so that ``mis logs -f`` sees them."""
        if event.verdict:
            self.counts[f"{event.kind} {event.verdict}"] += 1
        if event.violation:
            self.last = [*self.last[-19:], event]
        if self._out is None:
            return
        line = json.dumps({"run": self.run_id, **event.json()}, default=str) + "\n"
        if self._written + len(line) > MAX_BYTES and not event.kind.startswith(ALWAYS):
            self.dropped += 1
            return
        self._written += self._out.write(line)
        self._out.flush()

    def fileno(self) -> int:
        """The record's descriptor, for the watchdog to append to; /dev/null without a record."""
        if self._out is None:
            self._out = Path(os.devnull).open("w")  # noqa: SIM115 - closed with the record
        return self._out.fileno()

    @property
    def violations(self) -> int:
        """Acts denied or, in audit mode, allowed against the rules."""
        return sum(n for key, n in self.counts.items() if not key.endswith(" allow"))


def facts(plan: Plan, record: Record) -> dict[str, Any]:
    """What the state file and the ``run.start`` event say of a run."""
    return {
        "began": time.time(),
        "command": list(plan.command),
        "profile": plan.profile.name,
        "user": plan.user.name,
        "workdir": str(plan.cwd),
        "image": plan.image.digest if plan.image else None,
        "network": plan.network.mode.value,
        "mechanisms": [m.name for m in plan.mechanisms if m.finding.ok],
        "waived": sorted(plan.waived),
        "record": str(record.path) if record.path else None,
    }


@contextmanager
def open_record(run_id: str, log: Path | None, untrusted: Iterable[Path] = ()) -> Iterator[Record]:
    """The record of one run, in ``log`` or, without one, in RECORDS.

    In ``untrusted`` folders agents write, and may have left a link to a file of ours: there no
    link is followed.  Raises SetupError when an explicit ``log`` cannot be written; the default
    place failing (a read-only /var) costs only the file, and says so.
    """
    path = log or RECORDS / f"{run_id}.jsonl"
    out: TextIO | None = None
    try:
        if log is None:
            RECORDS.mkdir(mode=0o700, parents=True, exist_ok=True)
            _prune()
        out = os.fdopen(_open(path, tuple(untrusted)), "w")
    except OSError as error:
        if log is not None:
            words = {errno.ELOOP: "a link in a folder that agents write to"}
            raise SetupError(
                f"--log {log}: {words.get(error.errno or 0, error.strerror)}",
                hint="name a file outside of the workspace, or none: mis logs finds the record",
            ) from error
        print(f"mis-run: no record: {path}: {error.strerror}", file=sys.stderr)
    try:
        yield Record(run_id, out, path if out else None)
    finally:
        if out:
            out.close()


def _open(path: Path, untrusted: Sequence[Path]) -> int:
    """From where the path enters an untrusted folder on, no link is followed, and only a file is
    written to."""
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    for above in reversed(path.parents):
        real = Path(os.path.realpath(above))
        if any(real.is_relative_to(folder) for folder in untrusted):
            fd = open_beneath(real, path.relative_to(above), flags | os.O_NONBLOCK, 0o600)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
            raise OSError(errno.EINVAL, "not a file")
    return os.open(path, flags, 0o600)


def _prune() -> None:
    """Keep the newest KEEP records."""
    names = [entry for entry in os.scandir(RECORDS) if entry.name.endswith(".jsonl")]
    if len(names) < KEEP:
        return
    ages = []
    for entry in names:
        with suppress(FileNotFoundError):  # another launch was faster
            ages.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(ages)[: len(ages) - KEEP + 1]:
        Path(path).unlink(missing_ok=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a record; damaged lines are skipped but counted at the end."""
    damaged = 0
    with path.open() as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                damaged += 1
                continue
            if isinstance(event, dict):
                yield event
    if damaged:
        yield {"kind": "record.damaged", "subject": {"lines": damaged}}


def size(count: float | None) -> str:
    """Bytes for people: ``12.3 MiB``."""
    if count is None:
        return "unavailable"
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def summary(facts: Mapping[str, Any], record: Record) -> list[str]:
    """The lines a person reads at the end of a run (stderr); ``facts`` is the ``run.exit`` event.

    A run without violations gets one line; what could not be measured says so.
    """
    ending = facts["ending"]
    usage = facts["usage"]
    head = (
        f"{ending} after {facts['seconds']:.1f} s; "
        f"CPU {_seconds(usage.get('cpu_seconds'))}, "
        f"peak memory {size(usage.get('memory_peak'))}"
    )
    lines = [head]
    if counters := facts.get("counters"):
        lines.append(f"counters: {counters_line(counters)}")
    if net := facts.get("network"):
        lines.append(
            f"network: {net['allowed']} allowed, {net['denied']} denied, "
            f"{size(net.get('bytes_out'))} out"
        )
    if usage.get("oom_kills"):
        lines.append(f"memory limit: {usage['oom_kills']} process(es) killed by the kernel")
    if usage.get("pids_denied"):
        lines.append(f"process limit: {usage['pids_denied']} fork(s) refused")
    for line in facts.get("git", ()):
        lines.append(f"look before you run git: {printable(line)}")
    for event in record.last[-3:]:
        what = printable(" ".join(str(value) for value in event.subject.values()))
        lines.append(f"{event.verdict}: {event.kind} {what} (rule: {event.rule or 'default'})")
    if facts.get("tainted"):
        lines.append(f"tainted: it has opened what marks it; see: mis explain {record.run_id}")
    if record.violations:
        lines.append(f"{record.violations} violation(s); see: mis logs {record.run_id}")
    if record.dropped:
        lines.append(f"{record.dropped} event(s) over the record's size were only counted")
    return lines


def counters_line(readings: Mapping[str, Any]) -> str:
    """Counters as ``name value``; ``~`` marks a scaled one, the unavailable are named with why."""
    shown = []
    missing: dict[str, list[str]] = {}
    for name, reading in readings.items():
        if why := reading.get("unavailable"):
            missing.setdefault(why, []).append(name)
            continue
        mark = "~" if reading.get("scaled") else ""
        value = reading.get("value", 0.0)
        text = f"{value / 1e6:.1f} ms" if reading.get("unit") == "ns" else f"{value:,.6g}"
        shown.append(f"{name} {mark}{text}")
    shown += [f"{' and '.join(names)} unavailable ({why})" for why, names in missing.items()]
    return ", ".join(shown)


def _seconds(value: float | None) -> str:
    return "unavailable" if value is None else f"{value:.2f} s"
