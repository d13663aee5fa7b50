"""The conformance table on the host plane; tests/vm/inside/test_conformance.py has the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import conformance
import pytest
from conformance import GROUPS, Outcome

pytestmark = pytest.mark.root
ROWS = {f"{row.group}: {row.name}": row for row in conformance.table()}
Outcomes = Callable[[str], dict[str, Outcome]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """A group's outcomes; its agent is launched when they are first asked for."""
    known: dict[str, dict[str, Outcome]] = {}

    def of(group: str) -> dict[str, Outcome]:
        if group not in known:
            rows = [row for row in ROWS.values() if row.group == group]
            known[group] = conformance.run(rows, tmp_path_factory.mktemp("c") / "ws", "host")
        return known[group]

    return of


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, outcomes: Outcomes) -> None:
    """The act meets what its row says, and the record shows the violation it names, no other."""
    row = ROWS[name]
    assert conformance.differences(row.on("host"), outcomes(row.group)[row.name]) == []


@pytest.mark.parametrize("group", GROUPS)
def test_control(group: str, tmp_path: Path) -> None:
    """Without mis-run the acts succeed: it is the guard that refuses them."""
    rows = [row for row in ROWS.values() if row.group == group]
    met = conformance.control(rows, tmp_path / "ws")
    wanted = {row.name: row.control for row in rows if row.control is not None}
    assert {name: found for name, found in met.items() if found != wanted[name]} == {}
    assert met


def test_the_table_is_large_enough() -> None:
    """150 rows at least, and each that the planes judge differently says why."""
    assert len(ROWS) == len(conformance.table()) >= 150
    for row in ROWS.values():
        assert (row.kernel is None) == (row.reason is None), row
