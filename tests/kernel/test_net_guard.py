"""The network guard on a real cgroup: each hook, its event, its control; XDP packet by packet."""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run import cgroup_detect, rules
from mis_run.defcon import Effects, Stance
from mis_run.errors import VerifyError
from mis_run.events import Verdict
from mis_run.guards import net, net_events, net_layout
from mis_run.linux import libc
from mis_run.model import NetMode, NetPlan

pytestmark = pytest.mark.root
ALLOWED, OTHER = 47001, 47002


@pytest.fixture
def group() -> Iterator[Path]:
    _, unified, _ = cgroup_detect.detect()
    assert unified is not None
    folder = unified / f"mistest-{secrets.token_hex(4)}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def plan(*allow: str, mode: NetMode = NetMode.HOST, listen: tuple[str, ...] = ()) -> NetPlan:
    return NetPlan(
        mode=mode, ipv6=True, allow=allow, listen=listen, resolvers=(), host_addresses=()
    )


RULES = (f"127.0.0.1:{ALLOWED}", f"[::1]:{ALLOWED}")


def inside(group: Path, act: Callable[[], object], depth: int = 1) -> int:
    """Errno of ``act`` in a process (``depth`` forks away) that joined ``group``; 0: it worked."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if depth == 1:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            if depth > 1:
                (group / "cgroup.procs").write_text(str(os.getpid()))
                child = os.fork()
                if child:
                    os.waitpid(child, 0)
                    os._exit(0)
                os.setsid()
            act()
            result = 0
        except OSError as error:
            result = error.errno or 255
        os.write(writer, struct.pack("i", result))
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as answer:
        return int(struct.unpack("i", answer.read(4))[0])


def connect(family: int, kind: int, address: str, port: int) -> Callable[[], object]:
    def act() -> None:
        with socket.socket(family, kind) as sock:
            sock.settimeout(2)
            sock.connect((address, port))

    return act


def send(family: int, address: str, port: int) -> Callable[[], object]:
    def act() -> None:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (address, port))

    return act


def fast_open(address: str, port: int) -> Callable[[], object]:
    def act() -> None:
        with socket.socket() as sock:
            sock.sendto(b"x", socket.MSG_FASTOPEN, (address, port))

    return act


REFUSED = 111  # nobody listens: the guard let it through
EPERM, EINVAL = 1, 22
INET, INET6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM

ACTS = {
    "connect4": (connect(INET, TCP, "127.0.0.1", OTHER), "net.connect", REFUSED),
    "connect6": (connect(INET6, TCP, "::1", OTHER), "net.connect", REFUSED),
    "mapped": (connect(INET6, TCP, "::ffff:127.0.0.1", OTHER), "net.connect", REFUSED),
    "zero": (connect(INET, TCP, "0.0.0.0", OTHER), "net.connect", REFUSED),
    "udp connect4": (connect(INET, UDP, "127.0.0.1", OTHER), "net.connect", 0),
    "udp connect6": (connect(INET6, UDP, "::1", OTHER), "net.connect", 0),
    "send4": (send(INET, "127.0.0.1", OTHER), "net.send", 0),
    "send6": (send(INET6, "::1", OTHER), "net.send", 0),
    "fast open": (fast_open("127.0.0.1", OTHER), "net.connect", REFUSED),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("depth", [1, 2])
def test_denied_with_an_event_and_works_without(name: str, depth: int, group: Path) -> None:
    """Each act is EPERM with one event in the cgroup, and is not EPERM without the guard."""
    act, kind, without = ACTS[name]
    assert inside(group, act, depth) == without
    with net.attach(group, net.load(plan(*RULES), enforce=True)) as guard:
        assert inside(group, act, depth) == EPERM
        events = guard.read()
        assert [(event.kind, event.verdict) for event in events] == [(kind, Verdict.DENY)]
        assert str(OTHER) in events[0].subject["destination"]
        assert events[0].pid > 0
        assert events[0].comm
        assert events[0].pid != os.getpid()


@pytest.mark.parametrize("name", ["connect4", "send4", "connect6", "send6", "mapped"])
def test_allowed_port_passes(name: str, group: Path) -> None:
    """The same acts to the allowed port pass and make no event."""
    acts = {
        "connect4": (connect(INET, TCP, "127.0.0.1", ALLOWED), REFUSED),
        "send4": (send(INET, "127.0.0.1", ALLOWED), 0),
        "connect6": (connect(INET6, TCP, "::1", ALLOWED), REFUSED),
        "send6": (send(INET6, "::1", ALLOWED), 0),
        "mapped": (connect(INET6, TCP, "::ffff:127.0.0.1", ALLOWED), REFUSED),
    }
    with net.attach(group, net.load(plan(*RULES), enforce=True)) as guard:
        act, expected = acts[name]
        assert inside(group, act) == expected
        assert guard.read() == []


def test_nobody_outside_the_cgroup_is_judged(group: Path) -> None:
    """A process outside the cgroup connects as if there were no guard, and is not counted."""
    with net.attach(group, net.load(plan(*RULES), enforce=True)) as guard:
        before = guard.counts()
        with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
            sock.connect(("127.0.0.1", OTHER))
        assert guard.counts() == before


def bind(address: str, port: int) -> Callable[[], object]:
    def act() -> None:
        with socket.socket() as sock:
            sock.bind((address, port))

    return act


def test_bind_is_judged_by_listen_rules(group: Path) -> None:
    """Listening is denied but where a rule allows it; port 0 is a client's and always passes."""
    guard = net.load(plan(listen=(f"127.0.0.1:{ALLOWED}",)), enforce=True)
    assert inside(group, bind("0.0.0.0", OTHER)) == 0
    with net.attach(group, guard):
        assert inside(group, bind("127.0.0.1", ALLOWED)) == 0
        assert inside(group, bind("127.0.0.1", 0)) == 0
        assert inside(group, bind("127.0.0.1", OTHER)) == EPERM
        assert inside(group, bind("0.0.0.0", ALLOWED)) == EPERM
        assert [event.kind for event in guard.read()] == ["net.bind", "net.bind"]


