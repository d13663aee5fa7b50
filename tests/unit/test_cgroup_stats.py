"""Numbers from v1 and v2 files in one vocabulary."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mis_run.cgroup_stats import LimitsWatch, Places, Pressure, Usage, usage


def put(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


V2 = {
    "cpu.stat": "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n",
    "memory.current": "4096\n",
    "memory.peak": "8192\n",
    "memory.swap.current": "0\n",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\n",
    "pids.current": "3\n",
    "pids.peak": "7\n",
    "pids.events": "max 0\n",
    "agent/pids.events": "max 5\n",
    "agent/cpu.stat": "usage_usec 1\nnr_periods 9\nnr_throttled 4\nthrottled_usec 250000\n",
    "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=1\n253:0 rbytes=1 wbytes=2 rios=1 wios=1\n",
    "memory.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=2000000\n"
    "full avg10=0.50 avg60=0.00 avg300=0.00 total=1000000\n",
}


def test_v2(tmp_path: Path) -> None:
    """Every v2 number arrives in seconds, bytes and counts."""
    put(tmp_path, V2)
    assert usage(Places(tmp_path, {})) == Usage(
        cpu_seconds=1.5,
        user_seconds=1.0,
        system_seconds=0.5,
        memory_bytes=4096,
        memory_peak=8192,
        swap=0,
        pids=3,
        pids_peak=7,
        nr_throttled=4,
        throttled_seconds=0.25,
        io_read=11,
        io_write=22,
        oom_kills=1,
        pids_denied=5,
        psi_memory=Pressure(1.5, 2.0, 0.5, 1.0),
    )


def test_v1(tmp_path: Path) -> None:
    """v1 numbers mean the same: swap is memsw minus memory, throttling is not in nanoseconds."""
    put(tmp_path / "u", {"cpu.stat": V2["cpu.stat"]})
    put(
        tmp_path / "memory",
        {
            "memory.usage_in_bytes": "100\n",
            "memory.max_usage_in_bytes": "300\n",
            "memory.memsw.usage_in_bytes": "150\n",
            "agent/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        },
    )
    put(tmp_path / "pids", {"pids.current": "1\n", "agent/pids.events": "max 6\n"})
    put(tmp_path / "cpu", {"agent/cpu.stat": "nr_throttled 3\nthrottled_time 500000000\n"})
    io = "blkio.throttle.io_service_bytes_recursive"
    put(tmp_path / "blkio", {io: "254:0 Read 5\n254:0 Write 7\n254:0 Sync 9\nTotal 12\n"})
    v1 = {name: tmp_path / name for name in ("memory", "pids", "cpu", "blkio")}
    found = usage(Places(tmp_path / "u", v1))
    assert (found.memory_bytes, found.memory_peak, found.swap) == (100, 300, 50)
    assert (found.oom_kills, found.pids, found.pids_denied) == (2, 1, 6)
    assert (found.nr_throttled, found.throttled_seconds) == (3, 0.5)
    assert (found.io_read, found.io_write, found.cpu_seconds) == (5, 7, 1.5)


def test_nothing_is_not_zero(tmp_path: Path) -> None:
    """What a machine cannot tell is None, also when the cgroup is already gone."""
    assert usage(Places(tmp_path / "gone", {})) == Usage()


def test_events_once_and_with_totals(tmp_path: Path) -> None:
    """Each growth of a counter is one event; the same number again is none."""
    put(tmp_path, V2)
    watch = LimitsWatch(Places(tmp_path, {}))
    first = {event.kind: event for event in watch.poll()}
    assert set(first) == {"limits.oom", "limits.pids", "limits.throttled"}
    assert not any(event.violation for event in first.values())
    assert watch.poll() == []
    put(tmp_path, {"memory.events": "oom_kill 4\n"})
    (event,) = watch.poll()
    assert (event.kind, event.subject) == ("limits.oom", {"count": 3, "total": 4})


def test_throttling_is_told_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Throttling may last for hours: one event at its begin, then one each ten seconds."""
    clock = [100.0]
    monkeypatch.setattr("mis_run.cgroup_stats.time.monotonic", lambda: clock[0])
    put(tmp_path, V2)
    watch = LimitsWatch(Places(tmp_path, {}))
    told = 0
    for number in range(5, 105):  # 25 s, looked at four times a second
        clock[0] += 0.25
        stat = f"nr_throttled {number}\nthrottled_usec 250000\n"
        put(tmp_path, {"agent/cpu.stat": stat})
        told += sum(event.kind == "limits.throttled" for event in watch.poll())
    assert told == 3


def test_counters_gone_with_the_leaf(tmp_path: Path) -> None:
    """When the runtime has removed the agent's cgroup, nothing is told twice or taken back."""
    put(tmp_path, V2)
    watch = LimitsWatch(Places(tmp_path, {}))
    assert watch.poll()
    (tmp_path / "agent/pids.events").unlink()
    (tmp_path / "agent/cpu.stat").unlink()
    assert watch.poll() == []


STALL = "avg10={0} avg60=1.00 avg300=0.00 total=1500000"
STALL = f"some {STALL}\nfull {STALL}\n"


def test_pressure_is_told_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent of which nothing can go on for want of memory is an event, at most every ten
    seconds; a little pressure is none."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = LimitsWatch(Places(tmp_path, {}))
    put(tmp_path, {"memory.pressure": STALL.format("9.99"), "io.pressure": STALL.format("0.00")})
    told = []
    for at, stall in ((102, "9.99"), (104, "10.00"), (106, "60.00"), (114, "70.00")):
        now[0] = at
        put(tmp_path, {"memory.pressure": STALL.format(stall)})
        told.append([dict(event.subject) for event in watch.poll()])
    assert told == [
        [],
        [{"resource": "memory", "percent": 10.0, "seconds": 1.5}],
        [],
        [{"resource": "memory", "percent": 70.0, "seconds": 1.5}],
    ]
