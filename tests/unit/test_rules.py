"""Network rules: what can be written, and that the compiled table means what the words mean."""

from __future__ import annotations

import contextlib
import ipaddress
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run import rules, table
from mis_run.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1:443", ("192.0.2.1/32", 443, 443, rules.TCP | rules.UDP)),
        ("192.0.2.1", ("192.0.2.1/32", 0, 65535, rules.TCP | rules.UDP)),
        ("10.0.0.0/8:5432-5440/tcp", ("10.0.0.0/8", 5432, 5440, rules.TCP)),
        ("[2001:db8::1]:53/udp", ("2001:db8::1/128", 53, 53, rules.UDP)),
        ("2001:db8::/32", ("2001:db8::/32", 0, 65535, rules.TCP | rules.UDP)),
        ("[2001:db8::/32]:80", ("2001:db8::/32", 80, 80, rules.TCP | rules.UDP)),
        ("*:80/tcp", ("::/0", 80, 80, rules.TCP)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int, int, int]) -> None:
    """Addresses, networks, ports and protocols are read as documented."""
    rule = rules.parse(text)
    assert (str(rule.network), rule.low, rule.high, rule.protocols) == expected


def test_names() -> None:
    """A name is a rule without a network, lower-cased, without its last dot."""
    rule = rules.parse("API.Example.com.:443/tcp")
    assert (rule.name, rule.network, rule.low) == ("api.example.com", None, 443)


@pytest.mark.parametrize(
    "text",
    ["", ":80", "x:", "x:0", "x:65536", "x:9-8", "x:8-", "1.2.3", "1.2.3.4.5", "[::1", "[::1]80"]
    + ["a b", "x:80/icmp", "-x", "x..y", "192.0.0.8:80", "100::1", "10.0.0.1/8", "x:٣"],
)
def test_what_cannot_be_read(text: str) -> None:
    """Anything else is a UsageError that repeats the words."""
    with pytest.raises(UsageError):
        rules.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_a_rule_or_a_usage_error(text: str) -> None:
    """No text makes the parser fail in any other way."""
    with contextlib.suppress(UsageError):
        rules.parse(text)
    with contextlib.suppress(UsageError):
        rules.parse_listen(text)


def judge(made: table.Table, address: str, port: int, bit: int) -> bool:
    """The verdict the BPF program takes from the table."""
    entry = table.lookup(made, address)
    return entry is not None and any(
        one.low <= port <= one.high and one.protocols & bit for one in entry.ports
    )


addresses = st.sampled_from(
    ["198.51.100.1", "198.51.100.77", "198.51.101.1", "203.0.113.9", "2001:db8::1", "2001:db8:1::1"]
)
networks = st.sampled_from(
    ["198.51.100.0/24", "198.51.100.0/25", "198.51.0.0/16", "198.51.100.77", "0.0.0.0/0", "*"]
    + ["[2001:db8::/32]", "[2001:db8:1::/48]", "[2001:db8::1]", "203.0.113.8/30"]
)
ports = st.sampled_from(["", ":80", ":443", ":80-90", ":1-1000/udp", ":443/tcp"])


@given(
    st.lists(st.tuples(networks, ports), max_size=6),
    addresses,
    st.sampled_from([1, 80, 85, 443, 1000, 8080]),
    st.sampled_from([rules.TCP, rules.UDP]),
)
def test_the_table_is_the_union_of_its_rules(
    words: list[tuple[str, str]], address: str, port: int, bit: int
) -> None:
    """Longest-prefix match on the compiled table equals asking every rule in turn."""
    parsed = [rules.parse(network + suffix) for network, suffix in words]
    made = table.compile(parsed, own_loopback=True)
    place = rules.key(ipaddress.ip_network(address))
    expected = any(
        rule.network is not None
        and rules.covers(rules.key(rule.network), place)
        and rule.low <= port <= rule.high
        and rule.protocols & bit
        for rule in parsed
    )
    assert judge(made, address, port, bit) == expected


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "127.0.0.1", "0.0.0.0", "224.0.0.1", "10.213.0.6", "192.0.2.7", "192.0.0.8"]
    + ["fe80::1", "::1", "ff02::1", "fd6d:6973::2", "100::1", "::ffff:169.254.169.254"],
)
def test_everywhere_is_not_the_host(address: str) -> None:
    """A rule for everywhere reaches neither the host, nor metadata, nor other agents."""
    made = table.compile([rules.parse("*"), rules.parse("0.0.0.0/0")], own_addresses=["192.0.2.7"])
    assert not judge(made, address, 80, rules.TCP)
    assert judge(made, "203.0.113.1", 80, rules.TCP)


def test_naming_the_host_allows_it() -> None:
    """A rule as specific as the denial overrides it, for its port only; the canary never."""
    parsed = [rules.parse("192.0.2.7:8080"), rules.parse("192.0.0.0/29")]
    made = table.compile(parsed, own_addresses=["192.0.2.7"])
    assert judge(made, "192.0.2.7", 8080, rules.TCP)
    assert not judge(made, "192.0.2.7", 22, rules.TCP)
    assert not judge(made, rules.CANARY4, 9, rules.UDP)


