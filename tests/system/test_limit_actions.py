"""What the profile has follow from a limit that the agent hits: log, defcon, freeze, kill.

Each with ``log`` as its control: the same agent, under the same limit, goes on.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from harness import MIS, MIS_RUN, Done, mis, run, wait_for
from leftovers import snapshot

from mis_run import cgroup

pytestmark = pytest.mark.root

FORKS = """
import os, signal, sys, time
def fill():
    made = []
    try:
        while len(made) < 200:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            made.append(pid)
    except OSError:
        return True
    finally:
        for pid in made:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
gap, last = 0.0, time.monotonic()
def go_on(seconds):
    global gap, last
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        gap, last = max(gap, time.monotonic() - last), time.monotonic()
        time.sleep(0.02)
for _ in range(int(sys.argv[1])):
    print("refused", fill(), flush=True)
    go_on(0.3)
go_on(1)
print("gap", gap)
sys.exit(5)
"""
MEMORY = """
import os, sys, time
pid = os.fork()
if pid == 0:
    bytearray(400 << 20)
    os._exit(0)
print("child", os.waitpid(pid, 0)[1], flush=True)
time.sleep(1.5)
sys.exit(5)
"""
BURN = """
import sys, time
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
sys.exit(5)
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def agent(workspace: Path, profile: str, script: str, *words: str) -> Done:
    """The script under a profile of these lines."""
    path = workspace.parent / "limits.toml"
    path.write_text(f'extends = "default"\n{profile}\n')
    options = ("--profile", str(path), "--net", "none")
    return run("/usr/bin/python3", "-c", script, *words, cwd=workspace, options=options)


def of(done: Done, kind: str) -> list[dict[str, object]]:
    return [event["subject"] for event in done.events if event["kind"] == kind]


def gap(done: Done) -> float:
    return float(done.out.split()[-1])


@pytest.mark.parametrize(
    ("limit", "key", "words"),
    [
        ("pids = 16", "pids", (FORKS, "1")),
        ('memory = "64M"', "oom", (MEMORY,)),
        ("cpus = 0.2", "throttled", (BURN,)),
    ],
)
def test_a_limit_that_kills(limit: str, key: str, words: tuple[str, ...], workspace: Path) -> None:
    """Killed whole with 137 and the limit's name, by the limit that is named and by no other."""
    others = {"oom", "pids", "throttled", "pressure"} - {key}
    elsewhere = "\n".join(f'on_{other} = "kill"' for other in others if other != "pressure")
    for action, code in (("kill", 137), ("log", 5)):
        text = f'[limits]\nmemory = "2G"\n{limit}\n' if key != "oom" else f"[limits]\n{limit}\n"
        done = agent(workspace, f'{text}{elsewhere}\non_{key} = "{action}"', *words)
        assert done.code == code, (action, done.out, done.err)
        assert of(done, f"limits.{key}")
        assert not done.denied("limits")
        (end,) = of(done, "run.exit")
        killed = of(done, "run.killed")
        if action == "kill":
            assert f"limits.on_{key}" in str(end["ending"])
            assert (len(killed), killed[0]["populated"]) == (1, 0)
            assert of(done, f"limits.{key}")[0]["action"] == "kill"
        else:
            assert (killed, "action" in of(done, f"limits.{key}")[0]) == ([], False)


def test_a_limit_that_counts_as_a_violation(workspace: Path) -> None:
    """Violations and levels rise with each look that finds forks refused, to DEFCON 1; under
    ``log`` there is none."""
    profile = '[limits]\npids = 16\non_pids = "{}"\n[defcon]\nthresholds = [1, 2, 3, {}]'
    done = agent(workspace, profile.format("defcon", 100), FORKS, "3")
    assert done.code == 5, done.err
    (end,) = of(done, "run.exit")
    assert end["violations"] == len(done.denied("limits.pids")) > 1
    assert of(done, "defcon.change")[0]["cause"] == "limits.pids"
    ended = agent(workspace, profile.format("defcon", 4), FORKS, "40")
    assert ended.code == 119, ended.err
    assert [change["to"] for change in of(ended, "defcon.change")] == [4, 3, 2, 1]
    control = agent(workspace, profile.format("log", 4), FORKS, "3")
    assert (control.code, of(control, "run.exit")[0]["violations"]) == (5, 0), control.err
    assert of(control, "limits.pids") and not of(control, "defcon.change")


