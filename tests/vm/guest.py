"""Inside the virtual machine: run the tests named in SHARE/ids, one result line each.

Written line by line, so that a guest that dies leaves the results it had. Started by conftest.py
with the virtual environment's Python; needs nothing but pytest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

BOUND = 600
"""Seconds for one test: one that hangs must not take the machine's other results with it."""


class TooLong(BaseException):
    """Not an Exception: nothing in a test may catch it by accident."""


def _too_long(_signal: int, _frame: FrameType | None) -> None:
    raise TooLong(f"no end after {BOUND} s")


class Lines:
    """Appends one JSON line for each finished test to a file that the host reads meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reports: list[pytest.TestReport] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        signal.alarm(BOUND)
        try:
            return (yield)
        finally:
            signal.alarm(0)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write("collection", "error", report.longreprtext, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        bad = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        outcome, text = "passed", ""
        if bad:
            outcome = "failed"
            text = "\n".join(_words(report) for report in bad)
        elif skipped:
            outcome = "skipped"
            where = skipped[0].longrepr
            text = where[2] if isinstance(where, tuple) else str(where)
        self._write(nodeid, outcome, text, sum(report.duration for report in self.reports))
        self.reports.clear()

    def _write(self, nodeid: str, outcome: str, text: str, seconds: float) -> None:
        line = {"id": nodeid, "outcome": outcome, "text": text, "seconds": seconds}
        with self.path.open("a") as out:
            out.write(json.dumps(line) + "\n")


def _words(report: pytest.TestReport) -> str:
    captured = "".join(f"\n-- {title} --\n{text}" for title, text in report.sections)
    return report.longreprtext + captured


def main(share: Path) -> int:
    """Run the tests; results appear in ``share/results``."""
    ids = (share / "ids").read_text().splitlines()
    signal.signal(signal.SIGALRM, _too_long)
    os.environ.pop("CI", None)  # what only the host must not skip, the guest may
    # An agent's python3 is the system's: without a rule it has no business in our environment.
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing Hypothesis takes 10 s here
    options = ["-p", "no:cacheprovider", "--basetemp", "/tmp/pytest", "--color", "no"]
    return int(pytest.main([*options, *ids], plugins=[Lines(share / "results")]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
