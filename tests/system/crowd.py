"""Many containers of one engine at once: each guarded for itself, none disturbs another."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from engine import GATEWAY, IMAGE, Engine, events, runs

from mis_run.linux import abi

EPERM = 1
TIMEOUT = 240.0  # seconds for one call of docker while all the others are made


@dataclass(frozen=True)
class Crowd:
    """What was measured: seconds until all ran, and megabytes that a supervisor is resident."""

    started: float
    resident: float


def gather(engine: Engine, count: int, runtime: str = "mis") -> Crowd:
    """Start ``count`` containers in parallel, look at each while all run, and remove them.

    Each has an address, a supervisor, a record of its own, and in each, also by ``docker exec``,
    what is forbidden is refused and recorded there.  Raises AssertionError.
    """
    names = [f"crowd-{number}" for number in range(count)]
    began = perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda name: _start(engine, name, runtime), names))
        started = perf_counter() - began
        guarded = {run["container"]: run for run in runs()}
        assert len(guarded) == count
        assert len({run["supervisor"] for run in guarded.values()}) == count
        found = json.loads(engine.docker("inspect", *names).stdout)
        addresses = {one["NetworkSettings"]["IPAddress"] for one in found}
        assert len(addresses) == count and "" not in addresses
        list(pool.map(lambda name: _try(engine, name), names))
    for one in found:
        told = [event["kind"] for event in events(one["Id"]) if event.get("verdict") == "deny"]
        assert sorted(told) == ["escape.ptrace", "net.connect", "net.connect"], (one["Id"], told)
    resident = max(_resident(run["supervisor"]) for run in guarded.values())
    engine.docker("rm", "-f", *names, timeout=TIMEOUT)
    return Crowd(started, resident)


def _start(engine: Engine, name: str, runtime: str) -> None:
    argv = ("run", "-d", "--runtime", runtime, "--name", name, IMAGE)
    script = f"act connect {GATEWAY} 9; exec sleep 1000"
    engine.docker(*argv, "sh", "-c", script, timeout=TIMEOUT)


def _try(engine: Engine, name: str) -> None:
    script = f"act connect {GATEWAY} 9; act syscall {abi.number('ptrace')}"
    done: Any = engine.docker("exec", name, "sh", "-c", script, check=False, timeout=TIMEOUT)
    assert done.stdout.split() == [str(EPERM)] * 2, (name, done.stdout, done.stderr)


def _resident(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["VmRSS"].split()[0]) / 1024
