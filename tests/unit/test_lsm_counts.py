"""Counts of the kernel plane."""

from __future__ import annotations

from mis_run.guards import lsm_abi
from mis_run.guards.lsm_counts import Counts, Lost, counts


def test_each_kind_has_its_count() -> None:
    """Of struct mis_state all that people are told, with lost events by kind."""
    lost = [0] * lsm_abi.MOST_ACTS
    lost[0], lost[lsm_abi.ACTS.index("mount")] = 3, 4
    raw = lsm_abi.STATE.pack(0, 1, 99, 2, 3, 4, 5, 6, 7, 98, 97, *lost)
    found = counts(raw)
    assert found == Counts(1, 2, 3, 4, 5, lost={"file.open": 3, "escape.mount": 4})
    assert (found.asked, found.walks) == (6, 7)
    assert counts(bytes(lsm_abi.STATE.size)) == Counts(0, 0, 0, 0)


def test_a_loss_is_told_once() -> None:
    """Only what is new since the last time, also after the counts began anew."""
    lost = Lost()
    assert lost.events({}) == []
    (event,) = lost.events({"file.open": 2})
    assert (event.kind, event.subject) == ("kernel.lost", {"events": {"file.open": 2}})
    assert lost.events({"file.open": 2}) == []
    (event,) = lost.events({"file.open": 5, "net.unix": 1})
    assert event.subject == {"events": {"file.open": 3, "net.unix": 1}}
    assert lost.events({}) == []
    (event,) = lost.events({"file.open": 1})
    assert event.subject == {"events": {"file.open": 1}}