def test_a_limit_that_freezes(workspace: Path) -> None:
    """All of the agent stands still for two seconds, then it goes on to its own end."""
    profile = '[limits]\npids = 16\non_pids = "{}"'
    frozen = agent(workspace, profile.format("freeze"), FORKS, "1")
    assert frozen.code == 5, frozen.err
    assert "refused True" in frozen.out
    control = agent(workspace, profile.format("log"), FORKS, "1")
    assert control.code == 5, control.err
    assert gap(control) < 1 < 1.9 < gap(frozen) < 5
    assert "canary.lost" not in {event["kind"] for event in frozen.events}


@pytest.mark.parametrize("loose", ["[mode]\nenforce = false", "[defcon]\nact = false"])
def test_a_profile_that_only_records_kills_nothing(loose: str, workspace: Path) -> None:
    """The event says what would have followed."""
    profile = f'[limits]\npids = 16\non_pids = "kill"\n{loose}'
    done = agent(workspace, profile, FORKS, "1")
    assert done.code == 5, done.err
    first = of(done, "limits.pids")[0]
    assert (first["action"], first["acts"]) == ("kill", False)
    assert not of(done, "run.killed")


def begun(workspace: Path, profile: str, name: str) -> tuple[subprocess.Popen[bytes], Path]:
    """The agent in the background, seen to hit its limit, which freezes it; and its record."""
    path, record = workspace.parent / "limits.toml", workspace.parent / "record.jsonl"
    path.write_text(f'extends = "default"\n[limits]\npids = 16\non_pids = "freeze"\n{profile}\n')
    options = ("--profile", str(path), "--net", "none", "--log", str(record), "--name", name)
    quiet = subprocess.DEVNULL
    started = subprocess.Popen(
        [*MIS_RUN, *options, "--", "/usr/bin/python3", "-c", FORKS, "1"],
        cwd=workspace,
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
    )
    wait_for(lambda: record.exists() and '"limits.pids"' in record.read_text(), 20)
    return started, record


def test_a_frozen_agent_can_be_killed(workspace: Path) -> None:
    """At once, not when it thaws."""
    before = snapshot()
    started, record = begun(workspace, "", "frozen")
    assert mis("kill", "frozen").returncode == 0
    assert started.wait(10) == 137
    events = [json.loads(line) for line in record.read_text().splitlines()]
    hit, killed = (
        next(event for event in events if event["kind"] == kind)
        for kind in ("limits.pids", "run.killed")
    )
    assert killed["time"] - hit["time"] < 1.9
    assert killed["subject"]["populated"] == 0
    assert snapshot() == before


def test_an_agent_frozen_by_a_lost_supervisor_goes_on(workspace: Path) -> None:
    """``on_loss = "open"``: the watchdog knows that the supervisor froze it."""
    before = snapshot()
    started, record = begun(workspace, '[liveness]\non_loss = "open"', "frozen")
    started.kill()
    started.wait(10)
    wait_for(lambda: "watchdog.open" in record.read_text())
    _, unified, _ = cgroup.detect()
    assert unified is not None
    own = json.loads(record.read_text().splitlines()[0])["run"]
    (frozen,) = unified.glob(f"mis*/**/{own}/cgroup.events")
    wait_for(lambda: "frozen 0" in frozen.read_text(), 1)  # of the two seconds
    again = subprocess.Popen([*MIS, "attach", "frozen"], stderr=subprocess.DEVNULL)
    try:
        assert again.wait(30) == 5
    finally:
        again.kill()
        with suppress(FileNotFoundError):  # gone, as it should be
            frozen.with_name("cgroup.kill").write_text("1")
    assert snapshot() == before
