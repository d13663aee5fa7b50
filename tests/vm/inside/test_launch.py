"""Real launches with `mis-run` where the BPF LSM is active: the kernel plane from end to end.

One launch takes ten seconds in an emulated machine, so each test has one, and looks at everything.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from acts import TRIED
from harness import MIS_RUN, mis, run, wait_for
from leftovers import snapshot

from mis_run.guards import lsm_plane

pytestmark = pytest.mark.usefixtures("plane")
NO_NET = ("--net", "none")
# An emulated machine is late without being lost.
SLOW = '[liveness]\ndeadline = "4s"\nbeat = "200ms"\ncanary = "2s"\n'


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """A folder to work in; after the test nothing of any run may be left, in the maps neither."""
    folder = tmp_path / "ws"
    folder.mkdir()
    before = snapshot()
    yield folder
    assert snapshot() == before
    plane = lsm_plane.ensure()
    left = [plane.registered(), plane.rings.items(), plane.rules.items()]
    plane.close()
    assert left == [{}, {}, {}]


def profile(folder: Path, text: str, require: str = "") -> tuple[str, ...]:
    path = folder.parent / "profile.toml"
    path.write_text(f'extends = "default"\n{require}{text}{SLOW}')
    return ("--profile", str(path), *NO_NET)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


def test_the_plan_chooses_it(workspace: Path) -> None:
    """The default profile needs nothing but the kernel; a pattern takes the file guard along; a
    word chooses; and doctor says that it works."""

    def mechanisms(*words: str) -> set[str]:
        argv = [*MIS_RUN, "--dry-run", "--json", *words, "--", "true"]
        done = subprocess.run(argv, cwd=workspace, capture_output=True, text=True, check=True)
        return {one["name"] for one in json.loads(done.stdout)["mechanisms"]}

    both = {"bpf-lsm", "fanotify"}
    assert mechanisms() & both == {"bpf-lsm"}
    assert mechanisms("--plane", "host") & both == {"fanotify"}
    named = profile(workspace, '[files]\ndeny = ["...", "**/*.key"]\n')
    assert mechanisms(*named) & both == both
    lost = str(workspace.parent / "lost.toml")
    Path(lost).write_text('extends = "default"\n[liveness]\non_loss = "open"\n')
    assert mechanisms("--profile", lost) & both == {"bpf-lsm"}
    assert "judged in LSM hooks" in mis("doctor").stdout


WORK = """
set -e
cat given; echo new > made; mkdir -p a/b; mv made a/b/moved; ln a/b/moved linked; rm linked
ls / >/dev/null; ls -R /etc >/dev/null 2>&1 || true
echo out > /dev/stderr; echo scratch > /tmp/s; cat /tmp/s
printf '#!/bin/sh\\necho script ran\\n' > script; chmod +x script; ./script; cp /bin/true t; ./t
(sleep 0.1 & wait); cat /proc/self/status | head -1; sh -c 'exit 0' | cat
/usr/bin/python3 -c 'import json, tempfile, subprocess; tempfile.TemporaryFile(); print(6 * 7)'
"""


def test_allowed_work_passes(workspace: Path) -> None:
    """What agents do all day is neither refused nor counted; output goes to any file."""
    (workspace / "given").write_text("given\n")
    out = workspace.parent / "out"
    record = workspace.parent / "record"
    options = profile(workspace, "")
    with out.open("w") as file:
        argv = [*MIS_RUN, "--log", str(record), *options, "--", "sh", "-c", WORK]
        done = subprocess.run(
            argv, cwd=workspace, stdin=subprocess.DEVNULL, stdout=file, stderr=-1, check=False
        )
    assert done.returncode == 0, done.stderr.decode()
    assert out.read_text().splitlines()[-1] == "42"
    assert "script ran" in out.read_text()
    events = [json.loads(line) for line in record.read_text().splitlines()]
    assert [event for event in events if event.get("verdict")] == []
    (start,) = (event for event in events if event["kind"] == "run.start")
    assert "bpf-lsm" in start["subject"]["mechanisms"]
    assert "fanotify" not in start["subject"]["mechanisms"]
    (end,) = (event for event in events if event["kind"] == "run.exit")
    assert end["subject"]["level"] == 5


CROWD = """
import threading
ready = threading.Barrier(5)
def act():
    ready.wait()
    try:
        open("secret")
    except PermissionError:
        pass
