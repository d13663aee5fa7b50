"""docs/lsm-coverage.md speaks of the running kernel, and the programs load there without a
warning and have not grown."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from mis_run.build import ROOT
from mis_run.guards import lsm_plane

GROWTH = 1.25
FEW = 4  # states more than these are growth


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
def facts(coverage: Any) -> Any:
    """What it finds out here."""
    return coverage.facts()


def test_every_hook_is_explained(coverage: Any, facts: Any) -> None:
    """Each LSM hook of this kernel is guarded or has a reason why not, and is in the document."""
    assert coverage.check(set(facts["hooks"])) == []
    text = coverage.DOCUMENT.read_text()
    assert [hook for hook in facts["hooks"] if f"| {hook} |" not in text] == []


def test_every_guarded_hook_is_attached(coverage: Any, facts: Any) -> None:
    """What the document calls guarded has a program, wherever the kernel has the hook, and the
    plane has attached it."""
    plane = lsm_plane.ensure()
    plane.close()
    attached = {name.removeprefix("mis_") for name in plane.hooks()}
    assert set(facts["verified"]) == set(coverage.guarded()) & set(facts["hooks"]) == attached


def test_programs_load_without_a_warning(facts: Any) -> None:
    """Neither libbpf nor the kernel has anything to say about them."""
    assert facts["warnings"] == []
    said = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    assert "Linux version" in said
    assert [
        line for line in said.splitlines() if re.search(r"WARNING|BUG:|Oops|\bbpf:", line)
    ] == []


def test_programs_have_not_grown(coverage: Any, facts: Any) -> None:
    """The verifier walks, and keeps, at most a quarter more than what is recorded."""
    known = coverage.recorded(coverage.DOCUMENT.read_text(), os.environ["MIS_VM"])
    now = facts["verified"]
    assert known.keys() == now.keys()
    grown = {
        hook: (was, now[hook])
        for hook, was in known.items()
        if any(new > max(GROWTH * old, old + FEW) for old, new in zip(was, now[hook], strict=True))
    }
    assert grown == {}
