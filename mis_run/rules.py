"""Network rules: the user's words → `Rule`. Pure. `table` compiles them for BPF.

A rule is ``HOST[:PORT[-PORT]][/tcp|/udp]``; HOST is an address, a CIDR, a DNS name or ``*``.
"""

from __future__ import annotations

import ipaddress
import re

from mis_run.dataclass import dataclass, replace
from mis_run.errors import UsageError

TCP, UDP = 1, 2  # bits of Port.protocols, as in bpf/mis.h
CANARY4, CANARY6 = "192.0.0.8", "100::1"
"""Never allowed: the IPv4 dummy address (RFC 7600) and the discard prefix (RFC 6666)."""

CANARY_OUT, CANARY_IN = "127.192.0.8", "127.192.0.9"
"""Never allowed either: for hooks that see packets, which only a local address makes travel."""

CANARIES = (CANARY4, CANARY6, CANARY_OUT, CANARY_IN)

POOL4, POOL6 = "10.213.0.0/16", "fd6d:6973::/32"
"""The agents' own addresses (`network`)."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Place = tuple[int, bytes]
"""Where a network lies in the trie: bits of its prefix, 16 bytes of address."""

IPV4: Place = (96, b"\0" * 10 + b"\xff\xff" + b"\0" * 4)
_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)(\.[a-z0-9_-]{1,63})*")
_HINT = "use HOST[:PORT[-PORT]][/tcp|/udp], IPv6 with a port as [ADDR]:PORT"


@dataclass(frozen=True)
class Rule:
    """One parsed rule; exactly one of ``network`` and ``name`` is set. ``*`` is ``::/0``."""

    text: str
    network: Network | None
    name: str | None
    low: int
    high: int
    protocols: int

    @property
    def everywhere(self) -> bool:
        """Whether this is ``*``: unlike ``::/0`` it is about IPv4 too."""
        return self.text.strip().startswith("*")

    @property
    def family(self) -> int:
        """4, 6, or 0 when it can be either."""
        return 0 if self.network is None or self.everywhere else self.network.version

    def places(self) -> tuple[Place, ...]:
        """Where in the trie it is about; nowhere when it is a name."""
        if self.network is None:
            return ()
        return (key(self.network), IPV4) if self.everywhere else (key(self.network),)


def parse(text: str) -> Rule:
    """One rule. Raises UsageError with a hint."""
    host, low, high, protocols = _split(text)
    if host == "*":
        return Rule(text, ipaddress.ip_network("::/0"), None, low, high, protocols)
    network = _network(host)
    if network is not None:
        for canary in CANARIES:
            if network.prefixlen == network.max_prefixlen and host == canary:
                raise UsageError(f"network rule {text!r}: {canary} is the canary, always denied")
        return Rule(text, network, None, low, high, protocols)
    name = host.lower().rstrip(".")
    if re.fullmatch(r"[0-9.]+", name) or not _NAME.fullmatch(name):
        raise UsageError(f"network rule {text!r}: {host!r} is no address and no name", hint=_HINT)
    return Rule(text, None, name, low, high, protocols)


def parse_listen(text: str) -> tuple[Rule, ...]:
    """A ``listen`` rule: as `parse` without names, or the word ``loopback``.

    ``0.0.0.0`` and ``[::]`` are every address of the family, as in bind(2), where the latter is
    both families.
    """
    head, colon, rest = text.partition("loopback")
    if not head and colon:
        return tuple(parse(f"{network}{rest}") for network in ("127.0.0.0/8", "[::1]"))
    rule = parse(text)
    if rule.name is not None:
        raise UsageError(
            f"listen rule {text!r}: needs an address", hint="use loopback, *, *:PORT or ADDR:PORT"
        )
    if rule.network == ipaddress.ip_network("0.0.0.0"):
        return (replace(rule, network=ipaddress.ip_network("0.0.0.0/0")),)
    if rule.network == ipaddress.ip_network("::"):
        everywhere = replace(rule, network=ipaddress.ip_network("::/0"))
        return (everywhere, replace(rule, network=ipaddress.ip_network("0.0.0.0/0")))
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
        network = ipaddress.ip_network(host, strict=False)
    except ValueError:
        return None
    if ipaddress.ip_interface(host).ip != network.network_address:
        raise UsageError(f"network rule: {host} has host bits set", hint=f"did you mean {network}?")
    return _unmapped(network)


def _unmapped(network: Network) -> Network:
    """``::ffff:a.b.c.d/96+n`` is IPv4, however it is spelt."""
    if network.version == 6 and covers(IPV4, key(network)):
        packed = network.network_address.packed[12:]
        return ipaddress.IPv4Network((packed, network.prefixlen - 96))
    return network


def key(network: Network) -> Place:
    """Where a network lies in the trie."""
    if isinstance(network, ipaddress.IPv4Network):
        return 96 + network.prefixlen, b"\0" * 10 + b"\xff\xff" + network.network_address.packed
    return network.prefixlen, network.network_address.packed


def covers(wide: Place, narrow: Place) -> bool:
    """Whether every address of ``narrow`` lies in ``wide``."""
    length, bits = wide
    if length > narrow[0]:
        return False
    shift = 128 - length
    return int.from_bytes(bits, "big") >> shift == int.from_bytes(narrow[1], "big") >> shift