for one in [threading.Thread(target=act) for _ in range(5)]:
    one.start()
"""


def test_threads_count_one_by_one(workspace: Path) -> None:
    """The same act by five threads of a process at once is five violations: here they do not wait
    for the supervisor, who hears of all at once."""
    (workspace / "secret").write_text("x")
    options = profile(workspace, '[files]\ndeny = ["...", "**/secret"]\n')
    done = run("/usr/bin/python3", "-c", CROWD, cwd=workspace, options=options)
    denied = [event for event in done.events if event.get("verdict") == "deny"]
    assert len(denied) == len({event["subject"]["thread"] for event in denied}) == 5
    assert len({event["pid"] for event in denied}) == 1
    (change,) = (event["subject"] for event in done.events if event["kind"] == "defcon.change")
    assert (change["to"], change["violations"]) == (4, 3)


DENIED = (
    TRIED
    + """def connect():
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM); sock.connect(("198.51.100.1", 80))
def raw():
    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
tried("secret", lambda: open("/etc/shadow"))
tried("unlisted", lambda: open("none/file"))
tried("linked", lambda: os.link("none/file", "open/gained"))
tried("listed", lambda: os.listdir("none"))
tried("program", lambda: subprocess.run(["open/outlaw"]))
tried("allowed program", lambda: subprocess.run(["open/fine"], check=True))
tried("connect", connect)
tried("raw", raw)
tried("mount", lambda: os.chroot("/"))
"""
)


def test_denials(workspace: Path) -> None:
    """A file, a program, a socket and an escape are refused, each with its event; the same acts
    go on where no rule is in the way."""
    for name in ("open", "none"):
        (workspace / name).mkdir()
    (workspace / "none/file").write_text("x")
    for name in ("outlaw", "fine"):
        (workspace / "open" / name).write_bytes(Path("/bin/true").read_bytes())
        (workspace / "open" / name).chmod(0o755)
    rules = """
[files]
read = ["@system", "$WORKSPACE/open"]
write = ["$WORKSPACE/open"]
[exec]
allow = ["@system", "$WORKSPACE/open"]
deny = ["$WORKSPACE/open/outlaw"]
"""
    done = run(
        "/usr/bin/python3", "-I", "-c", DENIED, cwd=workspace, options=profile(workspace, rules)
    )
    got = dict(line.rsplit(" ", 1) for line in done.out.splitlines())
    assert got == {
        "secret": "EPERM",
        "unlisted": "EPERM",
        "linked": "EPERM",
        "listed": "OK",
        "program": "EPERM",
        "allowed program": "OK",
        "connect": "EPERM",
        "raw": "EPERM",
        "mount": "EPERM",
    }, done.err
    denied = done.denied()
    assert {"file.open", "file.link", "exec.run", "net.connect"} <= set(kinds(denied)), denied
    assert any(kind.startswith("escape.") for kind in kinds(denied))
    # The control: nothing of that is refused to whom no rule binds.
    os.link(workspace / "none/file", workspace / "open/control")
    assert subprocess.run([workspace / "open/outlaw"], check=False).returncode == 0
    assert Path("/etc/shadow").read_bytes()


LATE = """
import os, time
def deny():
    try:
        os.close(os.open("/etc/shadow", os.O_RDONLY))
    except PermissionError:
        return
    raise SystemExit("not denied")
for _ in range(3):
    deny()
time.sleep(1)  # the supervisor has heard of all
began = time.monotonic()
for _ in range(10):
    deny()
