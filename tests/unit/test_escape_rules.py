"""The escape rules: the compiled filter and our judgement agree, and neither lets a bad call by."""

from __future__ import annotations

import errno
from functools import cache

import pytest
from filters import ALLOW, ERRNO, NOTIFY, Program, compiled, interpret, library
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_run import seccomp as base
from mis_run.defcon import Effects
from mis_run.guards import escape_rules as rules
from mis_run.guards.escape_rules import judge
from mis_run.linux import abi

ARCH = abi.AUDIT_ARCH[abi.machine()]
CALM = Effects()
WX_DENIED = Effects(wx_memory=True)
NAMESPACE_FLAGS = 0x7E020000


@cache
def filter_of(sealed: bool = False, wx: bool = True) -> Program:
    """The base profile with the escape rules, compiled."""
    notify = rules.notify_rules(sealed_memfds=sealed, wx=wx)
    return compiled(base.profile(notify, left_out=rules.NAMES)["syscalls"])


def act(name: str, *args: int, sealed: bool = False, wx: bool = True) -> int:
    """What the filter does with a call."""
    values = [value % 2**64 for value in args] + [0] * (6 - len(args))
    return interpret(filter_of(sealed, wx), abi.number(name), ARCH, values)


def fate(name: str, *args: int, effects: Effects = CALM) -> int:
    """The errno a call meets in the end, 0 when it runs: filter first, then our judgement."""
    action = act(name, *args)
    if action == ALLOW:
        return 0
    if action != NOTIFY:
        return action & 0xFFFF
    values = tuple(value % 2**64 for value in (*args, *[0] * (6 - len(args))))
    verdict = judge(name, values, effects)  # type: ignore[arg-type]
    return verdict.error if verdict else 0


def test_the_base_profile_leaves_every_governed_call_to_these_rules() -> None:
    """No rule outside ours names one of our calls: libseccomp would merge them unpredictably."""
    for rule in base.profile((), left_out=rules.NAMES)["syscalls"]:
        assert not set(rule["names"]) & rules.NAMES
    assert {name for rule in rules.notify_rules() for name in rule["names"]} <= rules.NAMES


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_every_governed_call_has_a_rule(arch: str) -> None:
    """Each name that the machine knows is in some rule."""
    named = {name for rule in rules.notify_rules(arch) for name in rule["names"]}
    assert named == {name for name in rules.NAMES if name in abi.numbers(arch)}


@pytest.mark.parametrize("name", sorted({*rules.DENIED} & set(abi.numbers(abi.machine()))))
def test_a_denied_call_is_denied_whatever_its_arguments(name: str) -> None:
    """Handed over and answered EPERM, or refused at once when libseccomp is older than the call."""
    for args in ((), (-1,) * 6, (1, 2, 3, 4, 5, 6)):
        assert act(name, *args) in (NOTIFY, ERRNO | errno.EPERM)
        assert fate(name, *args) == errno.EPERM


def test_ordinary_calls_pass_the_filter() -> None:
    """The controls: what every program does is not handed over."""
    mapping = (0, 4096, 3, 0x22, -1, 0)
    assert act("read", 0) == act("mmap", *mapping) == act("mprotect", 4096, 4096, 5) == ALLOW
    assert act("clone", 0x01200011) == act("unshare", 0x200) == act("seccomp", 1, 0) == ALLOW
    assert act("socketpair", 1, 0x80001) == act("shmat", 0, 0, 0) == ALLOW


def test_clone3_looks_absent() -> None:
    """ENOSYS makes libc fall back to clone, whose flags are in a register."""
    assert act("clone3", 1, 88) == ERRNO | errno.ENOSYS


def test_io_uring_setup_is_absent_and_no_violation() -> None:
    """libuv probes for it in every node: it must fail softly, with ENOSYS."""
    assert act("io_uring_setup", 256, 0) == NOTIFY
    verdict = judge("io_uring_setup", (256, 0, 0, 0, 0, 0))
    assert verdict and verdict.absent and verdict.error == errno.ENOSYS


@given(st.integers(0, 2**64 - 1))
@settings(max_examples=300, deadline=None)
def test_namespaces_are_never_made(flags: int) -> None:
    """clone and unshare run exactly when no namespace flag is set, whatever else is."""
    assert (fate("clone", flags) == 0) == (flags & NAMESPACE_FLAGS == 0)
    assert (fate("unshare", flags) == 0) == (flags & (NAMESPACE_FLAGS | 0x80) == 0)


