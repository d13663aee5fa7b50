"""Looking names up: /etc/hosts, upstream DNS servers, and answers on the wire.

dnspython does the messages; it is imported late, since most launches have no names in their rules.
Out of scope: who may ask for what (`names`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mis_run.errors import UsageError

TTL_FLOOR, TTL_CEILING = 5.0, 3600.0  # seconds
TIMEOUT = 2.0  # seconds for one upstream server
HOSTS = Path("/etc/hosts")
RESOLV_CONF = Path("/etc/resolv.conf")


def response(
    query: Any, addresses: Sequence[str] = (), ttl: int = 0, rcode: str = "NOERROR"
) -> bytes:
    """The wire form of an answer, with the addresses of the kind that was asked for."""
    import dns.flags
    import dns.message
    import dns.rcode
    import dns.rdatatype
    import dns.rrset

    response = dns.message.make_response(query, recursion_available=True)
    response.set_rcode(dns.rcode.from_text(rcode))
    question = query.question[0]
    kinds = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}
    wanted = kinds.get(question.rdtype)
    fitting = [a for a in addresses if ipaddress.ip_address(a).version == wanted]
    if fitting:
        kind = dns.rdatatype.to_text(question.rdtype)
        response.answer.append(dns.rrset.from_text(question.name, ttl, "IN", kind, *fitting))
    wire: bytes = response.to_wire(max_size=65535)
    return wire


def resolve(
    text: str, resolvers: Sequence[tuple[str, int]], *, ipv6: bool
) -> tuple[tuple[str, ...] | None, float]:
    """Addresses of a name and their TTL in seconds; (None, 0) when no server answered.

    /etc/hosts is asked first, as everywhere.  An authoritative "no such name" is an empty answer.
    """
    import dns.exception
    import dns.message
    import dns.query
    import dns.rcode
    import dns.rdatatype

    if local := from_hosts(text):
        return local, 60.0
    found: list[str] = []
    ttl = TTL_CEILING
    answered = False
    for kind in ("A", "AAAA") if ipv6 else ("A",):
        query = dns.message.make_query(text, kind)
        for address, port in resolvers:  # in their order, as resolv.conf(5) says
            try:
                answer, _ = dns.query.udp_with_fallback(query, address, TIMEOUT, port)
            except (dns.exception.DNSException, OSError, ValueError):
                continue
            if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                continue
            answered = True
            for rrset in answer.answer:
                ttl = min(ttl, float(rrset.ttl))
                if rrset.rdtype == dns.rdatatype.from_text(kind):
                    found += [str(record.address) for record in rrset]
            break
    if not answered:
        return None, 0.0
    return tuple(dict.fromkeys(found)), ttl if found else TTL_FLOOR


def from_hosts(text: str) -> tuple[str, ...]:
    """Addresses of a name in /etc/hosts."""
    found = []
    with suppress(OSError):
        for line in HOSTS.read_text(errors="replace").splitlines():
            words = line.partition("#")[0].split()
            if text in (word.lower() for word in words[1:]):
                with suppress(ValueError):
                    found.append(str(ipaddress.ip_address(words[0])))
    return tuple(found)


def upstream(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Servers to ask: the profile's (``ADDR[:PORT]``), else the host's. Raises UsageError."""
    found = []
    for text in texts:
        host, port = text, "53"
        if text.startswith("["):
            host, _, port = text[1:].partition("]")
            port = port.lstrip(":") or "53"
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        try:
            found.append((str(ipaddress.ip_address(host)), int(port)))
        except ValueError:
            raise UsageError(f"resolver {text!r}: use ADDR or ADDR:PORT") from None
    if not found:
        with suppress(OSError):
            for line in RESOLV_CONF.read_text(errors="replace").splitlines():
                words = line.split()
                if words[:1] == ["nameserver"] and len(words) > 1:
                    with suppress(ValueError):
                        address = ipaddress.ip_address(words[1].partition("%")[0])
                        found.append((str(address), 53))
    return found
