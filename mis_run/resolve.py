"""Looking names up for an agent's rules: /etc/hosts, then upstream DNS servers.

dnspython does the messages (random ids and ports, source and question checked); it is imported
late, since most launches never ask.  Out of scope: who may ask for what (`names`).
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mis_run.errors import UsageError
from mis_run.hints import Any

TTL_FLOOR, TTL_CEILING = 5.0, 3600.0  # seconds
TIMEOUTS = (1.0, 2.0)  # seconds for one server, first and second round
MOST_ALIASES = 8  # CNAMEs that are followed by questions of our own
HOSTS = Path("/etc/hosts")
RESOLV_CONF = Path("/etc/resolv.conf")


def resolve(
    text: str, resolvers: Sequence[tuple[str, int]], *, ipv6: bool
) -> tuple[tuple[str, ...] | None, float]:
    """Addresses of a name and their TTL in seconds; (None, 0) when no server answered.

    /etc/hosts is asked first, as everywhere.  An authoritative "no such name" is an empty answer.
    Where only one of A and AAAA was answered, what there is counts, for the shortest time.
    """
    if local := from_hosts(text):
        return local, 60.0
    answers: dict[str, tuple[tuple[str, ...], float] | None] = {}

    def ask(kind: str) -> None:
        answers[kind] = _ask(text, kind, resolvers)

    other = threading.Thread(target=ask, args=("AAAA",), daemon=True)
    if ipv6:
        other.start()
    ask("A")
    if ipv6:
        other.join()
    answered = [answer for answer in answers.values() if answer is not None]
    found = tuple(dict.fromkeys(address for addresses, _ in answered for address in addresses))
    if not found and len(answered) < len(answers):
        return None, 0.0
    ttl = min((ttl for addresses, ttl in answered if addresses), default=TTL_FLOOR)
    return found, ttl if len(answered) == len(answers) else TTL_FLOOR


def _ask(
    text: str, kind: str, resolvers: Sequence[tuple[str, int]]
) -> tuple[tuple[str, ...], float] | None:
    """Addresses of one kind and their TTL, through aliases; None when no server answered."""
    import dns.exception
    import dns.rdatatype

    name, ttl = text, TTL_CEILING
    for _ in range(MOST_ALIASES):
        answer = _query(name, kind, resolvers)
        if answer is None:
            return None
        try:
            chain = answer.resolve_chaining()
        except dns.exception.DNSException:  # a loop, an answer to a name that does not exist
            return None
        ttl = min(ttl, float(chain.minimum_ttl))
        if chain.answer is not None:
            return tuple(str(record.address) for record in chain.answer), ttl
        denied = any(rrset.rdtype == dns.rdatatype.SOA for rrset in answer.authority)
        if not chain.cnames or denied:
            return (), ttl
        name = str(chain.canonical_name)
    return None


def _query(name: str, kind: str, resolvers: Sequence[tuple[str, int]]) -> Any:
    """The first good answer; servers in their order, as resolv.conf(5) says, twice round."""
    import dns.exception
    import dns.message
    import dns.query
    import dns.rcode

    good = (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)
    for timeout in TIMEOUTS:
        for address, port in resolvers:
            with suppress(dns.exception.DNSException, OSError, ValueError):  # ask the next one
                query = dns.message.make_query(name, kind)
                answer, _ = dns.query.udp_with_fallback(query, address, timeout, port)
                if answer.rcode() in good:
                    return answer
    return None


def from_hosts(text: str) -> tuple[str, ...]:
    """Addresses of a name in /etc/hosts."""
    found = []
    with suppress(OSError):
        for line in HOSTS.read_text(errors="replace").splitlines():
            words = line.partition("#")[0].split()
            if text in (word.lower() for word in words[1:]):
                with suppress(ValueError):
                    found.append(str(ipaddress.ip_address(words[0])))
    return tuple(dict.fromkeys(found))


def upstream(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Servers to ask: the profile's (``ADDR[:PORT]``), else the host's. Raises UsageError."""
    found = []
    for text in texts:
        host, port = text, "53"
        if text.startswith("["):
            host, _, port = text[1:].partition("]")
            port = port.removeprefix(":") or "53"
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        try:
            address = str(ipaddress.ip_address(host))
        except ValueError:
            address = ""
        if not address or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise UsageError(f"resolver {text!r}: use ADDR, ADDR:PORT or [ADDR]:PORT")
        found.append((address, int(port)))
    return found or _hosts_servers()


def _hosts_servers() -> list[tuple[str, int]]:
    """Those of /etc/resolv.conf; without one, this machine's own: resolv.conf(5)."""
    found = []
    with suppress(OSError):
        for line in RESOLV_CONF.read_text(errors="replace").splitlines():
            words = line.split()
            if words[:1] == ["nameserver"] and len(words) > 1:
                with suppress(ValueError):
                    found.append((str(ipaddress.ip_address(words[1])), 53))
    return found or [("127.0.0.1", 53)]
