"""The one nftables table of all agents, ``inet mis``. No other table is read or changed.

Rules go by interface name (``mis-*``) and by the agents' address pools, so that an agent comes and
goes without a rule of its own; only host services that a profile allows are rows of a set.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence

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
add rule {TABLE} postrouting ip saddr {POOL4} masquerade
add rule {TABLE} postrouting ip6 saddr {POOL6} masquerade
add rule {TABLE} forward iifname "mis-*" oifname "mis-*" drop
add rule {TABLE} forward iifname "mis-*" accept
add rule {TABLE} forward oifname "mis-*" ct state established,related accept
add rule {TABLE} forward oifname "mis-*" drop
add rule {TABLE} input iifname . meta l4proto . ip daddr . th dport @local4 accept
add rule {TABLE} input iifname . meta l4proto . ip6 daddr . th dport @local6 accept
add rule {TABLE} input iifname "mis-*" drop
"""


def install(*, close4: bool, close6: bool) -> None:
    """Make or renew the table, in one transaction.

    ``close4`` and ``close6``: forwarding of that family is on only for us, so what is not an
    agent's goes on being refused, as before we turned it on.
    """
    text = _BASE
    for family, close in (("ipv4", close4), ("ipv6", close6)):
        if close:
            text += f"add rule {TABLE} forward meta nfproto {family} drop\n"
    _run(text)


def remove() -> None:
    """Delete the table; fine when there is none."""
    _run(f"add table {TABLE}\ndelete table {TABLE}\n")


def allow_local(interface: str, allowed: Sequence[tuple[str, str, str, str]]) -> None:
    """Let one agent reach services of the host: (family, protocol, address, ports)."""
    if allowed:
        _run(
            "".join(
                f'add element {TABLE} local{family} {{ "{interface}" . {protocol} . {address} . '
                f"{ports} }}\n"
                for family, protocol, address, ports in allowed
            )
        )


def forget_local(live: set[str]) -> None:
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
        and chain["table"] != "mis"
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
        raise SetupError(f"nft {' '.join(words)}: {done.stderr.strip()[-400:]}")
    return done.stdout