def test_a_name_cannot_point_at_the_host() -> None:
    """Addresses of names inside denied prefixes are ignored (DNS rebinding)."""
    parsed = [rules.parse("evil.example:80")]
    resolved = {"evil.example": ("127.0.0.1", "169.254.169.254", "192.0.2.7", "203.0.113.5")}
    made = table.compile(parsed, resolved=resolved, own_addresses=["192.0.2.7"])
    allowed = [a for a in resolved["evil.example"] if judge(made, a, 80, rules.TCP)]
    assert allowed == ["203.0.113.5"]


EVERYWHERE = ["*", "::/0", "[::/0]:80"]


@pytest.mark.parametrize(
    ("text", "four", "six"),
    [("*", True, True), ("::/0", False, True), ("[::/0]:80", False, True)]
    + [("0.0.0.0/0", True, False), ("::/64", False, False), ("::ffff:0:0/96", True, False)]
    + [("::ffff:203.0.113.0/120", True, False)],
)
def test_only_the_star_is_both_families(text: str, four: bool, six: bool) -> None:
    """A wide IPv6 rule says nothing of IPv4, though that lies inside it in the table."""
    made = table.compile([rules.parse(text)])
    assert judge(made, "203.0.113.1", 80, rules.TCP) == four
    assert judge(made, "::ffff:203.0.113.1", 80, rules.TCP) == four
    assert judge(made, "2001:db8::1", 80, rules.TCP) == six


def test_mapped_rules_are_ipv4() -> None:
    """However an IPv4 address is spelt in a rule, it is of that family."""
    assert rules.parse("[::ffff:192.0.2.1]:80").network == ipaddress.ip_network("192.0.2.1")
    assert rules.parse("[::ffff:192.0.2.1]:80").family == 4


@pytest.mark.parametrize("rule", EVERYWHERE)
@pytest.mark.parametrize(
    "hidden",
    ["169.254.169.254", "127.0.0.1", "10.213.0.6", "192.0.2.7", "0.0.0.0"],
)
def test_ipv4_inside_ipv6_is_not_the_host(rule: str, hidden: str) -> None:
    """Forms that a router unwraps reach nothing that the plain address does not."""
    made = table.compile([rules.parse(rule)], own_addresses=["192.0.2.7"])
    four = int(ipaddress.IPv4Address(hidden))
    forms = {
        "NAT64": int(ipaddress.IPv6Address("64:ff9b::")) | four,
        "local NAT64": int(ipaddress.IPv6Address("64:ff9b:1::")) | four,
        "6to4": int(ipaddress.IPv6Address("2002::")) | four << 80,
        "compatible": four,
        "translated": 0xFFFF << 48 | four,
    }
    for name, form in forms.items():
        assert not judge(made, str(ipaddress.IPv6Address(form)), 80, rules.TCP), name
    # The controls: what is not hidden, and what a rule names as exactly.
    assert judge(made, "64:ff9b::203.0.113.1", 80, rules.TCP)
    named = table.compile([rules.parse("[2002:a9fe:a9fe::1]:80")])
    assert judge(named, "2002:a9fe:a9fe::1", 80, rules.TCP)


def test_a_name_cannot_point_into_nat64_of_the_host() -> None:
    """A DNS64 answer is good, but for the host's own address behind it, unless a rule names it."""
    is_denied = table.denier([rules.parse("x.example:80")], ["192.0.2.7"])
    assert is_denied("64:ff9b::192.0.2.7")
    assert is_denied("2002:c000:207::1")
    assert not is_denied("64:ff9b::203.0.113.1")
    named = table.denier([rules.parse("[64:ff9b::192.0.2.7]:80")], ["192.0.2.7"])
    assert not named("64:ff9b::192.0.2.7")


def test_listening_on_every_address() -> None:
    """``0.0.0.0`` is every IPv4 address, ``[::]`` every address, as bind(2) means them."""
    four = table.compile(rules.parse_listen("0.0.0.0:80"), special={})
    both = table.compile(rules.parse_listen("[::]:80"), special={})
    assert judge(four, "192.0.2.7", 80, rules.TCP)
    assert not judge(four, "2001:db8::1", 80, rules.TCP)
    assert judge(both, "192.0.2.7", 80, rules.TCP)
    assert judge(both, "2001:db8::1", 80, rules.TCP)
    assert not judge(both, "192.0.2.7", 81, rules.TCP)


def test_many_addresses_cost_no_more_each() -> None:
    """Eight times the addresses take about eight times as long, not sixty-four times."""

    def seconds(count: int) -> float:
        first = int(ipaddress.ip_address("198.18.0.0"))
        found = {"many.example": [str(ipaddress.ip_address(first + n)) for n in range(count)]}
        began = time.process_time()
        assert len(table.compile([rules.parse("many.example")], resolved=found).entries) > count
        return time.process_time() - began

    seconds(500)
    assert min(seconds(4000) for _ in range(3)) < 24 * min(seconds(500) for _ in range(3))


def test_too_many_ports_for_one_address() -> None:
    """More port rules than a table entry holds are refused with a hint, not cut off."""
    parsed = [rules.parse(f"198.51.100.1:{port}") for port in range(1, 18)]
    with pytest.raises(UsageError, match="16 port rules"):
        table.compile(parsed)
