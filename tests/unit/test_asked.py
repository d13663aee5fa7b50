"""The agent's questions: bytes that it may forge, answers that fit, addresses that stay a while."""

from __future__ import annotations

import selectors
import socket
import struct
import time

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run import asked, known, resolve


def ask(name: str, kind: str = "A", **more: object) -> bytes:
    """A well-formed question."""
    return dns.message.make_query(name, kind, **more).to_wire()  # type: ignore[arg-type]


def sent(data: bytes, *, datagram: bool = True) -> tuple[asked.Question | None, list[bytes]]:
    """What is read from the bytes, and what is answered at once."""
    answers: list[bytes] = []
    return asked.question(data, answers.append, datagram=datagram), answers


@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_raise(data: bytes, datagram: bool) -> None:
    """Whatever the agent sends is a question, or none."""
    sent(data, datagram=datagram)
    sent(ask("api.example")[:12] + data, datagram=datagram)


def test_names_are_compared_in_lower_case() -> None:
    """The name is lower-case without its last dot; the control: another one is another."""
    found, answers = sent(ask("API.Example."))
    assert found is not None
    assert found.name == "api.example"
    assert answers == []


def test_other_classes_are_refused_at_once() -> None:
    """``version.bind`` in class CHAOS is answered, with a refusal; an answer is no question."""
    found, answers = sent(ask("version.bind", "TXT", rdclass="CH"))
    assert found is None
    assert dns.message.from_wire(answers[0]).rcode() == dns.rcode.REFUSED
    reply = dns.message.make_response(dns.message.make_query("api.example", "A")).to_wire()
    assert sent(reply) == (None, [])


@pytest.mark.parametrize(("datagram", "truncated"), [(True, True), (False, False)])
def test_what_does_not_fit_says_ask_by_tcp(datagram: bool, truncated: bool) -> None:
    """Sixty addresses do not fit into 512 bytes of UDP; by TCP they do."""
    found, answers = sent(ask("api.example"), datagram=datagram)
    assert found is not None
    found.send(b"")
    found.answer([f"192.0.2.{n}" for n in range(60)], 60)
    reply = dns.message.from_wire(answers[1])
    assert bool(reply.flags & dns.flags.TC) == truncated
    assert bool(reply.answer) != truncated
    assert len(answers[1]) <= (512 if datagram else 65535)


def test_only_the_kind_asked_for_is_answered() -> None:
    """An A question gets no IPv6 address."""
    found, answers = sent(ask("api.example", "A"))
    assert found is not None
    found.answer(["192.0.2.1", "2001:db8::1"], 60)
    assert "2001:db8" not in str(dns.message.from_wire(answers[0]))
    assert "192.0.2.1" in str(dns.message.from_wire(answers[0]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("1.2.0.192.in-addr.arpa", "192.0.2.1"), ("x.in-addr.arpa", None), ("api.example", None)],
)
def test_backwards(name: str, expected: str | None) -> None:
    """The address in a reverse name, and nothing in any other."""
    found = asked.backwards(name)
    assert (str(found) if found else None) == expected


def test_the_desk_survives_what_clients_do() -> None:
    """Half a question, none, and too many connections: the next good one is answered."""
    with (
        selectors.DefaultSelector() as chosen,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        desk = asked.Desk(chosen, [server], lambda question: question.answer(["192.0.2.1"], 5))

        def turn() -> None:
            for _ in range(8):
                for key, _ in chosen.select(0.02):
                    key.data()

        def connect() -> socket.socket:
            return socket.create_connection(server.getsockname())

        half = connect()
        half.send(b"\0")
        idle = [connect() for _ in range(asked.MOST_CLIENTS + 3)]
        gone = connect()
        gone.close()
        for _ in range(12):
            turn()
        assert desk.next() is not None
        for one in (half, *idle):
            one.close()
        for _ in range(12):
            turn()
        with connect() as good:
            good.settimeout(2)
            data = ask("api.example")
            good.send(struct.pack("!H", len(data)) + data)
            turn()
            assert "192.0.2.1" in str(dns.message.from_wire(good.recv(2000)[2:]))
        desk.close()


def test_addresses_that_left_stay_a_while() -> None:
    """What is not in the answer any more is allowed for the grace, then gone for good."""
    name = known.Name()
    name.learn(("192.0.2.1", "192.0.2.2"), 5)
    name.learn(("192.0.2.2",), 5)
    now = time.monotonic()
    assert not name.expire(now)
    assert list(name.leaving) == ["192.0.2.1"]
    assert name.expire(now + known.GRACE + 1)
    assert name.leaving == {}
    assert name.addresses == ("192.0.2.2",)


def test_one_name_has_not_all_of_the_table() -> None:
    """However many addresses an answer has, a name takes its share only."""
    name = known.Name()
    for first in range(5):
        name.learn(tuple(f"192.0.{first}.{n}" for n in range(200)), 5)
    assert len(name.addresses) == len(name.leaving) == known.MOST_ADDRESSES


def test_failures_are_retried_less_and_less() -> None:
    """The pause doubles up to a bound, and addresses stay meanwhile; an answer resets it."""
    name = known.Name()
    name.learn(("192.0.2.1",), 5)
    pauses = []
    for _ in range(20):
        name.fail()
        pauses.append(round(name.expires - time.monotonic()))
    assert pauses[:3] == [5, 10, 20]
    assert pauses[-1] == known.RETRY_MOST
    assert name.addresses == ("192.0.2.1",)
    name.learn(("192.0.2.1",), 5)
    assert name.failures == 0


@pytest.mark.parametrize(("length", "found"), [(1, True), (3, True), (20, False)])
def test_aliases_are_followed_so_far(
    length: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alias may need a question of its own; a chain without end is no answer."""

    def query(name: str, kind: str, _: object) -> dns.message.Message:
        reply = dns.message.make_response(dns.message.make_query(name, kind))
        number = int(name[1:].partition(".")[0])
        last = number == length
        data = "192.0.2.1" if last else f"n{number + 1}.example."
        reply.answer.append(
            dns.rrset.from_text(
                reply.question[0].name, 60 - number, "IN", "A" if last else "CNAME", data
            )
        )
        return dns.message.from_wire(reply.to_wire())

    monkeypatch.setattr(resolve, "_query", query)
    addresses, ttl = resolve.resolve("n0.example", [("192.0.2.53", 53)], ipv6=False)
    if found:
        assert addresses == ("192.0.2.1",)
        assert ttl == 60 - length  # the shortest of the chain
    else:
        assert addresses is None