@pytest.mark.parametrize(
    ("family", "kind", "protocol"), [(INET, 3, 17), (INET6, 3, 17), (INET, 2, 136), (INET, 1, 262)]
)
def test_sockets_of_other_kinds(family: int, kind: int, protocol: int, group: Path) -> None:
    """Raw, UDP-Lite and MPTCP sockets are denied with an event, though they work outside."""

    def act() -> None:
        socket.socket(family, kind, protocol).close()

    if inside(group, act):
        pytest.skip("this kernel has no such protocol")
    with net.attach(group, net.load(plan("*"), enforce=True)) as guard:
        assert inside(group, act) == EPERM
        assert [event.kind for event in guard.read()] == ["net.socket"]


def test_audit_mode_allows_and_tells(group: Path) -> None:
    """Without enforcement the act goes on and the event says what would have been."""
    with net.attach(group, net.load(plan(*RULES), enforce=False)) as guard:
        assert inside(group, connect(INET, TCP, "127.0.0.1", OTHER)) == REFUSED
        assert [event.verdict for event in guard.read()] == [Verdict.AUDIT]


def test_new_rules_apply_at_once(group: Path) -> None:
    """Addresses of names can come and go while the guard is attached."""
    guard = net.load(plan(f"service.example:{ALLOWED}"), enforce=True)
    act = connect(INET, TCP, "198.51.100.4", ALLOWED)
    with net.attach(group, guard):
        assert inside(group, act) == EPERM
        guard.update({"service.example": ("198.51.100.4",)})
        assert inside(group, act) != EPERM
        guard.update({})
        assert inside(group, act) == EPERM