time.sleep(0.5)
print(time.monotonic() - began)
"""


@pytest.mark.parametrize("act", [True, False])
def test_delays_are_frozen_out(act: bool, workspace: Path) -> None:
    """Together by all their delays; the control only counts."""
    levels = "[defcon]\nthresholds = [1, 2, 900, 1000]\ndelays = [0.0001, 0.5, 0.5]\n"
    done = run(
        *("/usr/bin/python3", "-I", "-c", LATE),
        cwd=workspace,
        options=profile(workspace, f"{levels}act = {str(act).lower()}\n"),
    )
    assert done.code == 0, done.err
    assert len(done.denied("file.open")) == 13
    late = float(done.out) > 10 * 0.5 * 0.8
    assert late == act


LOOP = """
import os, sys
out = os.open("counts", os.O_RDWR | os.O_CREAT)
refused = read = allowed = 0
while True:
    try:
        os.close(os.open("/etc/shadow", os.O_RDONLY)); read += 1
    except OSError:
        refused += 1
    try:
        os.close(os.open("given", os.O_RDONLY)); allowed += 1
    except OSError:
        pass  # at DEFCON 2
    os.pwrite(out, b"%12d %12d %12d\\n" % (refused, read, allowed), 0)
"""


def counts(workspace: Path) -> list[int]:
    path = workspace / "counts"
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def test_defcon_1(workspace: Path) -> None:
    """Fifteen violations end the agent, in the act and then as a whole."""
    (workspace / "given").write_text("given")
    options = profile(workspace, "")
    done = run("/usr/bin/python3", "-I", "-c", LOOP, cwd=workspace, options=options)
    assert done.code == 119, done.err
    refused, read, _ = counts(workspace)
    assert read == 0
    assert 14 <= refused < 100
    (killed,) = (event for event in done.events if event["kind"] == "run.killed")
    assert killed["subject"]["populated"] == 0
    assert "kill" in [event.get("verdict") for event in done.events]


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()]


def test_all_of_us_are_killed(workspace: Path) -> None:
    """Supervisor and watchdog die by SIGKILL while the agent reads what it must not, and the shim
    is stopped, so that nobody is left to end it: not one read succeeds, and past the deadline the
    kernel ends it."""
    (workspace / "given").write_text("given")
    options = profile(workspace, "[defcon]\nact = false\n")
    argv = [*MIS_RUN, *options, "--", "/usr/bin/python3", "-I", "-c", LOOP]
    with subprocess.Popen(argv, cwd=workspace, stdin=-3, stdout=-3, stderr=-3) as supervisor:
        try:
            wait_for(lambda: counts(workspace) and counts(workspace)[0] > 20, 80)
        except AssertionError:
            supervisor.terminate()
            raise
        ours = children(supervisor.pid)
        # The shim is the child that has children: the agent.
        (shim,) = (pid for pid in ours if children(pid))
        (agent,) = children(shim)
        fd = os.pidfd_open(agent)
        os.kill(shim, signal.SIGSTOP)
        for pid in (supervisor.pid, *(pid for pid in ours if pid != shim)):
            os.kill(pid, signal.SIGKILL)
        at_death = counts(workspace)
        supervisor.wait()
    try:
        wait_for(lambda: _ended(fd), 15)
        after = counts(workspace)
        assert after[1] == 0
        assert after[0] > at_death[0] > 20  # it went on, and was refused
    finally:
        os.kill(shim, signal.SIGKILL)
        os.close(fd)
    time.sleep(0.5)
    wait_for(lambda: mis("gc").returncode == 0 and not lsm_plane.ensure().registered(), 10)


def _ended(pidfd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def test_what_only_a_name_tells(workspace: Path) -> None:
    """With the kernel plane the file guard judges what matches a pattern and is not there yet, and
    each act counts once; what was there is refused in the kernel."""
    (workspace / "old.key").write_text("x")
    script = "echo y > new.key; cat new.key; cat old.key; echo z > fine; cat fine"
    options = profile(workspace, '[files]\ndeny = ["...", "**/*.key"]\n')
    done = run("sh", "-c", script, cwd=workspace, options=options)
    assert done.out == "z\n", done.err
    paths = [Path(event["subject"]["path"]).name for event in done.denied("file.open")]
    assert paths == ["new.key", "new.key", "old.key"]
    inodes = ["inode" in event["subject"] for event in done.denied("file.open")]
    assert inodes == [False, False, True]  # the kernel's events have the inode


def test_audit(workspace: Path) -> None:
    """Without enforcement it goes on, and is told once."""
    (workspace / "none").write_text("x\n")
    rules = '[files]\nread = ["@system"]\nwrite = []\n[exec]\nallow = ["@system"]\n'
    rules += "[mode]\nenforce = false\n"
    done = run("cat", "none", cwd=workspace, options=profile(workspace, rules))
    assert done.out == "x\n", done.err
    told = [
        (event["verdict"], event["kind"], "inode" in event["subject"]) for event in done.denied()
    ]
    assert told == [("audit", "file.open", True)]


LITTLE = (
    TRIED
    + """
