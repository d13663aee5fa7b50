"""The merged filter, compiled and interpreted: never wider than the engine's, never than ours."""

from __future__ import annotations

import errno
from functools import cache
from typing import Any

import pytest
from filters import ALLOW, ERRNO, NOTIFY, Program, compiled, interpret
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_run import seccomp
from mis_run.errors import UsageError
from mis_run.guards import escape_rules
from mis_run.guards.escape_rules import NAMES, judge
from mis_run.linux import abi
from mis_run.oci.seccomp_merge import merge

ARCH = abi.AUDIT_ARCH[abi.machine()]
ORDINARY = sorted(seccomp.ALLOWED - {"seccomp", "memfd_create", "personality"})


def rule(names: list[str], *args: dict[str, Any], action: str = "ALLOW") -> dict[str, Any]:
    return {"names": names, "action": f"SCMP_ACT_{action}", "args": list(args)}


def on(value: int, op: str = "EQ", index: int = 0, two: int = 0) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": two, "op": f"SCMP_CMP_{op}"}


def engine(*rules: dict[str, Any], default: str = "ERRNO") -> dict[str, Any]:
    return {
        "defaultAction": f"SCMP_ACT_{default}",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": list(rules),
    }


# What Docker's default profile says about the calls that the guard governs, and some others.
DOCKER = engine(
    rule([*ORDINARY, "seccomp", "memfd_create", "socket", "io_uring_setup", "io_uring_enter"]),
    rule(["ptrace", "process_vm_readv", "kcmp"]),
    *(rule(["personality"], on(value)) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)),
    rule(["clone"], on(0x7E020000, "MASKED_EQ")),
    rule(["clone3"], action="ERRNO") | {"errnoRet": errno.ENOSYS},
    rule(["chroot"]),
)
# Newer ones: no vsock. And one that allows next to nothing.
NEWER = engine(*DOCKER["syscalls"][1:], rule(ORDINARY), rule(["socket"], on(40, "NE")))
# podman's: no netlink audit, in three rules of which one says no.
PODMAN = engine(
    *DOCKER["syscalls"][1:],
    rule([*ORDINARY, "seccomp", "memfd_create"]),
    rule(["socket"], on(16), on(9, index=2), action="ERRNO") | {"errnoRet": errno.EINVAL},
    rule(["socket"], on(9, "NE", index=2)),
    rule(["socket"], on(16, "NE")),
    rule(["socket"], on(9, "NE", index=2)),
)
TINY = engine(rule(["read", "write", "exit_group", "execve", "openat"]))
OPEN = engine(
    rule(["ptrace", "read"], action="ERRNO"),
    rule(["getcwd"], action="ERRNO") | {"errnoRet": 42},
    default="ALLOW",
)
ENGINES = {"docker": DOCKER, "newer": NEWER, "podman": PODMAN, "tiny": TINY, "open": OPEN}


@cache
def program(name: str, merged: bool, enforce: bool = True) -> Program:
    found = ENGINES[name]
    if not merged:
        default = ALLOW if found["defaultAction"] == "SCMP_ACT_ALLOW" else ERRNO | 1
        return compiled(found["syscalls"], default)
    return compiled(merge(found, enforce=enforce, sealed=False)["syscalls"])


def allows(which: Program, name: str, args: list[int], *, ours: bool, enforce: bool = True) -> bool:
    """Whether a call runs in the end; ``ours``: a notification is answered by our judgement."""
    action = interpret(which, abi.number(name), ARCH, args)
    if action != NOTIFY or not ours:
        return action == ALLOW
    verdict = judge(name, tuple(args))  # type: ignore[arg-type]
    return verdict is None or not (enforce or verdict.absent)


GOVERNED = sorted(NAMES & set(abi.numbers(abi.machine())))
REGISTER = st.integers(0, 2**64 - 1) | st.sampled_from(
    [0, 1, 2, 3, 8, 10, 16, 40, 0x10000000, 0x20000, 1 << 32, (1 << 32) + 1, 0xFFFFFFFF]
)