def test_defcon_level_denies_new_destinations(group: Path) -> None:
    """From level 3 on a destination that was used before still works, a new one does not."""
    guard = net.load(plan("127.0.0.1:47000-47100"), enforce=True)
    used, new = (connect(INET, TCP, "127.0.0.1", port) for port in (47010, 47011))
    with net.attach(group, guard):
        assert inside(group, used) == REFUSED
        guard.follow(Stance(effects=lambda: Effects(destinations=True)))
        assert inside(group, used) == REFUSED
        assert inside(group, new) == EPERM
        assert "defcon" in guard.read()[0].rule
        guard.follow(Stance())
        assert inside(group, new) == REFUSED


def try_act(group: Path, act: str) -> int:
    """What the shim does with the words of a probe; its sockets do not block either."""
    verb, *words = act.split()
    if verb == "socket":
        return inside(group, lambda: socket.socket(*map(int, words)).close())
    family, kind, address, port = int(words[0]), int(words[1]), words[2], int(words[3])

    def do() -> None:
        with socket.socket(family, kind | socket.SOCK_NONBLOCK) as sock, suppress(BlockingIOError):
            if verb == "send":
                sock.sendto(b"x", (address, port))
            else:
                getattr(sock, verb)((address, port))

    return inside(group, do)


def test_verify_sees_a_guard_that_is_not_there(group: Path) -> None:
    """Verification passes with the programs attached and fails without: it is not a formality."""
    guard = net.load(plan(*RULES), enforce=True)

    def probe(act: str) -> int:
        return try_act(group, act)

    with pytest.raises(VerifyError):
        guard.verify(probe)
    with net.attach(group, guard):
        guard.verify(probe)
        assert guard.read() == []
        assert guard.counts().denied == 0