import ctypes
tried("null", lambda: open("/dev/null", "r+b", 0))
tried("status", lambda: open("/proc/self/status"))
tried("library", lambda: ctypes.CDLL("libm.so.6"))
tried("memory", lambda: open("/dev/shm/made", "w"))
tried("settings", lambda: open("/etc/hostname"))
tried("program", lambda: subprocess.run(["/usr/bin/id"], stdout=-3, check=True))
"""
)


def test_a_profile_that_names_little(workspace: Path) -> None:
    """Devices and /proc need no rule, as on the host plane; libraries of programs that may not be
    executed are mapped; all else that is not named is refused, and goes on where it is named."""
    rules = """
[files]
read = ["@system-libs", "@python", "$WORKSPACE"]
write = ["$WORKSPACE"]
[exec]
allow = ["@python"]
[defcon]
act = false
"""
    words = ("/usr/bin/python3", "-I", "-c", LITTLE)
    done = run(*words, cwd=workspace, options=profile(workspace, rules))
    met = dict(line.split() for line in done.out.splitlines())
    always = {"null": "OK", "status": "OK", "library": "OK"}
    named = ("memory", "settings", "program")
    assert met == always | dict.fromkeys(named, "EPERM"), done.err
    control = run(*words, cwd=workspace, options=profile(workspace, ""))
    met = dict(line.split() for line in control.out.splitlines())
    assert met == always | dict.fromkeys(named, "OK"), control.err


@pytest.mark.parametrize("marks", [True, False])
def test_taint(marks: bool, workspace: Path) -> None:
    """The file guard judges it here too, and when the open goes on all have the level: a program
    that never ran is refused; whoever read another file runs it."""
    (workspace / "named").write_text("named")
    (workspace / "other").write_text("other")
    script = (
        TRIED
        + """
with open(sys.argv[1]) as file:
    print(file.read())
tried("program", lambda: subprocess.run(["/usr/bin/id"], stdout=-3, check=True))
"""
    )
    options = profile(workspace, '[files]\ntaint = ["$WORKSPACE/named"]\n')
    word = "named" if marks else "other"
    words = ("/usr/bin/python3", "-I", "-c", script, word)
    done = run(*words, cwd=workspace, options=options)
    assert done.out.splitlines() == [word, "program EPERM" if marks else "program OK"], done.err
    (start,) = (event for event in done.events if event["kind"] == "run.start")
    assert {"bpf-lsm", "fanotify"} <= set(start["subject"]["mechanisms"])
    assert kinds(done.events).count("file.tainted") == marks
    assert kinds(done.denied()) == ["exec.run"] * marks


def test_levels_of_an_operator(workspace: Path) -> None:
    """`mis defcon` reaches the kernel: at 3 writing is for the workspace, at 5 for all."""
    script = (
        "echo 1 > /tmp/a && echo calm; touch ready; while [ ! -e go ]; do sleep 0.2; done;"
        "echo 2 > ws && echo inside; echo 2 > /tmp/a || echo refused"
    )
    options = (*profile(workspace, ""), "--name", "levels")
    argv = [*MIS_RUN, *options, "--", "sh", "-c", script]
    with subprocess.Popen(argv, cwd=workspace, stdin=-3, stdout=-1, stderr=-1, text=True) as agent:
        wait_for((workspace / "ready").exists, 80)
        assert mis("defcon", "levels", "3").returncode == 0
        (workspace / "go").touch()
        out, err = agent.communicate(timeout=60)
    assert out.split() == ["calm", "inside", "refused"], err
