"""Tests in ``inside/`` run in virtual machines: every one appears once for each kernel line.

pytest collects them here as usual; then each is replaced by one item per kernel. The first of a
kernel that runs boots its machine (all kernels at once), the others wait for their result. In
the guest (MIS_VM is set) they are ordinary tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packages
import pytest

HERE = Path(__file__).resolve().parent
INSIDE = HERE / "inside"
BOUND = 14400
"""Seconds that a machine may take from power-on to its last result."""
TIMED = (
    "test_an_interrupted_call",
    "test_cost",
    "test_denials_are_late",
    "test_opened_in_the_background",
    "test_slowness",
)
"""Tests that measure time: in an emulated machine they would measure the emulator."""
LONG = (
    "test_c_build",
    "test_every_way_to_a_file_marks",
    "test_the_same_ways_without_a_rule_mark_nobody",
)
"""Tests that take a quarter of an hour here: a compiler's work, or some sixty launches of what the
file guard judges alike on both planes."""
ELSEWHERE = ("test_unpack.py",)
"""Files whose tests make whiteouts, which the guest's own disks, overlays, refuse."""
NOT_ON = {
    # The filter, and with it the listener, is released when a process ends only since 6.11;
    # before that when its parent has waited for it.
    ("6.1", "test_an_abandoned_listener_is_quiet"): "needs Linux 6.11",
}
"""(kernel line, test): what the kernel itself cannot do, so that the guest is not asked."""
IN_GUEST = bool(os.environ.get("MIS_VM"))


def _load(name: str) -> Any:
    """A module beside this file; under importmode=importlib there is no package to import from."""
    spec = importlib.util.spec_from_file_location(f"mis_vm_{name}", HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


vm = _load("vm")
layout = _load("layout")


class Machine:
    """One kernel's guest and the results it has written so far."""

    def __init__(self, line: str, ids: list[str]) -> None:
        self.line = line
        self.folder = tempfile.TemporaryDirectory(prefix=f"mis-vm-{line}-")
        self.share = Path(self.folder.name)
        (self.share / "ids").write_text("\n".join(ids))
        self.console = ""
        self.thread = threading.Thread(target=self._run, name=f"vm-{line}")

    def _run(self) -> None:
        guest = f"{HERE.parents[1]}/.venv/bin/python -I {HERE}/guest.py {self.share}"
        try:
            self.console = vm.run(self.line, guest, share=self.share, timeout=BOUND).console
        except (vm.VmError, OSError) as error:
            self.console = f"{type(error).__name__}: {error}"

    def result(self, nodeid: str) -> dict[str, Any]:
        """The guest's word on one test; an error with the console's end when it has none."""
        end = time.monotonic() + BOUND + 30
        while time.monotonic() < end:
            over = not self.thread.is_alive()
            for line in self._lines():
                if line["id"] in (nodeid, "collection"):
                    return line
            if over:
                break
            time.sleep(0.2)
        tail = "\n".join(self.console.splitlines()[-40:])
        return {"outcome": "error", "text": f"no result from Linux {self.line}\n{tail}"}

    def _lines(self) -> list[dict[str, Any]]:
        try:
            text = (self.share / "results").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


class GuestFailure(Exception):
    """A test failed in the guest; the text is its report there."""


class GuestItem(pytest.Item):
    """One test on one kernel. Its markers stay behind: they speak of the guest."""

    def __init__(self, *, line: str, inner: str, where: Path, **rest: Any) -> None:
        super().__init__(**rest)
        self.line, self.inner, self.where = line, inner, where
        self.extra_keyword_matches.update((*where.relative_to(HERE).parts, "vm"))  # for -k

    def runtest(self) -> None:
        """Wait for the guest's result and make it ours."""
        if reason := NOT_ON.get((self.line, self.name.partition("[")[0])):
            pytest.skip(reason)
        result = _machine(self).result(self.inner)
        if result["outcome"] == "skipped":
            pytest.skip(f"in the VM: {result['text'].removeprefix('Skipped: ')}")
        if result["outcome"] != "passed":
            raise GuestFailure(result["text"])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The guest's own report, without our frames around it."""
        if isinstance(excinfo.value, GuestFailure):
            return f"on Linux {self.line}, in the VM:\n{excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test is written."""
        return self.where, None, self.name


MACHINES = pytest.StashKey[dict[str, Machine | str]]()
"""By kernel; or why there is none."""


def _machine(item: GuestItem) -> Machine:
    """The machine of this item's kernel; the first call starts all that are needed."""
    session = item.session
    if MACHINES not in session.stash:
        wanted: dict[str, list[str]] = {}
        for other in session.items:
            name = other.name.partition("[")[0]
            if isinstance(other, GuestItem) and (other.line, name) not in NOT_ON:
                wanted.setdefault(other.line, []).append(other.inner)
        guests = (item for item in session.items if isinstance(item, GuestItem))
        if any(guest.where.name == "test_real_work.py" for guest in guests):
            packages.fetch()  # for a machine without network; the test says what is missing
        machines = {line: _absent(line) or Machine(line, ids) for line, ids in wanted.items()}
        session.stash[MACHINES] = machines
        for machine in machines.values():
            if isinstance(machine, Machine):
                machine.thread.start()
    found = session.stash[MACHINES][item.line]
    if isinstance(found, str):
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"no test VM: {found}")
    return found


def _absent(line: str) -> str:
    """Why there can be no machine with this kernel here, or an empty string."""
    if reason := vm.missing():
        return str(reason)
    try:
        vm.kernel(line)
    except (vm.VmError, OSError) as error:
        return str(error)
    return ""


if not IN_GUEST:

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
        """Replace what lives in ``inside/`` before -k and -m choose."""
        kept: list[pytest.Item] = []
        for item in items:
            if INSIDE not in item.path.parents:
                kept.append(item)
                continue
            if item.name.startswith((*TIMED, *LONG)) or item.path.name in ELSEWHERE:
                continue
            for line in vm.LINES:
                folder = item.getparent(pytest.Dir) or session
                kept.append(
                    GuestItem.from_parent(
                        folder,
                        name=f"{item.name}[linux-{line}]",
                        nodeid=f"{item.nodeid}[linux-{line}]",
                        line=line,
                        inner=item.nodeid,
                        where=item.path,
                    )
                )
        items[:] = kept

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(session: pytest.Session) -> None:
        """Wait for machines that still run: they end by themselves, at the bound at the latest."""
        for machine in session.stash.get(MACHINES, {}).values():
            if isinstance(machine, Machine):
                machine.thread.join()
                machine.folder.cleanup()


@pytest.fixture
def cgroup_host(request: pytest.FixtureRequest) -> Iterator[str]:
    """In the guest: be a host with ``v1`` only, ``v2`` only or ``hybrid`` cgroups for one test.

    Parametrize indirectly: ``@pytest.mark.parametrize("cgroup_host", ["v1"], indirect=True)``.
    """
    if not IN_GUEST:
        pytest.fail("cgroup_host is for tests in tests/vm/inside")
    layout.mount(request.param)
    yield request.param
    layout.mount("v2")