@pytest.mark.parametrize("missing", net.PROGRAMS)
def test_verify_sees_each_hook(missing: str, group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any one program not attached, in either family, verification fails."""
    attached = {kind: name for kind, name in net.PROGRAMS.items() if kind != missing}
    monkeypatch.setattr(net, "PROGRAMS", attached)
    guard = net.load(plan(*RULES), enforce=True)
    with net.attach(group, guard), pytest.raises(VerifyError, match=missing):
        guard.verify(lambda act: try_act(group, act))


@pytest.mark.parametrize("liar", ["connect 10", "send 10", "bind 10", "connect 2"])
def test_verify_counts_both_families(liar: str, group: Path) -> None:
    """An act that is refused by something else than the guard proves nothing."""
    guard = net.load(plan(*RULES), enforce=True)

    def probe(act: str) -> int:
        return EPERM if act.startswith(liar) else try_act(group, act)

    with net.attach(group, guard), pytest.raises(VerifyError, match="not counted"):
        guard.verify(probe)


@pytest.mark.parametrize("enforce", [True, False])
def test_the_heartbeat(enforce: bool, group: Path) -> None:
    """A beat is refused, and is not the agent's; without the program it fails."""
    guard = net.load(plan("*"), enforce=enforce)

    def probe(act: str) -> int:
        return try_act(group, act)

    if enforce:
        with pytest.raises(VerifyError, match="not refused"):
            guard.beat(lambda act: 0)
    with pytest.raises(VerifyError, match="not counted"):
        guard.beat(lambda act: EPERM)
    with net.attach(group, guard):
        guard.beat(probe)
        guard.beat(lambda act: EINVAL)  # not the guard's word: proves nothing, breaks nothing
        assert guard.counts().denied == 0
        assert guard.read() == []


# ---- what the system calls' hooks do not see --------------------------------------------------

LSRR = bytes([131, 7, 4]) + socket.inet_aton("127.0.0.9") + b"\0"  # one hop, then the end
IP_RETOPTS, IPV6_RTHDR = 7, 57
# Mobile IPv6 (RFC 6275): one address, the final one. Allowed once, where the kernel has it.
RTHDR2 = bytes([0, 2, 2, 1, 0, 0, 0, 0]) + socket.inet_pton(socket.AF_INET6, "::1")
# Segment routing (RFC 8754): to the second segment first; the kernel fills in the first.
SRH = bytes([0, 4, 4, 1, 1, 0, 0, 0]) + bytes(16) + socket.inet_pton(socket.AF_INET6, "::1")


def datagram(
    family: int,
    options: tuple[int, int, bytes] | None = None,
    ancillary: tuple[int, int, bytes] | None = None,
) -> Callable[[], object]:
    """A datagram to the allowed port, with something that a packet carries."""
    address = "127.0.0.1" if family == INET else "::1"

    def act() -> None:
        with socket.socket(family, UDP) as sock:
            if options:
                sock.setsockopt(*options)
            sock.sendmsg([b"x"], [ancillary] if ancillary else [], 0, (address, ALLOWED))

    return act


ROUTED = {
    "options": (datagram(INET, options=(socket.IPPROTO_IP, socket.IP_OPTIONS, LSRR)), "127.0.0.9"),
    "options once": (datagram(INET, ancillary=(socket.IPPROTO_IP, IP_RETOPTS, LSRR)), "127.0.0.9"),
    "header": (datagram(INET6, options=(socket.IPPROTO_IPV6, IPV6_RTHDR, SRH)), "[::1]"),
    "header once": (datagram(INET6, ancillary=(socket.IPPROTO_IPV6, IPV6_RTHDR, RTHDR2)), "[::1]"),
}


@pytest.mark.parametrize("name", ROUTED)
def test_routed_packets_are_refused(name: str, group: Path) -> None:
    """Source routes and routing headers, set once or for the socket; plain packets pass."""
    act, hop = ROUTED[name]
    plain = datagram(INET6 if "header" in name else INET)
    if inside(group, act) == EINVAL:
        pytest.skip("this kernel takes no such header")
    assert inside(group, act) == 0
    with net.attach(group, net.load(plan("127.0.0.0/8", "[::1]"), enforce=True)) as guard:
        assert inside(group, plain) == 0
        assert guard.read() == []
        assert inside(group, act) == EPERM
        events = guard.read()
        assert [event.kind for event in events] == ["net.route"]
        assert events[0].subject["destination"].startswith(hop)
        assert "IP options" in events[0].rule


def test_routed_connections_are_dropped(group: Path) -> None:
    """A connection with a source route gets no answer; without the guard it gets one."""

    def act() -> None:
        with socket.socket() as sock:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, LSRR)
            sock.settimeout(0.3)
            sock.connect(("127.0.0.1", ALLOWED))

    with capture() as sent:
        inside(group, act)
        assert "127.0.0.9" in sent()
    with net.attach(group, net.load(plan("127.0.0.0/8"), enforce=True)), capture() as sent:
        inside(group, act)
        assert "127.0.0.9" not in sent()
        inside(group, connect(INET, TCP, "127.0.0.9", ALLOWED))  # the control: we would see it
        assert "127.0.0.9" in sent()


