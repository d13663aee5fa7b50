"""The summary of a CI step: what people read, and what a step cannot write into it."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mis_run.ci_summary import MOST, summary

START = {"kind": "run.start", "subject": {"profile": "ci-untrusted"}}


def denial(destination: str, comm: str = "tool") -> dict[str, Any]:
    subject = {"destination": destination, "protocol": "tcp"}
    return {"kind": "net.connect", "verdict": "deny", "comm": comm, "subject": subject}


def test_what_was_denied_is_counted_and_explained() -> None:
    """One row per different denial, with how often and the flag that would allow it."""
    text = summary([START, denial("192.0.2.1:443"), denial("192.0.2.1:443")], 1)
    assert "ended with code 1" in text
    assert "`ci-untrusted`" in text
    (row,) = [line for line in text.splitlines() if "192.0.2.1" in line]
    assert row.split("|")[2].strip() == "2"
    assert "--allow-net 192.0.2.1:443/tcp" in row


def test_nothing_denied_and_nothing_run() -> None:
    """Both are said in so many words."""
    assert "Nothing was denied" in summary([START], 0)
    assert "unknown" in summary([], 120)


def test_the_table_is_bounded() -> None:
    """A step that is denied a thousand different things fills no summary."""
    text = summary([denial(f"192.0.2.1:{port}") for port in range(1, 1000)], 0)
    assert len([line for line in text.splitlines() if "192.0.2.1" in line]) == MOST
    assert f"and {999 - MOST} more" in text


@given(st.text())
def test_a_step_writes_no_markup(comm: str) -> None:
    """Names are the step's own: no new line, cell, link or backtick comes out of them."""
    lines = summary([denial("192.0.2.1:443", comm)], 0).splitlines()
    (row,) = [line for line in lines if "192.0.2.1" in line]
    assert row.count("|") == 5
    assert row.count("`") == 6
