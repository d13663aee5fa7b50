"""Network rules: the user's words → the table that BPF looks up. Pure.

A rule is ``HOST[:PORT[-PORT]][/tcp|/udp]``; HOST is an address, a CIDR, a DNS name or ``*``.  The
kernel's longest-prefix-match trie returns one entry per address, so `compile` puts into each entry
the union of all rules that cover it.  IPv4 lives in the trie as ``::ffff:a.b.c.d``: a mapped
address and the plain one meet the same entry by construction.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mis_run.errors import UsageError

TCP, UDP = 1, 2  # bits of Port.protocols, as in bpf/mis.h
MOST_PORTS = 16  # ports of one entry, MIS_PORTS in bpf/mis.h
CANARY4, CANARY6 = "192.0.0.8", "100::1"
"""Never allowed: the IPv4 dummy address (RFC 7600) and the discard prefix (RFC 6666)."""

POOL4, POOL6 = "10.213.0.0/16", "fd6d:6973::/32"
"""The agents' own addresses (`network`)."""

# Denied unless a rule is at least as specific: prefix → the reason shown as the event's rule.
SPECIAL = {
    "0.0.0.0/8": "this host",
    "::/128": "this host",
    "127.0.0.0/8": "loopback",
    "::1/128": "loopback",
    "169.254.0.0/16": "link-local and cloud metadata",
    "fe80::/10": "link-local",
    "fd00:ec2::/32": "cloud metadata",
    "224.0.0.0/4": "multicast",
    "ff00::/8": "multicast",
    "255.255.255.255/32": "broadcast",
    POOL4: "another agent",
    POOL6: "another agent",
}
CANARIES = {f"{CANARY4}/32": "canary", f"{CANARY6}/128": "canary"}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)(\.[a-z0-9_-]{1,63})*")
_HINT = "use HOST[:PORT[-PORT]][/tcp|/udp], IPv6 with a port as [ADDR]:PORT"


@dataclass(frozen=True, slots=True)
class Port:
    """A range of ports and its protocols (bits), with the index of the rule it came from."""

    low: int
    high: int
    protocols: int
    rule: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One parsed rule; exactly one of ``network`` and ``name`` is set. ``*`` is ``::/0``."""

    text: str
    network: Network | None
    name: str | None
    low: int
    high: int
    protocols: int

    @property
    def family(self) -> int:
        """4, 6, or 0 when it can be either."""
        if self.network is None or self.text.startswith("*"):
            return 0
        return self.network.version


@dataclass(frozen=True, slots=True)
class Entry:
    """What an address under one prefix may do. ``reason`` is the rule index of its denial."""

    ports: tuple[Port, ...]
    reason: int


@dataclass(frozen=True)
class Table:
    """The compiled trie: (prefix length of 128, 16 address bytes) → Entry, and the rules' texts."""

    entries: Mapping[tuple[int, bytes], Entry]
    texts: tuple[str, ...]


def parse(text: str) -> Rule:
    """One rule. Raises UsageError with a hint."""
    host, low, high, protocols = _split(text)
    if host == "*":
        return Rule(text, ipaddress.ip_network("::/0"), None, low, high, protocols)
    network = _network(host)
    if network is not None:
        for canary in (CANARY4, CANARY6):
            if network.prefixlen == network.max_prefixlen and host == canary:
                raise UsageError(f"network rule {text!r}: {canary} is the canary, always denied")
        return Rule(text, network, None, low, high, protocols)
    name = host.lower().rstrip(".")
    if re.fullmatch(r"[0-9.]+", name) or not _NAME.fullmatch(name):
        raise UsageError(f"network rule {text!r}: {host!r} is no address and no name", hint=_HINT)
    return Rule(text, None, name, low, high, protocols)


def parse_listen(text: str) -> tuple[Rule, ...]:
    """A ``listen`` rule: as `parse` without names, or the word ``loopback``."""
    head, colon, rest = text.partition("loopback")
    if not head and colon:
        return tuple(parse(f"{network}{rest}") for network in ("127.0.0.0/8", "[::1]"))
    rule = parse(text)
    if rule.name is not None:
        raise UsageError(
            f"listen rule {text!r}: needs an address", hint="use loopback, *, *:PORT or ADDR:PORT"
        )
    return (rule,)


def _split(text: str) -> tuple[str, int, int, int]:
    """Host, first port, last port, protocol bits."""
    rest, protocols = text.strip(), TCP | UDP
    for suffix, bits in (("/tcp", TCP), ("/udp", UDP)):
        if rest.endswith(suffix):
            rest, protocols = rest.removesuffix(suffix), bits
    ports = ""
    if rest.startswith("["):
        host, closed, ports = rest[1:].partition("]")
        if not closed or (ports and not ports.startswith(":")):
            raise UsageError(f"network rule {text!r}: unclosed bracket", hint=_HINT)
        # [fd00::]/8:443 and [fd00::/8]:443 would both be guesses; only the latter is read.
        ports = ports[1:] if ports else ""
    elif rest.count(":") == 1:
        host, _, ports = rest.partition(":")
        if not ports:
            raise UsageError(f"network rule {text!r}: no port after ':'", hint=_HINT)
    else:
        host = rest
    if not host:
        raise UsageError(f"network rule {text!r}: no host", hint=_HINT)
    low, high = _ports(ports, text)
    return host, low, high, protocols


