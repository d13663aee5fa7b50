"""A launch as a person sees it: exit codes, streams, signals, limits, files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness import MIS_RUN, PACE, ROOT, mis, run, start, wait_for

pytestmark = pytest.mark.root


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def test_exit_codes_are_the_agents(workspace: Path) -> None:
    """0, a number, and 128 + n for a signal pass through."""
    assert run("true", cwd=workspace).code == 0
    assert run("sh", "-c", "exit 37", cwd=workspace).code == 37
    assert run("sh", "-c", "kill -TERM $$", cwd=workspace).code == 128 + signal.SIGTERM


def test_command_that_is_not_there(workspace: Path) -> None:
    """A missing command is 127, one that is no program 126, each with a message."""
    missing = run("/no/such/program", cwd=workspace)
    assert missing.code == 127
    assert "/no/such/program" in missing.err
    (workspace / "data").write_text("no program")
    assert run("./data", cwd=workspace).code == 126


def test_streams_pass_through(workspace: Path) -> None:
    """stdin reaches the agent; stdout and stderr stay apart."""
    done = run("sh", "-c", "cat; echo problem >&2", cwd=workspace, input="words\n")
    assert done.out == "words\n"
    assert "problem" in done.err


def test_redirected_files_are_only_what_they_were_given_for(workspace: Path) -> None:
    """A file that is standard input cannot be written to, one that is standard output cannot be
    read; without mis-run, the control, both can."""
    read, write = workspace.parent / "read", workspace.parent / "write"
    text = "kept\n"
    for command, kept in (((*MIS_RUN, "-q", "--"), True), ((), False)):
        read.write_text(text)
        write.write_text("before\n")
        with read.open() as stdin, write.open("a") as stdout:
            words = (*command, "sh", "-c", "echo gone > /proc/self/fd/0")
            subprocess.run(words, stdin=stdin, stdout=stdout, cwd=workspace, check=False)
            back = subprocess.run(
                (*command, "timeout", "1", "head", "-n", "1", "/proc/self/fd/1"),
                stdin=stdin,
                stdout=stdout,
                cwd=workspace,
                check=False,
            )
        assert (read.read_text() == text) is kept
        assert (write.read_text() == "before\n") is kept, back


def test_redirected_streams_arrive_whole(workspace: Path) -> None:
    """Every byte, two streams into one file in their order, and /dev/stdout can be opened."""
    read, both = workspace.parent / "read", workspace.parent / "both"
    read.write_text(text := "".join(f"{number}\n" for number in range(50000)))
    script = "cat; echo out; echo err >&2; echo more | tee -a /dev/stderr; echo end > /dev/stdout"
    with read.open() as stdin, both.open("a") as stream:
        words = (*MIS_RUN, "-q", "--", "sh", "-c", script)
        done = subprocess.run(
            words, stdin=stdin, stdout=stream, stderr=stream, cwd=workspace, check=False
        )
    assert done.returncode == 0
    assert both.read_text() == f"{text}out\nerr\nmore\nmore\nend\n"


def test_streams_that_lead_to_the_host_are_refused(workspace: Path) -> None:
    """A folder and a disk are refused; closed streams are /dev/null."""
    disks = [str(path) for path in Path("/dev").iterdir() if path.is_block_device()]
    for command, path, words in (
        (str(ROOT / "mis-run"), str(workspace), b"standard input is a folder"),
        *((" ".join(MIS_RUN), disk, b"standard input is a disk") for disk in disks[:1]),
    ):
        refused = subprocess.run(
            ("sh", "-c", f"{command} -- true < {path}"),
            cwd=workspace,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert refused.returncode == 2, refused.stderr
        assert words in refused.stderr
    script = "readlink /proc/self/fd/0 /proc/self/fd/1 > seen"
    closed = 'exec "$@" <&- >&-'
    words = ("sh", "-c", closed, "sh", *MIS_RUN, "-q", "--", "sh", "-c", script)
    done = subprocess.run(words, cwd=workspace, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr
    assert (workspace / "seen").read_text().splitlines()[0] == "/dev/null"


def test_a_socket_that_leads_on_is_refused(workspace: Path) -> None:
    """A listener or datagrams of the host as standard input; a pair, as ssh makes one, works."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        for given in (listener, datagrams):
            argv = (*MIS_RUN, "--", "true")
            refused = subprocess.run(argv, cwd=workspace, stdin=given, stderr=-1, check=False)
            assert refused.returncode == 2, refused.stderr
            assert b"standard input is a socket" in refused.stderr
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"spoken to\n")
        ours.shutdown(socket.SHUT_WR)
        argv = (*MIS_RUN, "-q", "--", "cat")
        done = subprocess.run(argv, cwd=workspace, stdin=theirs, stdout=-1, check=False)
    assert (done.returncode, done.stdout) == (0, b"spoken to\n")