@pytest.mark.parametrize("flag", [*rules.NAMESPACES.values()])
def test_each_namespace_flag_alone_is_denied(flag: int) -> None:
    """Every kind of namespace, alone and among the flags of a thread or a fork."""
    for others in (0, 0x11, 0x3D0F00, 1 << 40):
        assert fate("clone", flag | others) == fate("unshare", flag | others) == errno.EPERM


def good_socket(family: int, kind: int, protocol: int) -> bool:
    """The kernel's view (32-bit arguments) of sockets that may be made."""
    family, kind, protocol = family & 0xFFFFFFFF, kind & 0xF, protocol & 0xFFFFFFFF
    if family == 16:
        return protocol == 0
    return family == 1 or (family in (2, 10) and kind in (1, 2))


SMALL = st.integers(0, 50)
WORD = st.one_of(SMALL, st.integers(0, 2**64 - 1), SMALL.map(lambda n: n | 1 << 32))
TYPE = st.one_of(WORD, SMALL.map(lambda n: n | 0x80800))


def test_every_family_and_type() -> None:
    """All families to 63 with all types and flags: exactly the good ones can be made."""
    for family in range(64):
        for kind in range(16):
            for flags in (0, 0x80800):
                for protocol in (0, 9):
                    call = (family, kind | flags, protocol)
                    assert (fate("socket", *call) == 0) == good_socket(*call), call
                    # Nothing bad is refused by the default action alone: all of it is counted.
                    assert act("socket", *call) in (ALLOW, NOTIFY), call


@given(WORD, TYPE, WORD)
@settings(max_examples=500, deadline=None)
def test_sockets_with_garbage_in_their_registers(family: int, kind: int, protocol: int) -> None:
    """High halves of registers, which the kernel ignores, smuggle nothing through."""
    assert (fate("socket", family, kind, protocol) == 0) == good_socket(family, kind, protocol)
    wanted = family & 0xFFFFFFFF == 1
    assert (fate("socketpair", family, kind, protocol) == 0) == wanted


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ((2, 3, 1), errno.EPERM),
        ((10, 3, 58), errno.EPERM),
        ((17, 3, 768), errno.EAFNOSUPPORT),
        ((38, 5, 0), errno.EAFNOSUPPORT),
        ((40, 1, 0), errno.EAFNOSUPPORT),
        ((16, 3, 9), errno.EPROTONOSUPPORT),
    ],
    ids=["raw4", "raw6", "packet", "alg", "vsock", "audit"],
)
def test_sockets_are_refused_with_what_callers_understand(
    call: tuple[int, ...], error: int
) -> None:
    """ping wants EPERM, libaudit EPROTONOSUPPORT, everybody else EAFNOSUPPORT."""
    assert fate("socket", *call) == error


@given(WORD)
@settings(max_examples=300, deadline=None)
def test_personality(persona: int) -> None:
    """Only the personas that moby allows; READ_IMPLIES_EXEC and ADDR_NO_RANDOMIZE are not."""
    allowed = persona & 0xFFFFFFFF in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)
    assert (fate("personality", persona) == 0) == allowed
    assert fate("personality", 0x0040000) == fate("personality", 0x0400000) == errno.EPERM


@given(WORD)
@settings(max_examples=300, deadline=None)
def test_no_listener_of_the_agents_own(flags: int) -> None:
    """A second listener, whose answers could stand for ours, is refused; plain filters are not."""
    assert fate("seccomp", 1, flags) == (errno.EBUSY if flags & 8 else 0)


@pytest.mark.parametrize(
    ("flags", "strict", "sealed"),
    [(0, NOTIFY, ALLOW), (1, NOTIFY, ALLOW), (8, ALLOW, ALLOW), (9, ALLOW, ALLOW)]
    + [(16, NOTIFY, NOTIFY), (24, NOTIFY, NOTIFY), (1 << 33, NOTIFY, ALLOW)],
)
def test_memfds_that_could_be_executed(flags: int, strict: int, sealed: int) -> None:
    """An executable memfd is refused; a plain one only while the namespace does not seal it."""
    assert act("memfd_create", 0, flags) == strict
    assert act("memfd_create", 0, flags, sealed=True) == sealed
    if strict == NOTIFY:
        assert fate("memfd_create", 0, flags) == errno.EACCES


