"""The one nftables table of all agents, ``inet mis``. No other table is read or changed.

Rules go by interface name (``mis-*``) and by the agents' address pools, so that an agent comes and
goes without a rule of its own; only host services that a profile allows are rows of a set.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence

from mis_run.errors import SetupError
from mis_run.rules import POOL4, POOL6

TABLE = "inet mis"

_BASE = f"""
add table {TABLE}
add set {TABLE} local4 {{ type ifname . inet_proto . ipv4_addr . inet_service; flags interval; }}
add set {TABLE} local6 {{ type ifname . inet_proto . ipv6_addr . inet_service; flags interval; }}
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
add rule {TABLE} input iifname . meta l4proto . ip daddr . th dport @local4 accept
add rule {TABLE} input iifname . meta l4proto . ip6 daddr . th dport @local6 accept
add rule {TABLE} input iifname "mis-*" drop
"""

Row = tuple[str, str, str, str]
"""A service of the host: ("4" or "6", "tcp" or "udp", address, "LOW-HIGH")."""


def install(forwarded: Mapping[str, Sequence[str]], known: Sequence[str] = ()) -> list[str]:
    """Make or renew the table, in one transaction.

    ``forwarded``: the families (``ipv4``, ``ipv6``) that are forwarded only for us, each with the
    interfaces that forwarded before; what comes in by another is refused, as before.  ``known`` is
    what the last call returned: while the table is as that left it nothing is done, since replacing
    rules waits for an RCU grace period (20 to 40 ms).  A firewall's ``flush ruleset`` is noticed.
    """
    text = _BASE
    for family, interfaces in sorted(forwarded.items()):
        others = ", ".join(f'"{name}"' for name in interfaces)
        match = f"iifname != {{ {others} }} " if others else ""
        text += f"add rule {TABLE} forward meta nfproto {family} {match}drop\n"
    if list(known) == [text, _listing()]:
        return list(known)
    _run(text)
    return [text, _listing()]


def _listing() -> str:
    """The table without the rows of its sets; empty when there is none."""
    try:
        return _nft("-t", "list", "table", *TABLE.split())
    except SetupError:
        return ""


def remove() -> None:
    """Delete the table; fine when there is none."""
    _run(f"add table {TABLE}\ndelete table {TABLE}\n")


def allow_local(interface: str, allowed: Sequence[Row]) -> None:
    """Let one agent reach services of the host."""
    _rows("add", interface, allowed)


def forget_local(interface: str, allowed: Sequence[Row]) -> None:
    """Take back what `allow_local` gave."""
    _rows("delete", interface, allowed)


def _rows(verb: str, interface: str, rows: Sequence[Row]) -> None:
    if rows:
        _run(
            "".join(
                f'{verb} element {TABLE} local{family} {{ "{interface}" . {protocol} . {address} . '
                f"{ports} }}\n"
                for family, protocol, address, ports in rows
            )
        )


def gc(live: set[str]) -> None:
    """Drop the rows of interfaces that are not ``live``."""
    for name in ("local4", "local6"):
        try:
            found = json.loads(_nft("-j", "list", "set", *TABLE.split(), name))
        except SetupError:
            return  # no table: no rows
        for entry in found["nftables"]:
            for element in entry.get("set", {}).get("elem", ()):
                parts = element["concat"]
                if parts[0] not in live:
                    _run(f"delete element {TABLE} {name} {{ {_text(parts)} }}\n")


def _text(parts: Sequence[object]) -> str:
    shown = []
    for part in parts:
        if isinstance(part, dict):  # {"range": [low, high]}
            low, high = part["range"]
            shown.append(f"{low}-{high}")
        else:
            shown.append(f'"{part}"' if str(part).startswith("mis-") else str(part))
    return " . ".join(shown)


def forward_blockers() -> list[tuple[str, str, str]]:
    """(family, table, chain) of other tables' forward chains that drop by default."""
    try:
        found = json.loads(_nft("-j", "list", "chains"))
    except SetupError:
        return []
    return [
        (chain["family"], chain["table"], chain["name"])
        for entry in found["nftables"]
        if (chain := entry.get("chain"))
        and chain.get("hook") == "forward"
        and chain.get("policy") == "drop"
        and (chain["family"], chain["table"]) != tuple(TABLE.split())
    ]


def _run(text: str) -> None:
    _nft("-f", "-", text=text)


def _nft(*words: str, text: str = "") -> str:
    try:
        done = subprocess.run(
            ["nft", *words], input=text, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise SetupError(
            f"cannot run nft: {error.strerror}", hint="apt-get install nftables"
        ) from error
    if done.returncode:
        raise SetupError(f"nft {' '.join(words)}: {done.stderr.strip()[-400:]}", hint="mis doctor")
    return done.stdout
