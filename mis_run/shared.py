"""What all runs share in the network: addresses, one nftables table, the forwarding switches.

Everything is done under one lock in ``/run/mis/net``, and recorded there before it is done, so that
the last run, or `gc`, undoes exactly what was done.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mis_run import nft
from mis_run.errors import SetupError
from mis_run.state import STATE

NET = STATE / "net"
MOST = 1 << 14  # /30 networks in 10.213.0.0/16
SWITCH4 = Path("/proc/sys/net/ipv4/ip_forward")
SWITCH6 = Path("/proc/sys/net/ipv6/conf/all/forwarding")


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock of everything here."""
    NET.mkdir(parents=True, exist_ok=True)
    fd = os.open(NET / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def indices() -> dict[int, str]:
    """Taken address indices and the runs that hold them."""
    return {int(path.name): path.read_text() for path in NET.iterdir() if path.name.isdecimal()}


def claim(run_id: str) -> int:
    """The lowest free index. Raises SetupError when there is none."""
    with locked():
        taken = indices()
        for index in range(MOST):
            if index not in taken:
                (NET / str(index)).write_text(run_id)
                return index
    raise SetupError("no address is left for another agent", hint="mis gc")


def release(run_ids: set[str]) -> None:
    """`forget`, under the lock."""
    with locked():
        forget(run_ids)


def forget(run_ids: set[str]) -> None:
    """Free the indices of runs; with the last one, undo the table and the switches."""
    left = 0
    for index, owner in indices().items():
        if owner in run_ids:
            (NET / str(index)).unlink()
        else:
            left += 1
    if not left:
        unshare()


def unshare() -> None:
    """Undo the table and the switches; fine when they are undone."""
    if (NET / "shared").exists():
        nft.remove()
        _switch_back()
        (NET / "shared").unlink()


def _remember(switches: dict[str, str]) -> None:
    """Atomically: a launcher killed halfway leaves the old record or the new one."""
    part = NET / "switches.part"
    part.write_text(json.dumps(switches))
    part.replace(NET / "switches")


def _switch_on(*, ipv6: bool) -> dict[str, str]:
    """Turn forwarding on, remembering what was off; returns the switches that we turned."""
    record = NET / "switches"
    remembered: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    wanted = [SWITCH4, SWITCH6] if ipv6 else [SWITCH4]
    if ipv6 and SWITCH6.read_text().strip() == "0":
        # A forwarding host ignores router advertisements unless accept_ra is 2 (ip-sysctl.rst):
        # without this the host would lose its own IPv6 configuration.
        for path in Path("/proc/sys/net/ipv6/conf").glob("*/accept_ra"):
            if path.read_text().strip() == "1" and str(path) not in remembered:
                remembered[str(path)] = "1"
                path.write_text("2")
    for path in wanted:
        if path.read_text().strip() == "0" and str(path) not in remembered:
            remembered[str(path)] = "0"
            _remember(remembered)  # before the act: gc must know
            path.write_text("1")
    _remember(remembered)
    return {Path(path).name: value for path, value in remembered.items() if value == "0"}


def _switch_back() -> None:
    record = NET / "switches"
    if not record.exists():
        return
    for path, value in json.loads(record.read_text()).items():
        if Path(path).exists():  # an interface may be gone
            Path(path).write_text(value)
    record.unlink()


def share(*, ipv6: bool) -> None:
    """The table and the switches that all agents share."""
    with locked():
        (NET / "shared").touch()
        switched = _switch_on(ipv6=ipv6)
        nft.install(close4=SWITCH4.name in switched, close6=SWITCH6.name in switched)