def test_files_belong_to_the_invoking_user(workspace: Path) -> None:
    """Under sudo, files made in the workspace belong to the user who called it."""
    env = {"SUDO_UID": "65534", "SUDO_GID": "65534", "SUDO_USER": "nobody"}
    done = run("touch", "mine", cwd=workspace, env=env)
    assert done.code == 0, done.err
    assert (workspace / "mine").stat().st_uid == 65534


def test_writes_outside_the_workspace_vanish(workspace: Path) -> None:
    """The agent may write to /usr/local, and the host's /usr/local never sees it."""
    command = "echo x > /usr/local/mis-was-here && cat /usr/local/mis-was-here && touch kept"
    done = run("sh", "-c", command, cwd=workspace, options=("--user", "0"))
    assert done.code == 0, done.err
    assert not Path("/usr/local/mis-was-here").exists()
    assert (workspace / "kept").exists()


def test_secrets_are_hidden(workspace: Path) -> None:
    """Password hashes and root's home read as nothing inside, though they exist outside."""
    assert Path("/etc/shadow").read_text()
    script = "cat /etc/shadow; ls -A /root | head -1"
    done = run("sh", "-c", script, cwd=workspace, options=("--user", "0"))
    assert done.out.strip() == ""


def test_sockets_of_services_cannot_be_reached(workspace: Path) -> None:
    """A service's socket in the workspace refuses the agent, though it may write to the file; one
    that is bound by name, the control, answers, and so does one of the agent's own."""
    script = """
import socket
def ask(name):
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(name)
        except OSError as error:
            return error.strerror
        return client.recv(10).decode()
print(ask("service"), ask("meant"))
with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
    server.bind("own")
    server.listen()
    client.connect("own")
"""
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for name, service in (("service", first), ("meant", second)):
            service.bind(str(workspace / name))
            (workspace / name).chmod(0o777)
            service.listen()
        answer = threading.Thread(target=lambda: second.accept()[0].send(b"hello"), daemon=True)
        answer.start()
        meant = ("--bind", str(workspace / "meant"), "--log", str(workspace.parent / "log"))
        done = run("/usr/bin/python3", "-c", script, cwd=workspace, options=meant)
    assert (done.code, done.out) == (0, "Connection refused hello\n"), done.err
    begin = json.loads((workspace.parent / "log").read_text().splitlines()[0])
    assert begin["subject"]["covered"] == [str(workspace / "service")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_forwarded(number: signal.Signals, workspace: Path) -> None:
    """A signal to mis-run reaches the agent, which may handle it."""
    script = f"trap 'echo caught; exit 9' {number.name[3:]}; echo up; while :; do sleep 0.05; done"
    agent = start("sh", "-c", script, cwd=workspace)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "up\n"
    agent.send_signal(number)
    out, _ = agent.communicate(timeout=20)
    assert (agent.returncode, out) == (9, "caught\n")


def test_second_interrupt_kills(workspace: Path) -> None:
    """An agent that ignores SIGINT ends at the second one."""
    agent = start("sh", "-c", "trap '' INT; echo up; while :; do sleep 1; done", cwd=workspace)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "up\n"
    agent.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert agent.poll() is None
    agent.send_signal(signal.SIGINT)
    agent.communicate(timeout=20)
    assert agent.returncode == 128 + signal.SIGKILL


def test_timeout_asks_then_ends(workspace: Path) -> None:
    """--timeout sends SIGTERM first and gives the exit code of timeout(1)."""
    script = "trap 'echo asked; exit 0' TERM; while :; do sleep 0.05; done"
    done = run("sh", "-c", script, cwd=workspace, options=("--timeout", "1s"))
    assert done.code == 124
    assert done.out == "asked\n"


def test_memory_hog_is_contained(workspace: Path) -> None:
    """An agent over its memory limit is killed by the kernel and the summary says so."""
    script = "x = bytearray(400 << 20); print(len(x))"
    done = run("/usr/bin/python3", "-c", script, cwd=workspace, options=("--memory", "64M"))
    assert done.code == 137, (done.out, done.err)
    assert "memory limit" in done.err
    assert any(event["kind"] == "limits.oom" for event in done.events)
    fits = run("/usr/bin/python3", "-c", script, cwd=workspace, options=("--memory", "1G"))
    assert fits.code == 0, fits.err


BOMB = f"""
import os, time
made = refused = 0
end = time.monotonic() + {2 * PACE}
while time.monotonic() < end and made < 400:
    try:
        if os.fork() == 0:
            time.sleep({3 * PACE})
            os._exit(0)
        made += 1
    except OSError:
        refused += 1
        time.sleep(0.01)
print(made, refused)
"""


def test_fork_bomb_is_contained(workspace: Path) -> None:
    """Forks beyond --pids fail inside and the host goes on answering."""
    done = run("/usr/bin/python3", "-c", BOMB, cwd=workspace, options=("--pids", "32"))
    made, refused = map(int, done.out.split())
    assert made < 32
    assert refused > 0
    assert any(event["kind"] == "limits.pids" for event in done.events)
    free = run("/usr/bin/python3", "-c", BOMB, cwd=workspace, options=("--pids", "600"))
    assert int(free.out.split()[0]) == 400


STORM = """
import os, socket, sys, time
def act():
    for n in range(30):
        try: socket.create_connection(("192.0.2.66", 1000 + n), 1)
        except OSError: pass
        time.sleep(0.005)
how = sys.argv[1]
if how == "forks":
    for n in range(30):
        if os.fork() == 0:
            try: socket.create_connection(("192.0.2.66", 1000 + n), 1)
            except OSError: pass
            os._exit(0)
        os.wait()
elif how == "grandchild":
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: act()
        os._exit(0)
elif how == "thread":
    import threading
    threading.Thread(target=act).start()
else:
    act()
time.sleep(5)
print("survived")
"""


@pytest.mark.parametrize("how", ["alone", "forks", "grandchild", "thread"])
def test_violations_add_up_to_the_end(how: str, workspace: Path) -> None:
    """Fifteen violations, whoever commits them, are DEFCON 1: killed whole, proven empty."""
    words = ("/usr/bin/python3", "-c", STORM, how)
    done = run(*words, cwd=workspace)
    assert done.code == 119, (done.out, done.err)
    levels = [e["subject"]["to"] for e in done.events if e["kind"] == "defcon.change"]
    assert levels == [4, 3, 2, 1]
    killed = next(event for event in done.events if event["kind"] == "run.killed")["subject"]
    assert killed["populated"] == 0
    counted = run(*words, cwd=workspace, options=("--profile", "trace"))
    assert (counted.code, counted.out) == (0, "survived\n"), counted.err


def test_watchdog_ends_the_agent_of_a_stopped_supervisor(workspace: Path) -> None:
    """A supervisor that hangs is noticed within the deadline; the agent and it are ended."""
    agent = start("sh", "-c", "echo up; sleep 654", cwd=workspace)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "up\n"
    time.sleep(0.5)
    agent.send_signal(signal.SIGSTOP)
    wait_for(lambda: not _alive("sleep 654"), 3)
    agent.wait(10)
    assert agent.returncode == -signal.SIGKILL
    wait_for(lambda: json.loads(mis("ps", "--json").stdout) == [], 5)


def test_death_of_the_watchdog_closes_the_run(workspace: Path) -> None:
    """When the watchdog is killed, so is the agent, and the exit code says so."""
    agent = start("sh", "-c", "echo up; sleep 655", cwd=workspace)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "up\n"
    found = subprocess.run(
        ["pgrep", "-P", str(agent.pid), "-f", "mis-watchdog"], capture_output=True, check=True
    )
    os.kill(int(found.stdout), signal.SIGKILL)
    agent.communicate(timeout=10)
    assert agent.returncode == 123
    assert not _alive("sleep 655")


def test_cpu_burner_is_throttled(workspace: Path) -> None:
    """Two seconds of burning under --cpus 0.25 use about half a second of CPU."""
    script = "import time; end = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    slow = run("/usr/bin/python3", "-c", script, cwd=workspace, options=("--cpus", "0.25"))
    free = run("/usr/bin/python3", "-c", script, cwd=workspace)
    used = [
        next(e for e in done.events if e["kind"] == "run.exit")["subject"]["usage"]["cpu_seconds"]
        for done in (slow, free)
    ]
    assert used[1] - used[0] > 1.0, used  # both began and ended alike
    if PACE == 1:  # where that is quick
        assert used[0] < 1.0 < used[1], used


def test_dry_run_changes_nothing(workspace: Path) -> None:
    """--dry-run prints the plan as text or JSON and makes nothing."""
    text = run("true", cwd=workspace, options=("--dry-run",))
    assert text.code == 0
    assert "guarantees" in text.out
    as_json = run("true", cwd=workspace, options=("--dry-run", "--json"))
    assert json.loads(as_json.out)["command"] == ["true"]
    assert not text.events


def test_ps_top_inspect_kill(workspace: Path) -> None:
    """A live run is listed, measured, inspected and killed by its name."""
    agent = start("sleep", "60", cwd=workspace, options=("--name", "sleeper"))
    try:
        wait_for(lambda: "running" in mis("ps").stdout)
        rows = json.loads(mis("ps", "--json").stdout)
        assert [row["name"] for row in rows] == ["sleeper"]
        assert "sleeper" in mis("top", "--once").stdout
        plan = json.loads(mis("inspect", "sleeper").stdout)["plan"]
        assert plan["command"] == ["sleep", "60"]
        assert "DEFCON 5" in mis("defcon", "sleeper").stdout
        assert mis("kill", "sleeper").returncode == 0
        agent.communicate(timeout=10)
        assert agent.returncode == 137
    finally:
        agent.kill()
        agent.wait()
    assert json.loads(mis("ps", "--json").stdout) == []


def test_terminal_works(workspace: Path) -> None:
    """Under a terminal the agent has one: its size, job control, and our exit code."""
    import pty

    pid, master = pty.fork()
    if pid == 0:
        os.chdir(workspace)
        os.execv(MIS_RUN[0], [*MIS_RUN, "--", "sh", "-c", "tty; stty size; read x; exit 5"])
    import fcntl
    import struct
    import termios

    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    seen = b""
    end = time.monotonic() + 20
    sent = False
    while time.monotonic() < end:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        seen += data
        if b"99" in seen and not sent:
            os.write(master, b"go\r")
            sent = True
    _, status = os.waitpid(pid, 0)
    os.close(master)
    assert os.waitstatus_to_exitcode(status) == 5, seen
    assert b"/dev/" in seen
    assert b"33 99" in seen


def test_sigkill_of_mis_run_ends_the_agent(workspace: Path) -> None:
    """When mis-run is killed outright its agent dies within a second, and gc removes the rest."""
    agent = start("sh", "-c", "echo up; sleep 321", cwd=workspace)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "up\n"
    agent.kill()
    agent.wait()
    killed = time.monotonic()
    wait_for(lambda: not _alive("sleep 321"), 3)
    assert time.monotonic() - killed < 1.0
    assert mis("gc").returncode == 0


def _alive(words: str) -> bool:
    found = subprocess.run(["pgrep", "-f", f"^{words}$"], capture_output=True, check=False)
    return found.returncode == 0


def test_example_coder(tmp_path: Path) -> None:
    """The README's first agent repairs its project inside the sandbox."""
    done = run("/usr/bin/python3", "examples/agents/coder.py", cwd=checkout(tmp_path))
    assert done.code == 0, (done.out, done.err)
    assert "pass now" in done.out


def checkout(folder: Path) -> Path:
    """A checkout of our own to work in, so that the project's tree stays clean."""
    copy = folder / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    return copy


def test_restart_on_failure(workspace: Path) -> None:
    """A failing agent is run again until it ends well, each time as a new run."""
    script = "echo x >> tries; test $(wc -l < tries) -ge 2"
    done = run(
        *("sh", "-c", script),
        cwd=workspace,
        options=("--restart", "on-failure:3", "--net", "none"),
    )
    assert done.code == 0
    assert (workspace / "tries").read_text() == "x\nx\n"
    assert "attempt 2" in done.err
    assert len([event for event in done.events if event["kind"] == "run.start"]) == 2


@pytest.mark.parametrize(("action", "code"), [("log", 5), ("kill", 123), ("freeze", 5)])
def test_a_starved_supervisor(action: str, code: int, workspace: Path) -> None:
    """A supervisor that gets no CPU for more than half its deadline does what the profile says:
    stopped for 2.5 of 4 s, as a scheduler could."""
    profile = workspace.parent / "starved.toml"
    profile.write_text(
        'extends = "default"\n[liveness]\n'
        f'deadline = "4s"\nbeat = "50ms"\non_starved = "{action}"\n'
    )
    log = workspace.parent / "starved.jsonl"
    options = ("--profile", str(profile), "--net", "none", "--log", str(log))
    agent = start("sh", "-c", "echo up; sleep 5; exit 5", cwd=workspace, options=options)
    assert agent.stdout is not None and agent.stdout.readline() == "up\n"
    time.sleep(0.2)
    agent.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    agent.send_signal(signal.SIGCONT)
    agent.communicate(timeout=20)
    assert agent.returncode == code
    kinds = [json.loads(line)["kind"] for line in log.read_text().splitlines()]
    assert "supervisor.starved" in kinds
    assert ("supervisor.recovered" in kinds) == (action != "kill")


def test_a_hundred_resource_exhaustions(workspace: Path) -> None:
    """Memory, processes, descriptors, disk and CPU, twenty times each: every one ends at its
    limit, the run goes on, and the host keeps its memory, processes and disk."""
    script = """
import errno, os, resource, signal, sys
def child(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except (MemoryError, OSError):
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0
def memory():
    held = [bytearray(8 << 20) for _ in range(200)]
def forks():
    pids = []
    try:
        while len(pids) < 500:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            pids.append(pid)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
def descriptors():
    while True:
        os.dup(0)
def disk():
    try:
        with open("/var/tmp/full", "wb") as file:
            for _ in range(200):
                file.write(bytes(1 << 20)); file.flush()
    finally:
        os.unlink("/var/tmp/full")
def cpu():
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    signal.setitimer(signal.ITIMER_PROF, 0.02)
    while True:
        pass
ended = {act.__name__: sum(child(act) for _ in range(20))
         for act in (memory, forks, descriptors, disk, cpu)}
print(ended)
"""
    profile = workspace.parent / "small.toml"
    profile.write_text(
        'extends = "default"\n[limits]\nmemory = "96M"\npids = 64\ncpus = 1\nscratch = "32M"\n'
    )
    options = ("--profile", str(profile), "--net", "none")
    done = run("/usr/bin/python3", "-c", script, cwd=workspace, options=options, timeout=300)
    wanted = dict.fromkeys(("memory", "forks", "descriptors", "disk", "cpu"), 20)
    assert done.out.strip() == str(wanted), (done.out, done.err)
    kinds = {event["kind"] for event in done.events}
    assert {"limits.oom", "limits.pids"} <= kinds


def test_a_background_job_with_a_terminal_runs_on(workspace: Path) -> None:
    """Started in the background of a terminal mis-run neither stops nor takes the terminal."""
    import pty

    script = (
        f"set -m; cd {workspace}; {' '.join(MIS_RUN)} --net none -- sh -c 'echo in; sleep 0.2; "
        "echo out > done' & wait %1; echo code $?"
    )
    pid, master = pty.fork()
    if pid == 0:
        os.execvp("bash", ["bash", "-c", script])
    seen = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:  # EIO: everybody has closed the other end
            break
        if not data:
            break
        seen += data
    os.waitpid(pid, 0)
    os.close(master)
    assert b"code 0" in seen, seen
    assert (workspace / "done").read_text() == "out\n"


def test_a_stopped_supervisor_does_not_hold_up_others(workspace: Path) -> None:
    """`mis ps` answers at once, however often it asked a supervisor that does not listen."""
    profile = workspace.parent / "patient.toml"
    profile.write_text(f'extends = "default"\n[liveness]\ndeadline = "{60 * PACE}s"\n')
    options = ("--profile", str(profile), "--net", "none", "--name", "stopped")
    agent = start("sh", "-c", f"echo up; sleep {60 * PACE}", cwd=workspace, options=options)
    try:
        assert agent.stdout is not None and agent.stdout.readline() == "up\n"
        wait_for(lambda: "running" in mis("ps").stdout)
        agent.send_signal(signal.SIGSTOP)
        for _ in range(25):
            assert "stopped" in mis("ps").stdout
    finally:
        agent.kill()
        agent.communicate(timeout=20)
