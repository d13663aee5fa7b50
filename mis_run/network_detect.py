"""What this machine's network can do, and what its own addresses are; nothing is changed.

Out of scope: an agent's network (`network`).
"""

from __future__ import annotations

import socket
from pathlib import Path

from mis_run import namespace, nft, shared
from mis_run.linux import programs
from mis_run.model import Finding


def supported() -> dict[str, Finding]:
    """``netns``, ``veth``, ``nftables``, ``ipv6``: a namespace is really made, which `create` will
    use, and a netlink socket opened."""
    found = {"ipv6": _ipv6()}
    try:
        namespace.prepare().result()
        found["netns"] = Finding(True, "a network namespace can be made")
    except OSError as error:
        fix = "inside a container, mis-run needs --privileged or CAP_SYS_ADMIN"
        found["netns"] = Finding(False, f"no network namespace: {error}", fix)
    for mechanism, program, package in (
        ("veth", "ip", "iproute2"),
        ("nftables", "nft", "nftables"),
    ):
        path = programs.find(program)
        text = path or f"not installed: {program}"
        found[mechanism] = Finding(path is not None, text, f"apt-get install {package}")
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12).close()  # NETLINK_NETFILTER
    except OSError as error:
        found["nftables"] = Finding(False, f"the kernel has no nftables: {error.strerror}")
    return found


def _ipv6() -> Finding:
    conf = shared.SWITCH6.parents[1]
    for which in ("all", "default"):
        switch = conf / which / "disable_ipv6"
        if not switch.exists() or switch.read_text().strip() != "0":
            return Finding(False, "IPv6 is off on this machine: the agent gets none")
    return Finding(True, "IPv6 is on")


def diagnose() -> dict[str, Finding]:
    """The slow check of ``mis doctor``: does another table drop what is forwarded?"""
    blockers = nft.forward_blockers()
    if not blockers:
        return {"forwarding": Finding(True, "no other table drops forwarded packets")}
    family, table, chain = blockers[0]
    rule = f"nft insert rule {family} {table} {chain}"
    fix = (
        f"{rule} iifname '\"mis-*\"' accept; "
        f"{rule} oifname '\"mis-*\"' ct state established,related accept"
    )
    detail = f"table {family} {table} drops forwarded packets by default, the agent's too"
    return {"forwarding": Finding(False, detail, fix)}


def host_addresses() -> tuple[str, ...]:
    """The host's own addresses, loopback and link-local left out (they are denied anyway)."""
    found = []
    address = ""
    for line in Path("/proc/net/fib_trie").read_text().splitlines():
        words = line.split()
        if words[:1] == ["|--"]:
            address = words[1]
        elif words[:3] == ["/32", "host", "LOCAL"] and not address.startswith("127."):
            found.append(address)
    inet6 = Path("/proc/net/if_inet6")
    for line in inet6.read_text().splitlines() if inet6.exists() else ():
        packed = bytes.fromhex(line.split()[0])
        if packed[:2] != b"\xfe\x80" and packed != b"\0" * 15 + b"\1":
            found.append(socket.inet_ntop(socket.AF_INET6, packed))
    return tuple(dict.fromkeys(found))
