"""Network rules, compiled: the table that BPF looks up, and what is denied by itself. Pure.

The kernel's longest-prefix-match trie returns one entry per address, so `compile` puts into each
entry the union of all rules that cover it.  IPv4 lives in the trie as ``::ffff:a.b.c.d``: a mapped
address and the plain one meet the same entry by construction.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mis_run.dataclass import dataclass
from mis_run.errors import UsageError
from mis_run.hints import Generic, TypeVar
from mis_run.rules import CANARIES, IPV4, POOL4, POOL6, TCP, UDP, Place, Rule, covers, key

T = TypeVar("T")
MOST_PORTS = 16  # ports of one entry, MIS_PORTS in bpf/mis.h

# Denied unless a rule is at least as specific: prefix → the reason shown as the event's rule.
SPECIAL = {
    "0.0.0.0/8": "this host",
    "::/128": "this host",
    "127.0.0.0/8": "loopback",
    "::1/128": "loopback",
    "169.254.0.0/16": "link-local and cloud metadata",
    "fe80::/10": "link-local",
    # Forms of IPv4 addresses that a router may unwrap, towards places denied above.
    "::/96": "IPv4-compatible address",
    "::ffff:0:0:0/96": "IPv4-translated address",
    "64:ff9b:1::/48": "local NAT64",
    "2001::/32": "Teredo",
    "2002::/16": "6to4",
    "fd00:ec2::/32": "cloud metadata",
    "224.0.0.0/4": "multicast",
    "ff00::/8": "multicast",
    "255.255.255.255/32": "broadcast",
    POOL4: "another agent",
    POOL6: "another agent",
}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Where an IPv6-only network finds IPv4 (RFC 6052): only the denied part of it is denied."""


@dataclass(frozen=True)
class Port:
    """A range of ports and its protocols (bits), with the index of the rule it came from."""

    low: int
    high: int
    protocols: int
    rule: int


@dataclass(frozen=True)
class Entry:
    """What an address under one prefix may do. ``reason`` is the rule index of its denial."""

    ports: tuple[Port, ...]
    reason: int


@dataclass(frozen=True)
class Table:
    """The compiled trie: (prefix length of 128, 16 address bytes) → Entry, and the rules' texts."""

    entries: Mapping[Place, Entry]
    texts: tuple[str, ...]


class Prefixes(Generic[T]):
    """Values by place. What lies above a place costs one look-up for each prefix length in use."""

    def __init__(self, items: Iterable[tuple[Place, T]]) -> None:
        self._levels: dict[int, dict[int, list[T]]] = {}
        for (length, bits), value in items:
            level = self._levels.setdefault(length, {})
            level.setdefault(int.from_bytes(bits, "big") >> 128 - length, []).append(value)

    def above(self, place: Place) -> Iterator[tuple[int, T]]:
        """(prefix length, value) of everything that covers ``place``."""
        length, bits = place[0], int.from_bytes(place[1], "big")
        for level, values in self._levels.items():
            if level <= length:
                for value in values.get(bits >> 128 - level, ()):
                    yield level, value


def denied(own_addresses: Iterable[str], special: Mapping[str, str] = SPECIAL) -> dict[Place, str]:
    """Places denied by themselves, canaries included, and why. What is IPv4, also through NAT64."""
    found: dict[Place, str] = {}
    for text, reason in {**special, **dict.fromkeys(own_addresses, "the host itself")}.items():
        network = ipaddress.ip_network(text)
        found[key(network)] = reason
        if isinstance(network, ipaddress.IPv4Network):
            through = int(NAT64.network_address) + int(network.network_address)
            length = NAT64.prefixlen + network.prefixlen
            found[length, through.to_bytes(16, "big")] = f"{reason}, by NAT64"
    return found | {key(ipaddress.ip_network(address)): "canary" for address in CANARIES}


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
    texts = [rule.text for rule in rules]
    reasons = {}
    for place, reason in denied(own_addresses, special).items():
        reasons[place] = len(texts)
        texts.append(f"builtin: {reason}")
    walls = Prefixes(reasons.items())
    allowed: list[tuple[Place, Port]] = []
    for index, rule in enumerate(rules):
        port = Port(rule.low, rule.high, rule.protocols, index)
        allowed += [(place, port) for place in rule.places()]
        for address in (resolved or {}).get(rule.name or "", ()):
            place = key(ipaddress.ip_network(address))
            if not any(walls.above(place)):
                allowed.append((place, port))
    if own_loopback:
        everything = Port(0, 65535, TCP | UDP, len(texts))
        texts.append("builtin: own loopback")
        for prefix in ("127.0.0.0/8", "0.0.0.0/32", "::1/128", "::/128"):
            allowed.append((key(ipaddress.ip_network(prefix)), everything))
    default = len(texts)
    texts.append("default")
    canaries = {key(ipaddress.ip_network(address)) for address in CANARIES}
    granted = Prefixes(allowed)
    entries = {}
    for place in {IPV4, *reasons, *(place for place, _ in allowed)}:
        # A rule wider than the innermost wall is not about this place. All of IPv4 is behind one.
        outside = (IPV4[0] if covers(IPV4, place) else -1, default)
        floor, why = max((*walls.above(place), outside))
        ports = {port for length, port in granted.above(place) if length >= floor}
        if place in canaries:
            ports = set()
        if len(ports) > MOST_PORTS:
            shown = texts[next(iter(ports)).rule]
            raise UsageError(
                f"network rule {shown!r}: more than {MOST_PORTS} port rules for one address",
                hint="use port ranges",
            )
        ordered = tuple(sorted(ports, key=lambda port: (port.rule, port.low)))
        entries[place] = Entry(ordered, why)
    return Table(entries, tuple(texts))


def denier(rules: Iterable[Rule], own_addresses: Iterable[str]) -> Callable[[str], bool]:
    """Whether a name may not point to an address.

    It may not where the address is denied by itself, unless a rule names that at least as exactly;
    the name then opens no port that the rule does not.
    """
    walls = Prefixes(denied(own_addresses).items())
    named = Prefixes((place, None) for rule in rules for place in rule.places())

    def is_denied(address: str) -> bool:
        place = key(ipaddress.ip_network(address))
        wall = max((length for length, _ in walls.above(place)), default=-1)
        return wall > max((length for length, _ in named.above(place)), default=-1)

    return is_denied


def lookup(table: Table, address: str) -> Entry | None:
    """What the kernel's trie would return for one address; for tests and for explanations."""
    place = key(ipaddress.ip_network(address))
    found = [prefix for prefix in table.entries if covers(prefix, place)]
    return table.entries[max(found)] if found else None
