"""The one nftables table of all agents, ``inet mis``. No other table is read or changed.

Rules go by interface name (``mis-*``) and by the agents' address pools, so that an agent comes and
goes without a rule of its own; only one that may use services of the host has a chain, named as its
interface.  Not rows of a set: Debian's 6.12 refuses rules by a concatenated set with intervals
(EOPNOTSUPP), which port ranges would need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from mis_run.errors import SetupError
from mis_run.hints import Any
from mis_run.linux.spawn import run
from mis_run.rules import POOL4, POOL6

TABLE = "inet mis"

_BASE = f"""
add table {TABLE}
add map {TABLE} local {{ type ifname : verdict; }}
add chain {TABLE} postrouting {{ type nat hook postrouting priority srcnat; }}
add chain {TABLE} forward {{ type filter hook forward priority filter; }}
add chain {TABLE} input {{ type filter hook input priority filter; }}
flush chain {TABLE} postrouting
flush chain {TABLE} forward
flush chain {TABLE} input
add rule {TABLE} postrouting iifname "mis-*" ip saddr {POOL4} masquerade
add rule {TABLE} postrouting iifname "mis-*" ip6 saddr {POOL6} masquerade
add rule {TABLE} forward iifname "mis-*" oifname "mis-*" drop
add rule {TABLE} forward iifname "mis-*" ip saddr {POOL4} accept
add rule {TABLE} forward iifname "mis-*" ip6 saddr {POOL6} accept
add rule {TABLE} forward iifname "mis-*" drop
add rule {TABLE} forward oifname "mis-*" ct state established,related accept
add rule {TABLE} forward oifname "mis-*" drop
add rule {TABLE} input iifname vmap @local
add rule {TABLE} input iifname "mis-*" drop
"""

Service = tuple[str, str, str, str]
"""Of the host: ("ip" or "ip6", "tcp" or "udp", address, "LOW-HIGH")."""

_AGENT = re.compile(r"\tchain mis-[^}]*\}\n\n?")


def install(
    forwarded: Mapping[str, Sequence[str]], known: Sequence[str] = (), *, hold: Sequence[int] = ()
) -> list[str]:
    """Make or renew the table, in one transaction.

    ``forwarded``: the families (``ipv4``, ``ipv6``) that are forwarded only for us, each with the
    interfaces that forwarded before; what comes in by another is refused, as before.  ``known`` is
    what the last call returned: while the table is as that left it nothing is done, since replacing
    rules waits for an RCU grace period (20 to 40 ms).  A firewall's ``flush ruleset`` is noticed.
    ``hold``: descriptors that ``nft`` has too.  A lock among them is held until it is done, even if
    we are killed meanwhile.
    """
    text = _BASE
    for family, interfaces in sorted(forwarded.items()):
        others = ", ".join(f'"{name}"' for name in interfaces)
        match = f"iifname != {{ {others} }} " if others else ""
        text += f"add rule {TABLE} forward meta nfproto {family} {match}drop\n"
    if text in known[:1] and list(known[1:]) == [_listing()]:
        return list(known)
    _run(text, hold)
    return [text, _listing()]


def _listing() -> str:
    """The table without what belongs to single agents; empty when there is none."""
    try:
        return _AGENT.sub("", _nft("-t", "list", "table", *TABLE.split())).rstrip("}\n")
    except SetupError:
        return ""


def remove(hold: Sequence[int] = ()) -> None:
    """Delete the table; fine when there is none. ``hold``: see `install`."""
    _run(f"add table {TABLE}\ndelete table {TABLE}\n", hold)


def allow_local(interface: str, services: Sequence[Service], hold: Sequence[int] = ()) -> None:
    """Let one agent reach services of the host. ``hold``: see `install`."""
    text = f"add chain {TABLE} {interface}\n"
    for family, protocol, address, ports in services:
        match = f"{family} daddr {address} {protocol} dport {ports}"
        text += f"add rule {TABLE} {interface} {match} accept\n"
    _run(f"{text}add element {TABLE} local {{ {interface} : jump {interface} }}\n", hold)


def forget_local(interface: str, hold: Sequence[int] = ()) -> None:
    """Take back what `allow_local` gave; fine when a firewall has flushed it meanwhile."""
    element = f"element {TABLE} local {{ {interface} : jump {interface} }}"
    _run(
        f"add table {TABLE}\nadd map {TABLE} local {{ type ifname : verdict; }}\n"
        f"add chain {TABLE} {interface}\nadd {element}\n"
        f"delete {element}\nflush chain {TABLE} {interface}\ndelete chain {TABLE} {interface}\n",
        hold,
    )


def gc(live: set[str], hold: Sequence[int] = ()) -> None:
    """Forget interfaces that are not ``live``."""
    for family, table, chain, _ in _chains():
        if f"{family} {table}" == TABLE and chain.startswith("mis-") and chain not in live:
            forget_local(chain, hold)


def forward_blockers() -> list[tuple[str, str, str]]:
    """(family, table, chain) of other tables' forward chains that drop by default."""
    return [
        (family, table, chain)
        for family, table, chain, facts in _chains()
        if facts.get("hook") == "forward"
        and facts.get("policy") == "drop"
        and f"{family} {table}" != TABLE
    ]


def _chains() -> list[tuple[str, str, str, Mapping[str, Any]]]:
    """(family, table, name, everything else) of every chain of the machine."""
    try:
        found = json.loads(_nft("-j", "list", "chains"))["nftables"]
    except SetupError:
        return []
    chains = (entry["chain"] for entry in found if "chain" in entry)
    return [(chain["family"], chain["table"], chain["name"], chain) for chain in chains]


def _run(text: str, hold: Sequence[int] = ()) -> None:
    _nft("-f", "-", text=text, hold=hold)


def _nft(*words: str, text: str = "", hold: Sequence[int] = ()) -> str:
    try:
        done = run(["nft", *words], text, hold=hold)
    except OSError as error:
        raise SetupError(
            f"cannot run nft: {error.strerror}", hint="apt-get install nftables"
        ) from error
    if done.code:
        raise SetupError(f"nft {' '.join(words)}: {done.err.strip()[-400:]}", hint="mis doctor")
    return done.out
