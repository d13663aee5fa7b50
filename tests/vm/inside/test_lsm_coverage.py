"""docs/lsm-coverage.md speaks of the running kernel, and the programs have not grown."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mis_run.build import ROOT
from mis_run.guards import lsm_plane

GROWTH = 1.25


@pytest.fixture(scope="module")
def coverage() -> Any:
    """The document's generator."""
    path = ROOT / "scripts" / "lsm_coverage.py"
    spec = importlib.util.spec_from_file_location("lsm_coverage", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder() -> Path:
    """The loaded plane, in this test's own time."""
    plane = lsm_plane.ensure()
    plane.close()
    return plane.folder


def test_every_hook_is_explained(coverage: Any, folder: Path) -> None:
    """Each LSM hook of this kernel is guarded or has a reason why not, and is in the document."""
    facts = coverage.facts()
    assert coverage.check(set(facts["hooks"])) == []
    text = coverage.DOCUMENT.read_text()
    assert [hook for hook in facts["hooks"] if f"| {hook} |" not in text] == []


def test_every_guarded_hook_is_attached(coverage: Any, folder: Path) -> None:
    """What the document calls guarded has a program, wherever the kernel has the hook."""
    facts = coverage.facts()
    assert set(facts["verified"]) == set(coverage.guarded()) & set(facts["hooks"])


def test_programs_have_not_grown(coverage: Any, folder: Path) -> None:
    """The verifier walks at most a quarter more than what is recorded."""
    known = coverage.recorded(coverage.DOCUMENT.read_text(), os.environ["MIS_VM"])
    now = coverage.verified(folder)
    assert known.keys() == now.keys()
    assert {hook: count for hook, count in now.items() if count > GROWTH * known[hook]} == {}
