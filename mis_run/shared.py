"""What all runs share in the network: addresses, one nftables table, the forwarding switches.

Everything is done under one lock in ``/run/mis/net``, and recorded there before it is done, so that
the last run, or `gc`, undoes exactly what was done.  The table comes before the switches and goes
after them: while forwarding is on for us only, the rule that keeps others out is always there.
"""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from mis_run import locks, nft
from mis_run.errors import SetupError
from mis_run.hints import Any
from mis_run.rules import POOL4, POOL6
from mis_run.state import STATE

NET = STATE / "net"
MOST = 1 << 14  # /30 networks in POOL4
CONF4, CONF6 = Path("/proc/sys/net/ipv4/conf"), Path("/proc/sys/net/ipv6/conf")
SWITCH4, SWITCH6 = CONF4.parent / "ip_forward", CONF6 / "all" / "forwarding"


def locked() -> AbstractContextManager[int]:
    """Hold the lock of everything here; its descriptor.

    Whoever changes the table has it too: a killed launcher's ``nft`` would otherwise go on after
    the lock was released, and after `gc`.
    """
    NET.mkdir(parents=True, exist_ok=True)
    return locks.Exclusive(NET / "lock", os.O_CREAT | os.O_RDWR)


# ---- addresses ----------------------------------------------------------------------------


def addresses(index: int) -> tuple[str, str, str, str]:
    """Our IPv4 address, the agent's, our IPv6 address, the agent's; of a /30 and a /64."""
    base4 = ipaddress.IPv4Network(POOL4).network_address + 4 * index
    base6 = ipaddress.IPv6Network(POOL6).network_address + (index << 64)
    return str(base4 + 1), str(base4 + 2), str(base6 + 1), str(base6 + 2)


def indices() -> dict[int, str]:
    """Taken address indices and the runs that hold them."""
    return {int(path.name): path.read_text() for path in NET.iterdir() if path.name.isdecimal()}


def claim(run_id: str) -> int:
    """The lowest index that no run holds and that this machine does not route elsewhere.

    Raises SetupError when there is none.
    """
    with locked():
        held = indices()
        routed = list(_routed())
        for index in range(MOST):
            if index not in held and not any(low <= index <= high for low, high in routed):
                (NET / str(index)).write_text(run_id)
                return index
    if len(held) == MOST:
        raise SetupError("no address is left for another agent", hint="mis gc")
    raise SetupError(
        f"the agents' addresses, {POOL4} and {POOL6}, are routed elsewhere on this machine",
        hint=f"ip route show root {POOL4}; ip -6 route show root {POOL6}; or --net none",
    )


def _routed() -> Iterator[tuple[int, int]]:
    """Ranges of indices that have a route already: somebody else's, or a leftover's.

    A wider route (a VPN's 10.0.0.0/8) is no conflict: ours are longer, and win.
    """
    for pool, size, routes in (
        (ipaddress.ip_network(POOL4), 2, _routes4()),
        (ipaddress.ip_network(POOL6), 64, _routes6()),
    ):
        start = int(pool.network_address)
        for first, length in routes:
            if length >= pool.prefixlen and first >> (pool.max_prefixlen - pool.prefixlen) == (
                start >> (pool.max_prefixlen - pool.prefixlen)
            ):
                last = first | ((1 << (pool.max_prefixlen - length)) - 1)
                yield (first - start) >> size, (last - start) >> size


def _routes4() -> Iterator[tuple[int, int]]:
    """(address, prefix length) of the main table: proc_pid_net(5), words in this CPU's order."""
    with suppress(FileNotFoundError):
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            words = line.split()
            network, mask = (
                int.from_bytes(int(words[column], 16).to_bytes(4, sys.byteorder), "big")
                for column in (1, 7)
            )
            yield network, mask.bit_count()


def _routes6() -> Iterator[tuple[int, int]]:
    with suppress(FileNotFoundError):  # a kernel without IPv6
        for line in Path("/proc/net/ipv6_route").read_text().splitlines():
            words = line.split()
            yield int(words[0], 16), int(words[1], 16)


def release(run_ids: set[str]) -> None:
    """`forget`, under the lock."""
    with locked() as lock:
        forget(run_ids, lock)


def forget(run_ids: set[str], lock: int) -> None:
    """Free the indices of runs; with the last one, undo the table and the switches."""
    left = 0
    for index, owner in indices().items():
        if owner in run_ids:
            (NET / str(index)).unlink()
        else:
            left += 1
    if not left:
        unshare(lock)


