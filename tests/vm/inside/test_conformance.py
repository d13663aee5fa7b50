"""The conformance table on the kernel plane; tests/system/test_conformance.py has the other."""

from __future__ import annotations

import conformance
import pytest
from conformance import Launches, Outcome

from mis_run.guards import lsm_plane

ROWS = {f"{row.group}: {row.name}": row for row in conformance.table()}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """On the kernel plane."""
    lsm_plane.ensure().close()
    return Launches("kernel", tmp_path_factory.mktemp)


@pytest.fixture
def outcome(request: pytest.FixtureRequest, launches: Launches) -> Outcome:
    """Of this row; its launch is not part of the test's own time."""
    return launches.of(ROWS[request.node.callspec.params["name"]])


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, outcome: Outcome) -> None:
    """The act meets what its row says, and the record shows the violation it names, no other."""
    assert conformance.differences(ROWS[name].on("kernel"), outcome) == []
