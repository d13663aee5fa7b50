"""mis-oci-hook: what it reads, what it refuses, and the plan that a hook can carry out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mis_run import profiles
from mis_run.dataclass import replace
from mis_run.errors import MissingGuarantee, UsageError
from mis_run.events import Guarantee
from mis_run.model import Finding, Profile
from mis_run.oci import edit, hook, planning
from mis_run.oci.operator import Operator
from mis_run.oci.order import Order
from mis_run.oci.planning import SKETCH
from mis_run.oci.spec import Spec

STATE = {"id": "c1", "pid": 12, "bundle": "/b", "status": "creating", "annotations": {}}
WELL = Finding(True, "works", "")
ALL = ("root", "cgroup-v2", "cgroup-bpf", "perf-cgroup", "watchdog", "fanotify", "seccomp-notify")
HOST = replace(SKETCH, mechanisms=dict.fromkeys(ALL, WELL))


def order(profile: Profile, operator: Operator | None = None) -> Order:
    return Order(
        profile=profile,
        spec=Spec(Path("/b"), {"linux": {"namespaces": [{"type": "network"}]}}),
        operator=operator or Operator(),
        container="c1",
        name="c1",
        root="/b",
        runtime=Path("/"),
        sealed=False,
        by_hook=True,
    )


def test_a_state() -> None:
    """As OCI runtimes write it; of a stopped container there need be no pid."""
    assert hook.read(json.dumps(STATE).encode()) == STATE
    assert hook.read(b'{"id": "c1", "bundle": "/b", "status": "stopped"}')["id"] == "c1"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 10_000,
        b"{}" + b" " * hook.MOST_BYTES,
        *(
            json.dumps({**STATE, **wrong}).encode()
            for wrong in ({"pid": None}, {"pid": True}, {"id": 1}, {"bundle": "b"}, {"status": []})
        ),
    ],
)
def test_no_state(raw: bytes) -> None:
    """Refused in words, so that the engine does not start the container."""
    with pytest.raises(UsageError, match="state"):
        hook.read(raw)


def test_arguments() -> None:
    """What hooks.d says; what is not known is refused."""
    found = hook.words(["--allow-missing", "file,exec", "--mis-profile", "x"])
    assert found.waived == {Guarantee.FILE, Guarantee.EXEC}
    assert found.profile == "x"
    for bad in (["--allow-missing", "all"], ["--what"], ["x"], ["--mis-config"]):
        with pytest.raises(UsageError):
            hook.words(bad)


@pytest.mark.parametrize("kind", ["bounding", "effective", "inheritable", "permitted", "ambient"])
def test_rights_that_undo_the_guard(kind: str) -> None:
    """Whoever may use BPF, raw sockets or mounts is not held by rules on a cgroup."""
    for name in hook.TOO_MUCH:
        found = Spec(Path("/b"), {"process": {"capabilities": {kind: ["CAP_CHOWN", name]}}})
        with pytest.raises(UsageError, match=name):
            hook.check_rights(found)
    hook.check_rights(Spec(Path("/b"), {"process": {"capabilities": {kind: ["CAP_CHOWN"]}}}))
    hook.check_rights(Spec(Path("/b"), {}))


def test_a_hook_promises_no_more_than_it_can_give() -> None:
    """What a profile requires and only the runtime gives is refused, unless the operator waives."""
    profile = profiles.load("default", search=[profiles.BUILT_IN])
    plan = planning.of(order(profile), HOST)
    used = {one.name for one in plan.mechanisms if one.finding.ok}
    assert used == {"cgroup-bpf", "perf-cgroup", "watchdog"}
    with pytest.raises(MissingGuarantee, match="an OCI hook cannot give it"):
        planning.check(plan, by_hook=True)
    rest = frozenset(Guarantee) - planning.HOOKS
    waiving = planning.of(order(profile, Operator(waived=rest)), HOST)
    planning.check(waiving, by_hook=True)
    assert waiving.waived == rest
    minimum = Operator(waived=rest, minimum=frozenset({Guarantee.FILE}))
    with pytest.raises(MissingGuarantee, match="requires 'file'"):
        planning.check(planning.of(order(profile, minimum), HOST), by_hook=True)


def test_rules_by_name_are_the_runtimes() -> None:
    """Without our resolver inside a name would never be an address."""
    profile = profiles.load("default", search=[profiles.BUILT_IN])
    named = replace(profile, network=replace(profile.network, allow=("api.example.com:443",)))
    with pytest.raises(UsageError, match="by name"):
        planning.of(order(named), HOST)


@pytest.mark.parametrize("hooks", [None, {}, {"poststop": 1}, {"poststop": [1, {}]}])
def test_the_runtime_takes_our_hook_out(hooks: Any) -> None:
    """A container of mis-oci-runtime is guarded once; everybody else's hooks stay."""
    other = {"path": "/usr/bin/other"}
    mine = {"path": "/opt/mis-oci-hook", "args": ["x"]}
    assert edit.without_our_hook({"createRuntime": [mine, other]}) == {"createRuntime": [other]}
    assert edit.without_our_hook(hooks or {}) == (hooks or {})