@contextmanager
def capture() -> Iterator[Callable[[], set[str]]]:
    """The IPv4 addresses that packets on loopback have gone to."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)) as sock:
        sock.bind(("lo", 0x0800))
        sock.setblocking(False)

        def seen() -> set[str]:
            found = set()
            with suppress(BlockingIOError):
                while True:
                    found.add(socket.inet_ntoa(sock.recv(100)[16:20]))
            return found

        yield seen


@pytest.mark.parametrize(
    ("listen", "heard"), [((), False), (("loopback",), True), ((f"*:{OTHER}",), False)]
)
@pytest.mark.parametrize("bound", [None, "any", "loopback"])
@pytest.mark.parametrize("family", [INET, INET6])
def test_listening_without_a_port(
    family: int, bound: str | None, listen: tuple[str, ...], heard: bool, group: Path
) -> None:
    """A listener on a port that the kernel chose hears nobody unless a listen rule allows it."""
    loopback, anywhere = ("127.0.0.1", "0.0.0.0") if family == INET else ("::1", "::")
    address = {"any": anywhere, "loopback": loopback}.get(bound or "")
    with listener(group, family, address) as port:
        assert calls(family, loopback, port)  # the control: without the guard
    guard = net.load(plan("*", listen=listen), enforce=True)
    with net.attach(group, guard), listener(group, family, address) as port:
        assert [calls(family, loopback, port) for _ in range(3)] == [heard] * 3
        events = guard.read()
        told = [event.subject["destination"].rsplit(":", 1)[1] for event in events]
        assert told == ([] if heard else [str(port)])  # once, however many called
        assert {event.kind for event in events} == (set() if heard else {"net.bind"})


def test_a_listener_in_audit_mode_is_heard(group: Path) -> None:
    """Without enforcement the caller gets through, and the event says so."""
    guard = net.load(plan(), enforce=False)
    with net.attach(group, guard), listener(group, INET, None) as port:
        assert calls(INET, "127.0.0.1", port)
        assert [event.verdict for event in guard.read()] == [Verdict.AUDIT]


@contextmanager
def listener(group: Path, family: int, bound: str | None) -> Iterator[int]:
    """A process in the cgroup that listens until the end; its port."""
    said, says = os.pipe()
    ends, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        (group / "cgroup.procs").write_text("0")
        with socket.socket(family, TCP) as sock:
            if bound is not None:
                sock.bind((bound, 0))
            sock.listen()
            os.write(says, struct.pack("i", sock.getsockname()[1]))
            os.read(ends, 1)
        os._exit(0)
    os.close(ends)
    try:
        yield struct.unpack("i", os.read(said, 4))[0]
    finally:
        for fd in (said, says, end):
            os.close(fd)
        os.waitpid(pid, 0)


def calls(family: int, address: str, port: int) -> bool:
    """Whether somebody outside the cgroup is heard."""
    with socket.socket(family, TCP) as sock:
        sock.settimeout(0.2)
        return sock.connect_ex((address, port)) == 0


TOS = (socket.IPPROTO_IP, socket.IP_TOS, struct.pack("i", 0))
TCLASS = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("i", 0))
ANCILLARY = {
    "4": (INET, "127.0.0.1", TOS),
    "6": (INET6, "::1", TCLASS),
    "mapped": (INET6, "::ffff:127.0.0.1", TOS),
}


@pytest.mark.parametrize("name", ANCILLARY)
def test_ancillary_data_on_a_connected_socket(name: str, group: Path) -> None:
    """It goes to the peer and is judged as that, by the rules of the moment."""
    family, address, ancillary = ANCILLARY[name]
    mapped = address.removeprefix("::ffff:")
    rule = f"[{mapped}]" if ":" in mapped else mapped

    def act() -> None:
        with socket.socket(family, UDP) as sock:
            sock.connect((address, ALLOWED))
            sock.sendmsg([b"x"], [ancillary])

    with net.attach(group, net.load(plan(f"{rule}:{ALLOWED}"), enforce=True)) as guard:
        assert inside(group, act) == 0
        assert guard.read() == []


def test_ancillary_data_is_no_way_around(group: Path) -> None:
    """An address without a family is judged, not the peer; a peer allowed no more gets nothing."""
    guard = net.load(plan(f"127.0.0.1:{ALLOWED}"), enforce=True)

    def without_family() -> None:
        # udp_sendmsg takes AF_UNSPEC for AF_INET, so only the port says whether there is one.
        with socket.socket(INET, UDP) as sock:
            sock.connect(("127.0.0.1", ALLOWED))
            to = struct.pack("=H", 0) + struct.pack("!H4s8x", OTHER, socket.inet_aton("127.0.0.1"))
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.sendto(sock.fileno(), b"x", 1, 0, to, len(to)) < 0:
                raise OSError(ctypes.get_errno(), "sendto")

    def no_more() -> None:
        with socket.socket(INET, UDP) as sock:
            sock.connect(("127.0.0.1", ALLOWED))
            guard._parsed.clear()
            guard.update({})
            sock.sendmsg([b"x"], [TOS])

    assert inside(group, without_family) == 0
    with net.attach(group, guard):
        assert inside(group, without_family) == EPERM
        assert inside(group, no_more) == EPERM
        told = [event.subject["destination"] for event in guard.read()]
        assert told == [f"127.0.0.1:{OTHER}", f"127.0.0.1:{ALLOWED}"]


def test_a_flood_of_events_is_read_in_turns(group: Path) -> None:
    """One read has a bounded batch, the descriptor stays readable, and nothing is lost."""
    count = 3 * net.BATCH + 5

    def flood() -> None:
        with socket.socket(INET, UDP) as sock:
            for _ in range(count):
                with suppress(PermissionError):
                    sock.sendto(b"x", ("127.0.0.1", OTHER))

    with net.attach(group, net.load(plan(), enforce=True)) as guard:
        assert inside(group, flood) == 0
        batches = []
        while select.select([guard.fileno()], [], [], 0)[0]:
            batches.append(len(guard.read()))
        assert batches == [net.BATCH] * 3 + [5]
        assert inside(group, flood) == 0
        assert len(list(guard.rest())) == count
        assert guard.counts().denied == 2 * count
        assert guard.counts().events_lost == 0


def test_lost_events_are_told(group: Path) -> None:
    """What found the ring buffer full is told as a number: read and lost are all there were."""
    count = 5000

    def flood() -> None:
        with socket.socket(INET, UDP) as sock:
            for _ in range(count):
                with suppress(PermissionError):
                    sock.sendto(b"x", ("127.0.0.1", OTHER))

    with net.attach(group, net.load(plan(), enforce=True)) as guard:
        assert inside(group, flood) == 0
        events = [*guard.read(), *guard.rest()]
        lost = sum(event.subject["events"] for event in events if event.kind == "net.lost")
        assert lost == guard.counts().events_lost > 0
        assert len([event for event in events if event.kind == "net.send"]) + lost == count
        assert list(guard.rest()) == []


@given(st.binary(max_size=200))
def test_malformed_events_never_raise(raw: bytes) -> None:
    """Any bytes from the ring buffer give an event or nothing."""
    size = net_layout.EVENT.size
    for sample in (raw, raw.ljust(size, b"\xff")[:size]):
        net_events.read(sample, ("one", "default", "raised"))


# ---- XDP, packet by packet, through BPF_PROG_TEST_RUN ----------------------------------------

DROP, PASS = 1, 2


def run_xdp(guard: net.NetGuard, frame: bytes) -> int:
    """The verdict of the XDP program on one frame (bpf(2), BPF_PROG_TEST_RUN)."""
    source = ctypes.create_string_buffer(frame, len(frame))
    target = ctypes.create_string_buffer(2048)
    program = guard._object.program("mis_xdp")
    # prog_fd, retval, sizes in and out, data in and out, repeat: union bpf_attr.test.
    attributes = bytearray(
        struct.pack(
            "=IIIIQQII",
            *(program, 0, len(frame), 2048, ctypes.addressof(source), ctypes.addressof(target)),
            *(1, 0),
        )
    )
    raw = ctypes.create_string_buffer(bytes(attributes), len(attributes))
    libc._syscall(libc._BPF, 10, ctypes.addressof(raw), len(attributes))
    return int(struct.unpack_from("=I", raw.raw, 4)[0])


SOURCE4, SOURCE6 = "10.213.0.2", "fd6d:6973::2"


def packet(
    to: str,
    port: int,
    *,
    protocol: int = 17,
    source: str | None = None,
    fragment: int = 0,
    header: int = 0x45,
    ethertype: int | None = None,
) -> bytes:
    """One frame of the agent."""
    payload = struct.pack("!4H", 40000, port, 8, 0).ljust(64, b"\0")
    if ":" in to:
        ip = struct.pack(
            "!IHBB16s16s",
            *(0x60000000, len(payload), protocol, 64),
            *(socket.inet_pton(INET6, source or SOURCE6), socket.inet_pton(INET6, to)),
        )
        kind = 0x86DD
    else:
        ip = struct.pack(
            "!BBHHHBBH4s4s",
            *(header, 0, 20 + len(payload), 0, fragment, 64, protocol, 0),
            *(socket.inet_aton(source or SOURCE4), socket.inet_aton(to)),
        )
        kind = 0x0800
    return b"\x02" * 12 + struct.pack("!H", ethertype or kind) + ip + payload


@pytest.fixture
def xdp() -> Iterator[net.NetGuard]:
    allow = ("198.51.100.1:443", "198.51.100.1:53/udp", "[2001:db8::1]:443")
    guard = net.load(plan(*allow, mode=NetMode.GUARDED), enforce=True)
    guard._sources = (SOURCE4, SOURCE6)
    guard._configure()
    yield guard
    guard.close()


FRAMES = {
    "allowed udp": (packet("198.51.100.1", 443), PASS),
    "allowed tcp": (packet("198.51.100.1", 443, protocol=6), PASS),
    "allowed v6": (packet("2001:db8::1", 443), PASS),
    "udp only rule, udp": (packet("198.51.100.1", 53), PASS),
    "udp only rule, tcp": (packet("198.51.100.1", 53, protocol=6), DROP),
    "other port": (packet("198.51.100.1", 80), DROP),
    "other host": (packet("198.51.100.2", 443), DROP),
    "other host v6": (packet("2001:db8::2", 443), DROP),
    "forged source": (packet("198.51.100.1", 443, source="10.213.0.6"), DROP),
    "forged source v6": (packet("2001:db8::1", 443, source="fd6d:6973::6"), DROP),
    "icmp": (packet("198.51.100.1", 0, protocol=1), DROP),
    "sctp": (packet("198.51.100.1", 443, protocol=132), DROP),
    "first fragment": (packet("198.51.100.1", 443, fragment=0x2000), DROP),
    "later fragment": (packet("198.51.100.1", 443, fragment=0x0010), DROP),
    "options": (packet("198.51.100.1", 443, header=0x46), DROP),
    "v6 fragment header": (packet("2001:db8::1", 443, protocol=44), DROP),
    "v6 hop by hop": (packet("2001:db8::1", 443, protocol=0), DROP),
    "icmpv6": (packet("2001:db8::1", 443, protocol=58), DROP),
    "arp": (packet("198.51.100.1", 443, ethertype=0x0806), DROP),
    "vlan": (packet("198.51.100.1", 443, ethertype=0x8100), DROP),
    "short": (packet("198.51.100.1", 443)[:30], DROP),
    "canary": (packet(rules.CANARY4, 443), DROP),
    "canary v6": (packet(rules.CANARY6, 443), DROP),
    "metadata": (packet("169.254.169.254", 80), DROP),
    "another agent": (packet("10.213.0.6", 443), DROP),
}


@pytest.mark.parametrize("name", FRAMES)
def test_xdp(name: str, xdp: net.NetGuard) -> None:
    """What leaves the agent's interface meets the same rules; everything unreadable is dropped."""
    frame, verdict = FRAMES[name]
    assert run_xdp(xdp, frame) == verdict
    if verdict == DROP:
        assert xdp.counts().packets_dropped == 1
    else:
        assert xdp.counts().bytes_out == len(frame)


def test_a_flood_is_told_once_and_counted_fully(xdp: net.NetGuard) -> None:
    """A thousand packets to one forbidden place are one event and a thousand drops."""
    began = time.monotonic()
    for _ in range(1000):
        run_xdp(xdp, packet("198.51.100.9", 9))
    seconds = time.monotonic() - began
    assert xdp.counts().packets_dropped == 1000
    assert 1 <= len(xdp.read()) <= 1 + int(seconds)  # once a second, however slow the machine
