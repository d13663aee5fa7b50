"""The conformance table on the kernel plane; tests/system/test_conformance.py has the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import conformance
import pytest
from conformance import Outcome

from mis_run.guards import lsm_plane

ROWS = {f"{row.group}: {row.name}": row for row in conformance.table()}
Outcomes = Callable[[str], dict[str, Outcome]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    """A group's outcomes; its agent is launched when they are first asked for."""
    known: dict[str, dict[str, Outcome]] = {}
    lsm_plane.ensure().close()

    def of(group: str) -> dict[str, Outcome]:
        if group not in known:
            rows = [row for row in ROWS.values() if row.group == group]
            known[group] = conformance.run(rows, tmp_path_factory.mktemp("c") / "ws", "kernel")
        return known[group]

    return of


@pytest.fixture
def outcome(request: pytest.FixtureRequest, outcomes: Outcomes) -> Outcome:
    """Of this row; its launch is not part of the test's own time."""
    row = ROWS[request.node.callspec.params["name"]]
    return outcomes(row.group)[row.name]


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, outcome: Outcome) -> None:
    """The act meets what its row says, and the record shows the violation it names, no other."""
    assert conformance.differences(ROWS[name].on("kernel"), outcome) == []