def _ports(ports: str, text: str) -> tuple[int, int]:
    if ports in ("", "*"):
        return 0, 65535
    low, dash, high = ports.partition("-")
    if not (low.isascii() and low.isdecimal()) or (dash and not high.isdecimal()):
        raise UsageError(f"network rule {text!r}: port {ports!r} is no number", hint=_HINT)
    first, last = int(low), int(high or low)
    if not 1 <= first <= last <= 65535:
        raise UsageError(f"network rule {text!r}: ports go from 1 to 65535", hint=_HINT)
    return first, last


def _network(host: str) -> Network | None:
    try:
        return ipaddress.ip_network(host)
    except ValueError as error:
        if "has host bits set" in str(error):
            shown = ipaddress.ip_network(host, strict=False)
            raise UsageError(
                f"network rule: {host} has host bits set", hint=f"did you mean {shown}?"
            ) from None
        return None


def key(network: Network) -> tuple[int, bytes]:
    """Where a network lies in the trie."""
    if isinstance(network, ipaddress.IPv4Network):
        return 96 + network.prefixlen, b"\0" * 10 + b"\xff\xff" + network.network_address.packed
    return network.prefixlen, network.network_address.packed


def covers(wide: tuple[int, bytes], narrow: tuple[int, bytes]) -> bool:
    """Whether every address of ``narrow`` lies in ``wide``."""
    length, bits = wide
    if length > narrow[0]:
        return False
    shift = 128 - length
    return int.from_bytes(bits, "big") >> shift == int.from_bytes(narrow[1], "big") >> shift


def compile(
    rules: Sequence[Rule],
    *,
    resolved: Mapping[str, Iterable[str]] | None = None,
    own_addresses: Iterable[str] = (),
    own_loopback: bool = False,
    special: Mapping[str, str] = SPECIAL,
) -> Table:
    """The table for ``rules``; the index of a rule is its place in ``rules``.

    ``resolved`` gives the present addresses of names; one inside a denied prefix is left out, so
    that a name cannot be pointed at the host (DNS rebinding).  ``own_addresses`` are the host's.
    ``special`` are the prefixes denied by themselves (none for listening rules).
    ``own_loopback``: the agent has a network namespace of its own, where loopback is its own.
    Raises UsageError when one address would have more than MOST_PORTS port rules.
    """
    special = {**special, **dict.fromkeys(own_addresses, "the host itself")}
    texts = [rule.text for rule in rules]
    denied: dict[tuple[int, bytes], int] = {}
    for prefix, reason in {**special, **CANARIES}.items():
        denied[key(ipaddress.ip_network(prefix))] = len(texts)
        texts.append(f"builtin: {reason}")
    canaries = {key(ipaddress.ip_network(prefix)) for prefix in CANARIES}
    allowed: list[tuple[tuple[int, bytes], Port]] = []
    for index, rule in enumerate(rules):
        port = Port(rule.low, rule.high, rule.protocols, index)
        if rule.network is not None:
            allowed.append((key(rule.network), port))
        for address in (resolved or {}).get(rule.name or "", ()):
            place = key(ipaddress.ip_network(address))
            if not any(covers(prefix, place) for prefix in denied):
                allowed.append((place, port))
    if own_loopback:
        everything = Port(0, 65535, TCP | UDP, len(texts))
        texts.append("builtin: own loopback")
        for prefix in ("127.0.0.0/8", "0.0.0.0/32", "::1/128", "::/128"):
            allowed.append((key(ipaddress.ip_network(prefix)), everything))
    default = len(texts)
    texts.append("default")
    entries = {}
    for place in {*denied, *(place for place, _ in allowed)}:
        above = [prefix for prefix in denied if covers(prefix, place)]
        floor = max((prefix[0] for prefix in above), default=-1)
        ports = {port for prefix, port in allowed if prefix[0] >= floor and covers(prefix, place)}
        if place in canaries:
            ports = set()
        if len(ports) > MOST_PORTS:
            shown = texts[next(iter(ports)).rule]
            raise UsageError(
                f"network rule {shown!r}: more than {MOST_PORTS} port rules for one address",
                hint="use port ranges",
            )
        why = denied[max(above)] if above else default
        ordered = tuple(sorted(ports, key=lambda port: (port.rule, port.low)))
        entries[place] = Entry(ordered, why)
    return Table(entries, tuple(texts))


def lookup(table: Table, address: str) -> Entry | None:
    """What the kernel's trie would return for one address; for tests and for explanations."""
    place = key(ipaddress.ip_network(address))
    found = [prefix for prefix in table.entries if covers(prefix, place)]
    return table.entries[max(found)] if found else None