@given(WORD, st.sampled_from(["mmap", "mprotect", "pkey_mprotect"]))
@settings(max_examples=200, deadline=None)
def test_writable_and_executable_memory(prot: int, name: str) -> None:
    """W+X mappings run until DEFCON denies them, and then exactly they are denied."""
    args = (0, 4096, prot)
    assert fate(name, *args) == 0
    both = prot & 6 == 6
    assert fate(name, *args, effects=WX_DENIED) == (errno.EACCES if both else 0)
    assert act(name, *args, wx=False) == ALLOW


def test_executable_shared_memory() -> None:
    """shmat with SHM_EXEC is W+X unless it is read-only."""
    assert fate("shmat", 1, 0, 0o100000, effects=WX_DENIED) == errno.EACCES
    assert fate("shmat", 1, 0, 0o110000, effects=WX_DENIED) == 0
    assert fate("shmat", 1, 0, 0, effects=WX_DENIED) == 0


@cache
def with_modes(uid: int) -> Program:
    """The filter of an agent that can write to the host's file systems."""
    notify = [*rules.notify_rules(), *rules.mode_rules(uid)]
    return compiled(base.profile(notify, left_out=rules.NAMES | rules.MODE_AT.keys())["syscalls"])


@given(WORD, WORD, st.sampled_from(sorted(rules.MODE_AT)), st.sampled_from([0, 1000]))
@settings(max_examples=300, deadline=None)
def test_set_user_id(first: int, mode: int, name: str, uid: int) -> None:
    """Of the modes exactly those with a mark are handed over and denied, whatever is around it."""
    args = [first, mode] if rules.MODE_AT[name] == 1 else [first, 0, mode]
    args += [0] * (6 - len(args))
    met = interpret(with_modes(uid), abi.number(name), ARCH, args)
    if met == ERRNO | errno.EPERM and name == "fchmodat2":
        return  # libseccomp 2.5.4 does not know it
    bad = bool(mode & (0o4000 if uid else 0o6000))
    assert met == (NOTIFY if bad else ALLOW)
    verdict = judge(name, tuple(args))  # type: ignore[arg-type]
    assert not bad or (verdict and verdict.error == errno.EPERM)
    assert act(name, *args) in (ALLOW, ERRNO | errno.EPERM)  # elsewhere any mode is a mode


@pytest.mark.parametrize("name", ["open", "socket", "mount", "clone"])
def test_other_entry_points_are_not_allowed(name: str) -> None:
    """i386 and x32 calls never reach an ALLOW: the same number means another call there."""
    for number in range(512):
        for arch, call in ((0x40000003, number), (ARCH, number | 0x40000000)):
            if abi.machine() == "x86_64":
                assert interpret(filter_of(), call, arch, [0] * 6) not in (ALLOW, NOTIFY)


@given(st.sampled_from(sorted(rules.NAMES - {"clone3"})), st.lists(WORD, min_size=6, max_size=6))
@settings(max_examples=1000, deadline=None)
def test_filter_and_judgement_agree(name: str, args: list[int]) -> None:
    """Whatever the filter allows, our judgement would allow too: two independent checks."""
    if name in abi.numbers(abi.machine()) and act(name, *args) == ALLOW:
        assert judge(name, tuple(args)) is None  # type: ignore[arg-type]


@given(st.text(max_size=20), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_an_unknown_call_is_denied(name: str, args: list[int]) -> None:
    """A call that the tables do not know is denied, not guessed about."""
    if name not in rules.NAMES:
        verdict = judge(name, tuple(args))  # type: ignore[arg-type]
        assert verdict and verdict.error == errno.EPERM


@pytest.mark.parametrize("arch", sorted(abi.AUDIT_ARCH))
def test_call_numbers_are_those_of_libseccomp(arch: str) -> None:
    """Every number that libseccomp knows for the architecture is the one in our table."""
    resolve = library().seccomp_syscall_resolve_name_arch
    known = 0
    for name, number in abi.numbers(arch).items():
        theirs = resolve(abi.AUDIT_ARCH[arch], name.encode())
        if theirs >= 0:
            known += 1
            assert theirs == number, name
    assert known > 300
    assert abi.names(arch)[abi.number("mount", arch)] == "mount"


def test_names_for_people() -> None:
    """Unknown calls and architectures still get a name, error numbers theirs."""
    assert abi.call(9999, ARCH) == "call-9999"
    assert abi.call(21, 0x40000003) == "arch-40000003:21"
    assert (abi.error(1), abi.error(0), abi.error(9999)) == ("EPERM", "0", "9999")