@settings(max_examples=2000, deadline=None)
@given(
    st.sampled_from([*ENGINES]),
    st.sampled_from([*GOVERNED, "read", "keyctl", "openat", "getpid"]),
    st.lists(REGISTER, min_size=6, max_size=6),
    st.booleans(),
)
def test_never_wider_than_the_engine(which: str, name: str, args: list[int], enforce: bool) -> None:
    """Whatever runs under the merged filter would have run under the engine's, audit or not."""
    if allows(program(which, True, enforce), name, args, ours=True, enforce=enforce):
        # Registers of int arguments: the kernel sees the lower half, and so do we.
        seen = args if name in ("clone", "unshare") else [value & 0xFFFFFFFF for value in args]
        engines = program(which, False)
        assert allows(engines, name, args, ours=False) or allows(engines, name, seen, ours=False)


@settings(max_examples=2000, deadline=None)
@given(
    st.sampled_from([*ENGINES]),
    st.sampled_from(GOVERNED),
    st.lists(REGISTER, min_size=6, max_size=6),
)
def test_never_wider_than_the_guard(which: str, name: str, args: list[int]) -> None:
    """Whatever the escape guard denies in our own containers is denied in an engine's too."""
    if allows(program(which, True), name, args, ours=True):
        assert allows(own(), name, args, ours=True)


@cache
def own() -> Program:
    return compiled(seccomp.profile(escape_rules.notify_rules(), left_out=NAMES)["syscalls"])


@pytest.mark.parametrize("name", ["docker", "newer", "podman"])
def test_ordinary_calls_still_run(name: str) -> None:
    """The controls: what every program does passes, and the guard sees what it should."""
    merged = program(name, True)
    for call in ("read", "execve", "openat", "mmap", "getpid"):
        assert allows(merged, call, [0] * 6, ours=True)
    assert allows(merged, "clone", [0x01200011, 0, 0, 0, 0, 0], ours=True)
    assert allows(merged, "socket", [2, 1, 0, 0, 0, 0], ours=True)
    for call, first in (("ptrace", 0), ("mount", 0), ("unshare", 0x10000000), ("socket", 38)):
        assert interpret(merged, abi.number(call), ARCH, [first, 0, 0, 0, 0, 0]) == NOTIFY


def test_no_filter_means_ours() -> None:
    """seccomp=unconfined gets the whole allow-list, not the guard's rules alone."""
    merged = merge(None, enforce=True, sealed=True)
    assert merged["defaultAction"] == "SCMP_ACT_ERRNO"
    assert any("read" in rule["names"] for rule in merged["syscalls"])


def test_only_the_native_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard's rules are complete for it alone: other entry points are closed."""
    assert len(merge(DOCKER, enforce=True, sealed=True)["architectures"]) == 1


@pytest.mark.parametrize(
    "bad",
    [
        engine(rule(["socket"], on(1, index=1))),  # a condition we cannot compare
        engine(rule(["socket"], on(1))),  # allows less than the guard would
        engine(rule(["socket"], on(9, "NE", index=2))),  # less than the guard for every family
        engine(rule(["socket"], on(7, "GE", index=2)), rule(["socket"], on(5, "LT", index=2))),
        # A rule that says no where the guard would say yes, or might.
        engine(rule(["socket"], on(16, "NE")), rule(["socket"], on(2), action="ERRNO")),
        engine(
            rule(["socket"], on(16, "NE")),
            rule(["socket"], on(16)),
            rule(["socket"], on(3, index=1), action="ERRNO"),
        ),
        engine(rule(["mount"], on(1))),
        engine(rule(["clone"], on(0x10000000, "MASKED_EQ"))),
        engine(rule(["socket"]), rule(["socket"], on(1), action="ERRNO")),
        engine(rule(["ptrace"], action="TRACE")),
        engine(rule(["read"], action="NOTIFY")),
        engine(default="NOTIFY"),
        {**DOCKER, "listenerPath": "/run/other"},
        {**DOCKER, "syscalls": [{"names": "read"}]},
        {**DOCKER, "syscalls": [{"names": ["read"], "args": [1]}]},
        {**DOCKER, "syscalls": [rule(["socket"]) | {"args": [{"index": "0", "op": []}]}]},
        {"defaultAction": []},
    ],
)
def test_what_cannot_be_merged_is_refused(bad: dict[str, Any]) -> None:
    """A guess would be a hole, or take something away that nobody mentioned."""
    with pytest.raises(UsageError, match="seccomp"):
        merge(bad, enforce=True, sealed=False)


def test_the_engines_error_is_kept() -> None:
    """Where the engine denies, a program meets the error that the engine chose."""
    assert interpret(program("open", True), abi.number("getcwd"), ARCH, [0] * 6) == ERRNO | 42
