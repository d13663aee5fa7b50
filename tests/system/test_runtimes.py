"""Real launches with each OCI runtime that mis-run can use; the machine's cgroups may be v2 only
(the virtual machine runs them too) or hybrid.

The host plane is asked for: it is the one that needs descriptors from the runtime.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from acts import TRIED
from harness import HOST4, MIS_RUN, host_elsewhere, mis, run, wait_for
from runtimes import (  # noqa: F401 - two are fixtures
    PYTHON,
    clean_workspace,
    each_runtime,
    event,
    options,
)

ACTS = (
    TRIED
    + """def talk(port):
    with socket.create_connection((sys.argv[1], port), 20) as sock:
        sock.sendall(b"from " + sys.argv[2].encode())
        assert sock.recv(100).startswith(b"echo"), "no echo"
tried("secret", lambda: open("none/file"))
tried("file", lambda: open("open/file"))
tried("outlaw", lambda: subprocess.run(["open/outlaw"]))
tried("program", lambda: subprocess.run(["open/fine"], check=True))
tried("other port", lambda: talk(7002))
tried("port", lambda: talk(7001))
tried("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
tried("mount", lambda: os.chroot("/"))
tried("algorithms", lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))
print(open("/proc/self/cgroup").read().strip())
sys.exit(7)
"""
)
RULES = """
[files]
read = ["@system", "$WORKSPACE/open"]
write = ["$WORKSPACE/open"]
[exec]
allow = ["@system", "$WORKSPACE/open"]
deny = ["$WORKSPACE/open/outlaw"]
"""


def test_every_guard(runtime: str, workspace: Path) -> None:
    """File, program, network and escape guards are attached and proven, refuse what they must and
    nothing else; the same acts succeed outside."""
    for name in ("none", "open"):
        (workspace / name).mkdir()
        (workspace / name / "file").write_text("x")
    for name in ("outlaw", "fine"):
        (workspace / "open" / name).write_bytes(Path("/bin/true").read_bytes())
        (workspace / "open" / name).chmod(0o755)
    with host_elsewhere(workspace.parent) as there:
        rules = options(workspace, RULES, "guarded")
        rules += ("--allow-net", f"{HOST4}:7001/tcp")
        done = run(*PYTHON, ACTS, HOST4, "inside", cwd=workspace, options=rules, timeout=100)
        lines = done.out.splitlines()
        acts = dict(line.rsplit(" ", 1) for line in lines if ":" not in line)
        refused = ("secret", "outlaw", "other port", "raw", "mount", "algorithms")
        allowed = ("file", "program", "port")
        assert acts | {"algorithms": "EPERM"} == {
            **dict.fromkeys(refused, "EPERM"),
            **dict.fromkeys(allowed, "OK"),
        }, done.err
        assert acts["algorithms"] == "EAFNOSUPPORT"  # what a kernel without them says
        assert {line.split(":", 2)[2] for line in lines if ":" in line} == {"/"}  # its cgroups
        assert done.code == 7
        assert there.got() == ["from inside"]
        # The control: nothing of that is refused to whom no rule binds.
        argv = [*PYTHON, ACTS, HOST4, "outside"]
        free = subprocess.run(argv, cwd=workspace, capture_output=True, text=True, check=False)
        tried = [line for line in free.stdout.splitlines() if ":" not in line]
        control = dict(line.rsplit(" ", 1) for line in tried)
        assert {control[name] for name in (*refused, *allowed) if name != "algorithms"} == {"OK"}
    kinds = {one["kind"].partition(".")[0] for one in done.denied()}
    assert kinds == {"file", "exec", "net", "escape"}
    start = event(done, "run.start")
    assert {"fanotify", "seccomp-notify", "cgroup-bpf", "xdp"} <= set(start["mechanisms"])
    assert event(done, "run.exit")["level"] == 3  # six violations


LOOP = """
import os
out = os.open("tries", os.O_WRONLY | os.O_CREAT)  # before any level closes writing
for count in range(1000):
    os.pwrite(out, b"%4d" % count, 0)
    try:
        open("/etc/shadow")
        os.pwrite(out, b" read", 4)
    except OSError:
        pass
