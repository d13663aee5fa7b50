"""The job summary of a CI step (``ci/step``): a run's record as a short Markdown text.

``python -m mis_run.ci_summary RECORD CODE``.  Whatever the step put into names and paths is shown
as code, so that it cannot write links or markup into the summary.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from mis_run import explain, report
from mis_run.hints import Any
from mis_run.quoting import printable

MOST = 50  # rows: a summary is read by people


def summary(events: Iterable[Mapping[str, Any]], code: int) -> str:
    """The Markdown text of one run."""
    counted: Counter[explain.Advice] = Counter()
    start: Mapping[str, Any] = {}
    for event in events:
        if event.get("kind") == "run.start":
            start = event.get("subject", {})
        if event.get("verdict") in ("deny", "audit", "kill"):
            counted[explain.advise(event)] += 1
    ended = "succeeded" if code == 0 else f"ended with code {code}"
    profile = start.get("profile", "unknown")
    lines = [f"### mis-run: the step {ended}", "", f"Profile {code_(profile)}. "]
    if not counted:
        lines[-1] += "Nothing was denied."
        return "\n".join(lines) + "\n"
    lines[-1] += f"{counted.total()} acts were denied:"
    lines += ["", "| what | times | why | what would allow it |", "|---|---|---|---|"]
    for advice, times in counted.most_common(MOST):
        allow = code_(advice.flag or advice.line) if advice.flag or advice.line else "nothing"
        lines.append(f"| {code_(advice.what)} | {times} | {code_(advice.why)} | {allow} |")
    if len(counted) > MOST:
        lines.append(f"| and {len(counted) - MOST} more | | | |")
    return "\n".join(lines) + "\n"


def code_(text: object) -> str:
    """``text`` as inline code in a table cell: one line, no backticks, no bars."""
    return f"`{printable(text)[:300].replace('`', chr(39)).replace('|', '¦')}`"


def main() -> int:
    """Print the summary of a record; a record that is not there means that nothing ran."""
    path, code = Path(sys.argv[1]), int(sys.argv[2])
    try:
        events = list(report.read(path))
    except OSError:
        events = []
    print(summary(events, code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
