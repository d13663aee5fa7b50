"""Counters of a real cgroup: known work is counted, other work is not, a missing PMU is said."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mis_run import cgroup
from mis_run.errors import SetupError, UsageError, VerifyError
from mis_run.guards import counters
from mis_run.linux import perf
from mis_run.model import Host

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to count a cgroup"),
]

FOUND = counters.supported() if os.geteuid() == 0 else {}
SOFTWARE = tuple(name for name, event in perf.EVENTS.items() if not event.hardware)
HARDWARE = tuple(name for name, event in perf.EVENTS.items() if event.hardware)


@pytest.fixture
def group() -> Iterator[cgroup.Cgroup]:
    kind, unified, controllers = cgroup.detect()
    machine = Host(
        mechanisms={}, cgroup=kind, unified=unified, controllers=controllers, runtime=None
    )
    with cgroup.create("mistest-perf", machine) as made:
        made.agent.mkdir()  # where v2 allows processes: the level above has controllers switched on
        yield made


def run_in(place: Path | None, script: str) -> None:
    # Closed at once: an error of a file that is closed by nobody would be lost, and its exit code.
    enter = f"with open({str(place / 'cgroup.procs')!r}, 'w') as f: f.write('0')\n" if place else ""
    subprocess.run([sys.executable, "-I", "-c", enter + script], check=True, timeout=60)


FAULTS = """
import mmap
memory = mmap.mmap(-1, 4096 * 5000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(15)  # MADV_NOHUGEPAGE: one fault for each page
for page in range(5000):
    memory[page * 4096] = 1
"""
SWITCHES = "import time\nfor number in range(300): time.sleep(0.0001)"
BURN = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"


def test_supported_by_trying() -> None:
    """Counting by cgroup works here; the hardware finding is either real or says why not."""
    assert FOUND["perf-cgroup"].ok
    pmu = FOUND["pmu"]
    assert pmu.ok or (pmu.detail and pmu.fix)


def test_known_work_is_counted(group: cgroup.Cgroup) -> None:
    """5000 page faults, 300 sleeps and 0.2 s of CPU are found within a small tolerance."""
    with counters.attach(group.perf, SOFTWARE) as counting:
        run_in(group.agent, FAULTS)
        faults = counting.read()
        run_in(group.agent, SWITCHES)
        switches = counting.read()
        run_in(group.agent, BURN)
        burnt = counting.read()
    assert 5000 <= faults["minor-faults"].value < 5000 + 2000
    assert faults["page-faults"].value == (
        faults["minor-faults"].value + faults["major-faults"].value
    )
    slept = switches["context-switches"].value - faults["context-switches"].value
    # A sleep that is over before the CPU is given away is no switch: on an idle machine one in 300,
    # in two VMs on a busy one 57.
    assert 150 <= slept < 450
    spent = (burnt["task-clock"].value - switches["task-clock"].value) / 1e9
    used = group.usage().cpu_seconds
    assert 0.2 <= spent < 0.4
    assert used is not None
    assert abs(burnt["task-clock"].value / 1e9 - used) < 0.15
    assert burnt["task-clock"].unit == "ns"
    assert burnt["task-clock"].rate > 0
    assert not any(reading.unavailable or reading.scaled for reading in burnt.values())


def test_work_outside_is_not_counted(group: cgroup.Cgroup) -> None:
    """The same work outside the cgroup leaves every counter at 0."""
    with counters.attach(group.perf, SOFTWARE) as counting:
        run_in(None, "\n".join((FAULTS, SWITCHES, BURN)))
        assert {reading.value for reading in counting.read().values()} == {0}


def test_below_is_counted_too(group: cgroup.Cgroup) -> None:
    """Work in the agent's cgroup below, and by processes that it forked, is counted."""
    with counters.attach(group.perf, ("minor-faults",)) as counting:
        run_in(group.agent, f"import os\nif os.fork() == 0:\n    exec({FAULTS!r})\nelse: os.wait()")
        assert counting.read()["minor-faults"].value >= 5000


@pytest.mark.skipif(FOUND.get("pmu") is None or FOUND["pmu"].ok, reason="this machine has a PMU")
def test_without_a_pmu(group: cgroup.Cgroup) -> None:
    """Hardware events say that they are unavailable; software ones appear under their own names
    and no ratio is invented."""
    with counters.attach(group.perf, HARDWARE) as counting:
        run_in(group.agent, BURN)
        found = counting.read()
    for name in HARDWARE:
        assert found[name].unavailable == counters.NO_PMU
        assert found[name].value == 0
    assert found["task-clock"].value > 0.2e9
    assert set(found) == {*HARDWARE, *counters.INSTEAD}


@pytest.mark.skipif(not FOUND or not FOUND["pmu"].ok, reason="no PMU on this machine")
def test_with_a_pmu(group: cgroup.Cgroup) -> None:
    """With a PMU, cycles and instructions are counted and give a plausible ratio."""
    with counters.attach(group.perf, ("cycles", "instructions")) as counting:
        run_in(group.agent, BURN)
        found = counting.read()
    assert set(found) == {"cycles", "instructions", "ipc"}
    assert 0.05 < found["ipc"].value < 8


def fake_pmu(monkeypatch: pytest.MonkeyPatch, samples: dict[str, tuple[int, int, int]]) -> None:
    """Hardware events that read as ``samples`` on CPU 0 and exist nowhere else."""
    names: dict[int, str] = {}

    def open_cgroup(event: perf.Event, cgroup: int, cpu: int, **_: int) -> int:
        name = next(name for name, known in perf.EVENTS.items() if known == event)
        if name not in samples:
            raise OSError(errno.ENOENT, "no such event")
        fd = os.open("/dev/null", os.O_RDONLY)
        names[fd] = name
        return fd

    monkeypatch.setattr(perf, "open_cgroup", open_cgroup)
    monkeypatch.setattr(perf, "read", lambda fd: samples[names[fd]])


def test_a_shared_pmu_is_scaled_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the time counted means twice the value, marked as scaled, with the fraction."""
    fake_pmu(monkeypatch, {"cycles": (1000, 80, 40), "instructions": (500, 80, 80)})
    events = ("instructions", "cycles")
    with counters.attach(tmp_path, events, lambda: [0]) as counting:
        found = counting.read()
    assert (found["cycles"].value, found["cycles"].scaled) == (2000, True)
    assert found["cycles"].fraction == 0.5
    assert not found["instructions"].scaled
    assert (found["ipc"].value, found["ipc"].scaled) == (0.25, True)


def test_a_busy_pmu_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that never got onto the PMU is unavailable, not 0, and gives no ratio."""
    fake_pmu(monkeypatch, {"cycles": (0, 80, 0), "instructions": (500, 80, 80)})
    with counters.attach(tmp_path, ("cycles", "instructions"), lambda: [0]) as counting:
        found = counting.read()
    assert "busy" in found["cycles"].unavailable
    assert "ipc" not in found


def test_cpus_that_come_and_go(group: cgroup.Cgroup) -> None:
    """A CPU that comes online is counted from then on; totals of one that went away stay."""
    both = counters.online()
    if len(both) < 2:
        pytest.skip("needs two CPUs")
    pinned = "import os\nos.sched_setaffinity(0, {%d})\n"
    now = both[:1]
    with counters.attach(group.perf, ("minor-faults",), lambda: now) as counting:
        run_in(group.agent, pinned % both[1] + FAULTS)
        unseen = counting.read()["minor-faults"].value
        assert unseen < 3000  # only its start, before it moved to the CPU that is not counted
        now = both[:2]
        counting.read()
        run_in(group.agent, pinned % both[1] + FAULTS)
        seen = counting.read()["minor-faults"].value
        assert seen >= unseen + 5000
        now = both[:1]
        assert counting.read()["minor-faults"].value == seen
        now = both[:2]
        counting.read()
        run_in(group.agent, pinned % both[1] + FAULTS)
        assert counting.read()["minor-faults"].value >= seen + 5000


def test_verify_proves_and_refuses(group: cgroup.Cgroup) -> None:
    """Work inside passes; a probe that works elsewhere is found out; the proof leaves nothing."""
    with counters.attach(group.perf, ("task-clock",)) as counting:
        counting.verify(lambda: run_in(group.agent, "pass"))
        with pytest.raises(VerifyError, match="not counted"):
            counting.verify(lambda: run_in(None, "pass"))
    assert [path.name for path in group.unified.iterdir() if path.is_dir()] == [group.agent.name]


def test_words(tmp_path: Path) -> None:
    """An unknown event is a usage error that lists the known ones."""
    with (
        pytest.raises(UsageError, match="'cylces'") as caught,
        counters.attach(tmp_path, ("cylces",)),
    ):
        pass
    assert "cycles" in caught.value.hint


def test_not_a_cgroup(tmp_path: Path) -> None:
    """A directory that is no cgroup gives readings that say so, never zeros."""
    with counters.attach(tmp_path, ("task-clock",)) as counting:
        assert counting.read()["task-clock"].unavailable


def test_many_cpus_make_room(group: cgroup.Cgroup) -> None:
    """The soft limit of open files is raised as needed; over the hard limit the launch ends."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        with counters.attach(group.perf, SOFTWARE) as counting:
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 128
            assert not counting.read()["task-clock"].unavailable
        thousand = list(range(before[1]))
        with (
            pytest.raises(SetupError, match="descriptors"),
            counters.attach(group.perf, SOFTWARE, lambda: thousand),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_opened_in_the_background(group: cgroup.Cgroup) -> None:
    """Opening can go on while the launch does; errors come out of ready, and nothing stays open."""
    fds = len(os.listdir("/proc/self/fd"))
    with counters.attach(group.perf, ("task-clock",), later=True) as counting:
        counting.ready()
        run_in(group.agent, "pass")
        assert counting.read()["task-clock"].value > 0
    with (
        pytest.raises(FileNotFoundError),
        counters.attach(group.unified / "gone", ("task-clock",), later=True) as counting,
    ):
        counting.ready()
    with counters.attach(group.perf, ("task-clock",), later=True):
        pass
    assert len(os.listdir("/proc/self/fd")) == fds


def test_cost(group: cgroup.Cgroup) -> None:
    """Six events are cheap to open and read while cgroup events are in use on the machine."""
    times = []
    with counters.attach(group.perf, ("task-clock",)):  # pays the machine's first event
        for _ in range(20):
            began = time.perf_counter()
            with counters.attach(group.perf, SOFTWARE) as counting:
                counting.read()
                times.append((time.perf_counter() - began) / len(counters.online()) * 2)
    median = sorted(times)[len(times) // 2]
    print(f"open and read, 2 CPUs × {len(SOFTWARE)} events: {median * 1000:.2f} ms")
    assert median < 0.02