"""


def test_emergency(runtime: str, workspace: Path) -> None:
    """Fifteen violations end the agent, proven empty; where levels do not act it goes on."""
    rules = options(workspace)
    done = run(*PYTHON, LOOP, cwd=workspace, options=rules, timeout=100)
    assert done.code == 119, done.err
    assert int((workspace / "tries").read_text()) < 100  # and not one " read"
    assert event(done, "run.killed")["populated"] == 0
    rules = options(workspace, "[defcon]\nact = false\n")
    few = LOOP.replace("1000", "40")
    control = run(*PYTHON, few, cwd=workspace, options=rules, timeout=100)
    assert control.code == 0, control.err
    assert (workspace / "tries").read_text() == "  39"


def test_signals(runtime: str, workspace: Path) -> None:
    """A signal to mis-run reaches the agent, which may answer it with its own exit code; one that
    ends the agent is told as 128 + its number."""
    script = 'trap "exit 3" TERM; touch ready; while :; do sleep 0.1; done'
    argv = [*MIS_RUN, *options(workspace), "--", "sh", "-c", script]
    with subprocess.Popen(argv, cwd=workspace, stdin=-3, stdout=-3, stderr=-1) as agent:
        wait_for((workspace / "ready").exists, 80)
        agent.terminate()
        _, err = agent.communicate(timeout=20)
    assert agent.returncode == 3, err
    done = run("sh", "-c", "kill -9 $$", cwd=workspace, options=options(workspace), timeout=100)
    assert done.code == 128 + signal.SIGKILL, done.err


def test_the_launcher_is_killed(runtime: str, workspace: Path) -> None:
    """SIGKILL of mis-run takes the agent along, and gc leaves nothing."""
    script = "echo $$; touch ready; while :; do date +%s%N >beat; sleep 0.1; done"
    argv = [*MIS_RUN, *options(workspace), "--", "sh", "-c", script]
    with subprocess.Popen(argv, cwd=workspace, stdin=-3, stdout=-3, stderr=-3) as supervisor:
        wait_for((workspace / "beat").exists, 80)
        supervisor.kill()
        supervisor.wait()
    time.sleep(2)
    last = (workspace / "beat").read_text()
    time.sleep(1)
    assert (workspace / "beat").read_text() == last
    assert mis("gc").returncode == 0
    wait_for(lambda: not list(Path("/run/mis").glob("*/state.json")), 10)


def test_terminal(runtime: str, workspace: Path) -> None:
    """With -t the agent has a terminal, sent by the runtime; without it has none."""
    script = 'test -t 0 && test -t 1 && stty size >&2 && echo "a terminal"'
    ours, theirs = os.openpty()
    argv = ["setsid", "--ctty", "--wait", *MIS_RUN, *options(workspace), "-q", "-t"]
    argv += ["--", "sh", "-c", script]
    with subprocess.Popen(argv, cwd=workspace, stdin=theirs, stdout=theirs, stderr=theirs) as run_:
        os.close(theirs)
        said = b""
        try:
            while data := os.read(ours, 1000):
                said += data
        except OSError:  # EIO: the other end is closed
            pass
    os.close(ours)
    assert run_.returncode == 0, said
    assert b"a terminal" in said
    done = run("sh", "-c", script, cwd=workspace, options=options(workspace), timeout=100)
    assert done.code == 1, done.err


def test_a_runtime_that_sends_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that installs no filter, and so has no descriptor to send, does not launch."""
    fake = workspace.parent / "crun"
    fake.write_text(
        "#!/usr/bin/python3 -I\n"
        "import json, os, sys\n"
        'if "--bundle" in sys.argv:\n'
        '    path = sys.argv[sys.argv.index("--bundle") + 1] + "/config.json"\n'
        "    config = json.load(open(path))\n"
        '    del config["linux"]["seccomp"]\n'
        '    json.dump(config, open(path, "w"))\n'
        'os.execv("/usr/bin/crun", sys.argv)\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("MIS_RUNTIME", str(fake))
    done = run("touch", "ran", cwd=workspace, options=options(workspace), timeout=100)
    assert done.code == 121, done.err
    assert "sent no descriptor" in done.err
    assert "Traceback" not in done.err
    assert not (workspace / "ran").exists()
    monkeypatch.setenv("MIS_RUNTIME", "crun")
    done = run("touch", "ran", cwd=workspace, options=options(workspace), timeout=100)
    assert done.code == 0, done.err
    assert (workspace / "ran").exists()


def test_heartbeat(runtime: str, workspace: Path) -> None:
    """Every guard is proven again and again while the agent runs, none is lost or late, and what
    the agent does is told apart from that."""
    script = "sleep 5; unshare -r true"
    done = run("sh", "-c", script, cwd=workspace, options=options(workspace), timeout=100)
    assert done.code == 1, done.err
    assert [one["kind"] for one in done.denied()] == ["escape.unshare"]
    assert event(done, "run.exit")["canaries"] >= 1
    assert not [one for one in done.events if one["kind"].startswith("canary.")]