# ---- the table and the switches -----------------------------------------------------------


def share(*, ipv6: bool) -> None:
    """Have the table and the switches that all agents need."""
    with locked() as lock:
        record = _recorded()
        turns = _turns(record, ipv6=ipv6)
        _record(record)  # before the act: gc must know
        table = nft.install(record["forwarded"], record["table"], hold=[lock])
        for path, value in turns:
            turn(path, value)
        if table != record["table"]:
            _record({**record, "table": table})


def unshare(lock: int) -> None:
    """Undo the table and the switches; fine when they are undone."""
    if (NET / "record").exists():
        for path, value in _recorded()["before"].items():
            if _value(Path(path)) not in ("", value):
                turn(Path(path), value)
        nft.remove([lock])
        (NET / "record").unlink()
    (NET / "record.part").unlink(missing_ok=True)  # of a launcher killed halfway


def _recorded() -> dict[str, Any]:
    """What was changed so far.

    ``before``: switch → the value to restore, in that order; ``forwarded``: the families that we
    turned on → interfaces that forwarded before; ``table``: what `nft.install` left there.
    """
    record: dict[str, Any] = {"before": {}, "forwarded": {}, "table": []}
    with suppress(FileNotFoundError):
        record |= json.loads((NET / "record").read_text())
    return record


def _record(record: dict[str, Any]) -> None:
    """Atomically: a launcher killed halfway leaves the old record or the new one."""
    part = NET / "record.part"
    part.write_text(json.dumps(record))
    part.replace(NET / "record")


def turn(path: Path, value: str) -> None:
    """Write one switch; an interface that has gone needs none. Raises SetupError."""
    try:
        path.write_text(value)
    except FileNotFoundError:
        return  # its interface is gone
    except OSError as error:
        raise SetupError(
            f"cannot write {value} to {path}: {error.strerror}",
            hint=f"let the machine do it: sysctl -w {_sysctl(path)}={value}; or --net none",
        ) from error


def _sysctl(path: Path) -> str:
    return ".".join(path.relative_to("/proc/sys").parts)


def _value(path: Path) -> str:
    """Empty when the interface has gone."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _turns(record: dict[str, Any], *, ipv6: bool) -> list[tuple[Path, str]]:
    """The switches to turn, noted in ``record`` with all that the kernel turns along with them.

    Writing ``ip_forward`` sets ``forwarding`` of every interface, and ``all/accept_redirects`` to
    the contrary (inet_forward_change in net/ipv4/devinet.c); IPv6's sets it of every interface too
    (addrconf_forward_change in net/ipv6/addrconf.c).
    """
    turns: list[tuple[Path, str]] = []
    before: dict[str, str] = record["before"]

    def keep(paths: list[Path], value: str | None = None) -> list[Path]:
        """Remember present values, or those paths that have just this one."""
        found = {path: now for path in paths if (now := _value(path)) and value in (None, now)}
        for path, now in found.items():
            before.setdefault(str(path), now)
        return list(found)

    if keep([SWITCH4], "0"):
        turns.append((SWITCH4, "1"))
        forwarding = keep(_each(CONF4, "forwarding"), "1")
        keep([CONF4 / "all" / "accept_redirects"])
        record["forwarded"].setdefault("ipv4", _interfaces(forwarding))
    if ipv6 and keep([SWITCH6], "0"):
        keep(_each(CONF6, "forwarding"), "1")
        # A forwarding host ignores router advertisements unless accept_ra is 2 (ip-sysctl.rst):
        # without this the host would lose its own IPv6 configuration.
        turns += [(path, "2") for path in keep(_each(CONF6, "accept_ra"), "1")]
        turns.append((SWITCH6, "1"))
        # IPv6 forwards by the global switch alone, but for force_forwarding (since Linux 6.17).
        forced = [path for path in _each(CONF6, "force_forwarding") if _value(path) == "1"]
        record["forwarded"].setdefault("ipv6", _interfaces(forced))
    return turns


def _each(conf: Path, switch: str) -> list[Path]:
    """A switch of every interface and of those to come; not of ``all``, and not of agents."""
    names = [path.name for path in conf.iterdir()]
    return [conf / name / switch for name in names if name != "all" and name[:4] != "mis-"]


def _interfaces(switches: list[Path]) -> list[str]:
    return sorted(path.parent.name for path in switches if path.parent.name != "default")
