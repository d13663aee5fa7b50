"""Containers of a real Docker engine under mis-oci-runtime: guarded as an agent of mis-run is.

Each denial has its negative control under plain runc, in the same engine and image.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import crowd
import engine as engines
import pytest
from engine import GATEWAY, Engine, events, runs, traces
from harness import MIS, ROOT, mis, wait_for

from mis_run.linux import abi

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(engines.why_not() is not None, reason=str(engines.why_not())),
]

PROFILES = {
    "open": f'[network]\nallow = ["{GATEWAY}:9/tcp"]\nlisten = ["*:1024-65535"]',
    "host": f'[network]\nmode = "host"\nallow = ["{GATEWAY}:9/tcp"]',
    "closed": '[network]\nmode = "none"',
    "files": (
        '[files]\ndeny = ["/etc/secret", "/work/*.key"]\nprotect = ["$WORKSPACE/.git/hooks"]\n'
        '[exec]\ndeny = ["/bin/forbidden"]'
    ),
    "taint": f'[files]\ntaint = ["/etc/secret", "*.key"]\n[network]\nallow = ["{GATEWAY}:9/tcp"]',
    "patient": "[defcon]\nthresholds = [1000, 2000, 3000, 4000]",
    "audit": "[mode]\nenforce = false",
    "lasting": (
        '[files]\ndeny = ["/work/*.key"]\n[defcon]\nthresholds = [1000, 2000, 3000, 4000]\n'
        '[liveness]\non_loss = "open"'
    ),
}
EPERM, ECONNREFUSED, EFAULT = 1, 111, 14
TTY = "/dev/pts/0"


def write_profiles(folder: Path, *, gateway: str = GATEWAY) -> Path:
    """The operator's file, with the test's own profiles; its path."""
    folder.mkdir()
    for name, text in PROFILES.items():
        text = text.replace(GATEWAY, gateway)
        (folder / f"{name}.toml").write_text(f'extends = "default"\n{text}\n')
    config = folder / "oci.toml"
    allowed = json.dumps([*PROFILES])
    config.write_text(
        f'profiles = "{folder}"\nallowed = {allowed}\nfrom_environment = true\n'
        'allow = ["on-loss-open"]\n'
    )
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profiles(tmp_path_factory.mktemp("operator") / "etc")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Iterator[Engine]:
    words = ["--mis-config", str(config)]
    runtimes: dict[str, Any] = {"mis": {"path": engines.RUNTIME, "runtimeArgs": words}}
    for name in PROFILES:
        pinned = [*words, "--mis-profile", name]
        runtimes[f"mis-{name}"] = {"path": engines.RUNTIME, "runtimeArgs": pinned}
    before = traces()
    with engines.running(tmp_path_factory.mktemp("engine"), runtimes) as running:
        yield running
    # Of all the containers below, and of all the ways they ended: nothing stays.
    assert traces() == before


@pytest.fixture
def box(engine: Engine) -> Iterator[Engine]:
    """The engine for tests that start containers by name: they are removed, and leave nothing."""
    before = traces()
    yield engine
    engines.remove_all(engine)
    wait_for(lambda: traces() == before, 5)


def met(done: subprocess.CompletedProcess[str]) -> int:
    """The errno that `act` met inside; everything else fails the test."""
    assert done.stdout.strip().isdecimal(), done.stderr
    return int(done.stdout)


def start(engine: Engine, *options: str, runtime: str = "mis", name: str = "box") -> str:
    """``docker run -d`` of a sleeping container; its id."""
    argv = ("run", "-d", "--runtime", runtime, "--name", name, *options)
    return engine.docker(*argv, engines.IMAGE, "sleep", "1000").stdout.strip()


def state_of(engine: Engine, name: str = "box") -> dict[str, Any]:
    done = engine.docker("inspect", "-f", "{{json .State}}", name)
    return dict(json.loads(done.stdout))


def ended(engine: Engine, name: str = "box") -> dict[str, Any]:
    wait_for(lambda: not state_of(engine, name)["Running"])
    return state_of(engine, name)


def facts() -> dict[str, Any]:
    """The state of the one guarded container."""
    (found,) = runs()
    return found


# ---- the guards, each with its negative control ----------------------------------------------


def acts(engine: Engine, *words: str, **how: Any) -> list[int]:
    """What each ``act WORDS`` met, all in one container."""
    done = engine.run("sh", "-c", "; ".join(f"act {word}" for word in words), **how)
    assert len(done.stdout.split()) == len(words), done.stderr
    return [int(number) for number in done.stdout.split()]


TO_GATEWAY = (f"connect {GATEWAY} 9", f"send {GATEWAY} 9")
TO_RESOLVER = "send 127.0.0.11 53"


def test_unlisted_destinations_are_denied_and_recorded(engine: Engine) -> None:
    """What no rule allows is refused by EPERM and recorded; plain runc lets it through.

    So is Docker's own DNS server, which would carry any question outside.
    """
    assert acts(engine, *TO_GATEWAY, TO_RESOLVER) == [EPERM] * 3
    told = [event for event in events() if event.get("verdict") == "deny"]
    assert [event["kind"] for event in told] == ["net.connect", "net.send", "net.send"]
    assert told[0]["subject"] == {"destination": f"{GATEWAY}:9", "protocol": "tcp"}
    assert acts(engine, *TO_GATEWAY, TO_RESOLVER, runtime="runc") == [ECONNREFUSED, 0, 0]


def test_listed_destination_is_allowed(engine: Engine) -> None:
    """The profile that the runtime is pinned to allows one port, and no other."""
    words = (f"connect {GATEWAY} 9", f"connect {GATEWAY} 10")
    assert acts(engine, *words, runtime="mis-open") == [ECONNREFUSED, EPERM]


def test_no_network_means_loopback_only(engine: Engine) -> None:
    """Mode 'none' closes the engine's bridge; the container's own loopback works."""
    words = (f"connect {GATEWAY} 9", "connect 127.0.0.1 9")
    assert acts(engine, *words, runtime="mis-closed") == [EPERM, ECONNREFUSED]


ESCAPES = {
    "ptrace": ("0", 0),  # PTRACE_TRACEME
    "chroot": ("0", EFAULT),
    "kcmp": ("0", None),
    "mount": ("0", None),
    "bpf": ("0", None),
    "unshare": ("0x10000000", None),  # CLONE_NEWUSER
    "io_uring_enter": ("0", None),
    "keyctl": ("0", None),
    "open_by_handle_at": ("0", None),
}
"""Call → (argument, what it meets under plain runc, None where Docker's own filter refuses it)."""


def test_escapes_are_denied_and_counted(engine: Engine) -> None:
    """Calls that reach out of a container meet EPERM and are recorded.

    Docker's own filter refuses some of them too, but tells nobody; where it does not, plain runc
    is the negative control.
    """
    acts = [f"act syscall {abi.number(call)} {word}" for call, (word, _) in ESCAPES.items()]
    done = engine.run("sh", "-c", "; ".join(acts), runtime="mis-patient")
    assert done.stdout.split() == [str(EPERM)] * len(ESCAPES)
    counted = [event["kind"] for event in events() if event.get("verdict") == "deny"]
    assert counted == [f"escape.{call}" for call in ESCAPES]
    done = engine.run("sh", "-c", "; ".join(acts), runtime="runc")
    bare = dict(zip(ESCAPES, map(int, done.stdout.split()), strict=True))
    for call, (_, wanted) in ESCAPES.items():
        assert wanted is None or bare[call] == wanted, call


def test_violations_add_up_to_the_end(box: Engine) -> None:
    """DEFCON 1 kills the container, and the engine sees an ordinary SIGKILL."""
    start(box)
    script = f"while :; do act syscall {abi.number('kcmp')} $((n=n+1)); done"
    box.docker("exec", "box", "sh", "-c", script, check=False)
    assert ended(box)["ExitCode"] == 137
    kinds = [event["kind"] for event in events()]
    assert kinds.count("escape.kcmp") >= 15
    assert "run.killed" in kinds
    box.docker("start", "box")  # in the same cgroup, which was frozen to kill it
    assert box.docker("exec", "box", "echo", "again").stdout == "again\n"


def test_hidden_and_protected_files(engine: Engine, tmp_path: Path) -> None:
    """files.deny hides, files.protect keeps read-only, in the image and in volumes."""
    hooks = tmp_path / ".git/hooks"
    hooks.mkdir(parents=True)
    options = ("-v", f"{tmp_path}:/work", "-w", "/work")
    script = (
        "cat /etc/secret; touch .git/hooks/x; mv .git/hooks .git/y; mv .git x; touch ok; ls -A .git"
    )
    done = engine.run("sh", "-c", script, options=options, runtime="mis-files")
    assert "secret of the image" not in done.stdout
    assert done.stdout.split() == ["hooks"]
    assert [path.name for path in hooks.iterdir()] == []
    assert (tmp_path / "ok").exists()
    bare = engine.run("sh", "-c", script, options=options, runtime="runc")
    assert "secret of the image" in bare.stdout
    assert (tmp_path / "x").exists()


def test_file_guard_and_exec_gate(box: Engine, tmp_path: Path) -> None:
    """What rules deny is denied at the open, also under another name, and recorded; docker exec
    included."""
    (tmp_path / "a.key").write_text("key\n")
    os.link(tmp_path / "a.key", tmp_path / "harmless")
    options = ("-v", f"{tmp_path}:/work", "-w", "/work")
    script = "touch b.key; cat harmless; forbidden; cat /run/mis/rules.json | head -1"
    start(box, *options, runtime="mis-files")
    done = box.docker("exec", "box", "sh", "-c", script, check=False)
    assert done.stdout == "{\n", done.stderr
    told = [event for event in events() if event.get("verdict") == "deny"]
    assert {event["kind"] for event in told} == {"file.open", "exec.run"}
    assert {event["subject"]["path"] for event in told} == {
        "/work/b.key",
        "/work/harmless",
        "/bin/forbidden",
    }
    bare = box.run("sh", "-c", script, options=options, runtime="runc")
    assert bare.stdout == "key\nran\n"


# ---- exec ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ln /etc/secret /tmp/x", "mv /work/a.key /work/x"])
def test_who_has_read_what_taints_reaches_nobody_new(
    engine: Engine, tmp_path: Path, way: str
) -> None:
    """In the image and in volumes, by another name too; who has read something else, the control,
    still reaches what a rule allows."""
    for read, wanted in ((way.split()[-1], EPERM), ("/etc/passwd", ECONNREFUSED)):
        (tmp_path / "a.key").write_text("key")
        script = f"act nnp; {way}; cat {read} >/dev/null; act connect {GATEWAY} 9"
        options = ("-v", f"{tmp_path}:/work")
        done = engine.run("sh", "-c", script, options=options, runtime="mis-taint")
        assert [int(line) for line in done.stdout.split()] == [1, wanted], done.stderr
        marks = [event["rule"] for event in events() if event["kind"] == "file.tainted"]
        named = "/etc/secret" if way.startswith("ln") else "*.key"
        assert marks == ([f"taint {named}"] if wanted == EPERM else [])


def test_exec_is_guarded_from_its_first_instruction(box: Engine) -> None:
    """docker exec: network, escape guard and no_new_privs, all in the container's one record."""
    start(box)
    number = str(abi.number("ptrace"))
    run = ("exec", "box", "act")
    assert met(box.docker(*run, "connect", GATEWAY, "9", check=False)) == EPERM
    assert met(box.docker(*run, "syscall", number, check=False)) == EPERM
    assert met(box.docker(*run, "nnp", check=False)) == 1
    kinds = [event["kind"] for event in events() if event.get("verdict") == "deny"]
    assert kinds == ["net.connect", "escape.ptrace"]
    start(box, runtime="runc", name="bare")
    run = ("exec", "bare", "act")
    assert met(box.docker(*run, "connect", GATEWAY, "9", check=False)) == ECONNREFUSED
    assert met(box.docker(*run, "syscall", number, check=False)) == 0
    assert met(box.docker(*run, "nnp", check=False)) == 0


def test_exec_with_more_rights_is_refused(box: Engine) -> None:
    """docker exec --privileged does not get around what the container was made with."""
    start(box)
    done = box.docker("exec", "--privileged", "box", "true", check=False)
    assert done.returncode != 0
    assert "capabilities that the container does not have" in done.stdout + done.stderr


@pytest.mark.parametrize("runtime", ["mis", "mis-lasting"])
def test_many_execs_leave_nothing_behind(box: Engine, runtime: str) -> None:
    """A health check runs for days: each exec's listener is given back, by the supervisor and by
    the watchdog, which holds a copy where the container may outlive the supervisor."""
    start(box, runtime=runtime)
    supervisor = facts()["supervisor"]
    (watchdog,) = _children(supervisor)
    box.docker("exec", "box", "true")

    def count() -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (supervisor, watchdog))

    sleep(0.5)  # the first one's listener is given back
    settled = count()
    box.docker("exec", "-d", "box", "sleep", "2")
    wait_for(lambda: count() > settled)
    for _ in range(5):
        box.docker("exec", "box", "true")
    wait_for(lambda: count() <= settled)


# ---- the engine's verbs ----------------------------------------------------------------------


def test_life_cycle(box: Engine) -> None:
    """run -d, ps, logs, pause, unpause, kill -s, stop, start, restart, rm."""
    start(box, "--init")
    (row,) = runs()
    assert row["command"][-2:] == ["sleep", "1000"]
    box.docker("pause", "box")
    assert state_of(box)["Paused"]
    box.docker("unpause", "box")
    box.docker("kill", "-s", "USR1", "box")
    assert ended(box)["ExitCode"] == 128 + signal.SIGUSR1
    wait_for(lambda: not runs())
    box.docker("start", "box")
    assert len(runs()) == 1
    box.docker("restart", "-t", "1", "box")
    assert len(runs()) == 1
    box.docker("stop", "-t", "1", "box")
    assert state_of(box)["ExitCode"] in (137, 143)
    box.docker("rm", "box")


NO_FORWARDING = "WARNING: IPv4 forwarding is disabled. Networking will not work.\n"
"""What docker says first on such a machine."""


def test_exit_codes_and_output_pass_through(engine: Engine) -> None:
    """The container's own exit code, stdout, stderr and arguments, as under runc."""
    for runtime in ("mis", "runc"):
        done = engine.run("sh", "-c", "echo out; echo err >&2; exit 42", runtime=runtime)
        err = done.stderr.removeprefix(NO_FORWARDING)
        assert (done.returncode, done.stdout, err) == (42, "out\n", "err\n")
    assert engine.run("/no/such").returncode == 127


@pytest.mark.parametrize(
    ("options", "script", "wanted"),
    [
        (
            ("--read-only", "--user", "1000:1000", "--hostname", "h", "-e", "A=b", "--tmpfs", "/t"),
            "touch /x 2>/dev/null || id -u; hostname; echo $A; touch /t/x && echo yes",
            "1000 h b yes",
        ),
        (
            ("--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"),
            "mount -t tmpfs x /tmp 2>/dev/null || echo no; grep Seccomp: /proc/self/status",
            "no Seccomp: 2",
        ),
        (
            ("--cap-drop", "ALL", "-t"),
            "grep CapEff /proc/self/status; tty",
            f"CapEff: {0:016} {TTY}",
        ),
        (("--network", "none"), "ls /sys/class/net", "lo"),
    ],
)
def test_options_of_run(engine: Engine, options: tuple[str, ...], script: str, wanted: str) -> None:
    """docker run's options work as under runc, and none of them takes a guard away."""
    done = engine.run("sh", "-c", script, options=options)
    assert done.stdout.split() == wanted.split(), done.stderr


def test_the_lower_limit_wins(engine: Engine) -> None:
    """--memory, --pids-limit: the engine may ask for less than the profile, never for more."""
    if not Path("/sys/fs/cgroup/memory").is_dir():
        pytest.skip("reads files of cgroup v1")
    script = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/pids/pids.max"
    done = engine.run("sh", "-c", script, options=("--memory", "64m", "--pids-limit", "-1"))
    assert done.stdout.split() == [str(64 << 20), "512"]
    done = engine.run("sh", "-c", script, options=("--memory", "4g", "--pids-limit", "9"))
    assert done.stdout.split() == [str(2 << 30), "9"]


def test_volumes_are_written(engine: Engine, tmp_path: Path) -> None:
    """-v: what the container writes is there."""
    engine.run("sh", "-c", "echo hello > /data/file", options=("-v", f"{tmp_path}:/data"))
    assert (tmp_path / "file").read_text() == "hello\n"


def test_published_ports(box: Engine) -> None:
    """-p: a server inside, allowed to listen by its profile, is reached through the engine."""
    argv = ("run", "-d", "--runtime", "mis-open", "--name", "box", "-p", "127.0.0.1:18087:8087")
    box.docker(*argv, engines.IMAGE, "nc", "-l", "-p", "8087", "-e", "echo", "hello")
    script = "exec 3<>/dev/tcp/127.0.0.1/18087 && cat <&3"

    def asked() -> bool:
        done = subprocess.run(["bash", "-c", script], capture_output=True, check=False, timeout=5)
        return done.stdout == b"hello\n"

    wait_for(asked, 5)


def test_shared_network_namespace(box: Engine) -> None:
    """--network container:X: both are guarded, each by its own profile."""
    start(box, runtime="mis-open")
    option = ("--network", "container:box")
    assert met(box.run("act", "connect", GATEWAY, "9", options=option)) == EPERM
    assert met(box.docker("exec", "box", "act", "connect", GATEWAY, "9", check=False)) == (
        ECONNREFUSED
    )


def test_host_network_needs_a_profile_that_says_so(engine: Engine) -> None:
    """--network host under a guarded profile is refused; under mode 'host' rules apply."""
    option = ("--network", "host")
    done = engine.run("true", options=option)
    assert "network mode 'guarded'" in done.stderr
    act = ("act", "connect", GATEWAY)
    assert met(engine.run(*act, "9", options=option, runtime="mis-host")) == ECONNREFUSED
    assert met(engine.run(*act, "10", options=option, runtime="mis-host")) == EPERM


def test_restart_policy(box: Engine) -> None:
    """A container that the engine starts again is guarded again, by a new supervisor."""
    start(box, "--restart", "always")
    first = facts()["supervisor"]
    os.kill(state_of(box)["Pid"], signal.SIGKILL)
    wait_for(lambda: [run["supervisor"] != first for run in runs()] == [True])
    wait_for(lambda: state_of(box)["Running"])
    assert met(box.docker("exec", "box", "act", "connect", GATEWAY, "9", check=False)) == EPERM


def test_many_at_once(box: Engine) -> None:
    """Twelve containers at once: own address, supervisor, record and verdicts (fifty:
    bench/docker.py --at-once 50)."""
    assert crowd.gather(box, 12).resident < 100


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--privileged",), "privileged"),
        (("--pid", "host"), "host's pid namespace"),
        (("-e", "MIS_PROFILE=../../etc/passwd"), "no profile name"),
        (("-e", "MIS_PROFILE=coding-agent"), "not allowed for containers here"),
        (("-v", f"{ROOT}:/x"), "where mis-run itself lies"),
    ],
)
def test_refusals(engine: Engine, options: tuple[str, ...], words: str) -> None:
    """What would hand over the host, and profiles that may not be used: a clear refusal."""
    done = engine.run("true", options=options)
    assert done.returncode == 125
    assert "mis-run: " in done.stderr
    assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_our_code_may_be_read(engine: Engine) -> None:
    """The control: the same volume, which nobody can write to, is one like any other."""
    done = engine.run("test", "-x", "/x/mis-run", options=("-v", f"{ROOT}:/x:ro"))
    assert done.returncode == 0, done.stderr


def test_the_engines_socket_is_no_volume(engine: Engine) -> None:
    """Who may talk to the engine is root on the host."""
    done = engine.run("true", options=("-v", f"{engine.folder}/docker.sock:/docker.sock"))
    assert "(a socket)" in done.stderr


def test_environment_chooses_where_the_operator_allows(engine: Engine) -> None:
    """MIS_PROFILE picks among the allowed; a pinned runtime is not moved by it."""
    option = ("-e", "MIS_PROFILE=open")
    act = ("act", "connect", GATEWAY, "9")
    assert met(engine.run(*act, options=option)) == ECONNREFUSED
    done = engine.run(*act, options=option, runtime="mis-closed")
    assert "pinned to profile 'closed'" in done.stderr


# ---- losing the supervisor -------------------------------------------------------------------


def test_losing_the_supervisor_ends_the_container(box: Engine) -> None:
    """SIGKILL of the supervisor: the watchdog kills the container, the engine sees 137."""
    start(box)
    os.kill(facts()["supervisor"], signal.SIGKILL)
    assert ended(box)["ExitCode"] == 137
    box.docker("rm", "box")
    wait_for(lambda: not any(trace.startswith("state") for trace in traces()))


def test_losing_both_keeps_the_container_closed(box: Engine) -> None:
    """Supervisor and watchdog killed at once: the rules stay, and mis gc ends the container."""
    start(box)
    found = facts()
    for pid in (found["supervisor"], *_children(found["supervisor"])):
        os.kill(pid, signal.SIGSTOP)
    for pid in (*_children(found["supervisor"]), found["supervisor"]):
        os.kill(pid, signal.SIGKILL)
    assert mis("gc").returncode == 0
    assert ended(box)["ExitCode"] == 137


PTRACE = f"act syscall {abi.number('ptrace')}"
LOOP = (
    f"while sleep 0.1; do echo $({PTRACE}) $(act connect {GATEWAY} 9)"
    " $(touch /work/b.key 2>/dev/null; echo $?); rm -f /work/b.key; done"
)
GUARDED, UNGUARDED = ["1", "1", "1"], ["0", "1", "0"]
"""What `LOOP` meets: ptrace, a connection, a forbidden file. The kernel's network rules stay."""


def lasting(box: Engine, folder: Path) -> dict[str, Any]:
    """A container that may outlive its supervisor, seen guarded; what its state says."""
    argv = ("run", "-d", "--runtime", "mis-lasting", "--name", "box", "-v", f"{folder}:/work")
    box.docker(*argv, engines.IMAGE, "sh", "-c", LOOP)
    wait_for(lambda: last_line(box) == GUARDED, 10)
    return facts()


def last_line(box: Engine) -> list[str]:
    return box.docker("logs", "--tail", "1", "box").stdout.split()


def test_open_lets_the_container_run_on(box: Engine, tmp_path: Path) -> None:
    """on_loss = "open": without its supervisor it runs on in audit, and ends as ever."""
    found = lasting(box, tmp_path)
    os.kill(found["supervisor"], signal.SIGKILL)
    wait_for(lambda: last_line(box) == UNGUARDED, 10)
    assert state_of(box)["Running"]
    assert "unguarded" in mis("ps").stdout
    # Nobody could guard one more process.
    done = box.docker("exec", "box", "true", check=False)
    assert done.returncode != 0
    box.docker("stop", "-t", "1", "box")
    assert ended(box)["ExitCode"] == 137
    kinds = [event["kind"] for event in events()]
    assert kinds[-2:] == ["watchdog.open", "watchdog.ended"]
    box.docker("start", "box")  # by a new supervisor
    wait_for(lambda: last_line(box) == GUARDED, 10)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_attach_guards_it_again(box: Engine, tmp_path: Path, fault: signal.Signals) -> None:
    """mis attach: the container, what was executed in it before, and what will be."""
    found = lasting(box, tmp_path)
    executed = f"while sleep 0.1; do {PTRACE} > /work/exec; done"
    box.docker("exec", "-d", "box", "sh", "-c", executed)

    def in_exec() -> str:
        return (tmp_path / "exec").read_text().strip() if (tmp_path / "exec").exists() else ""

    wait_for(lambda: in_exec() == "1")
    os.kill(found["supervisor"], fault)
    wait_for(lambda: last_line(box) == UNGUARDED, 10)
    wait_for(lambda: in_exec() == "0")
    again = subprocess.Popen([*MIS, "attach", found["name"]], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: last_line(box) == GUARDED, 10)
    wait_for(lambda: in_exec() == "1")
    assert met(box.docker("exec", "box", "act", "connect", GATEWAY, "9", check=False)) == EPERM
    number = str(abi.number("ptrace"))
    assert met(box.docker("exec", "box", "act", "syscall", number, check=False)) == EPERM
    box.docker("rm", "-f", "box")
    assert again.wait(20) == 0
    assert again.stderr is not None and "supervising container" in again.stderr.read()
    assert [event["kind"] for event in events()][-1] == "run.exit"


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_mis_kill_and_mis_inspect_find_it(box: Engine) -> None:
    """mis manages containers as it manages its own runs, by the engine's short id."""
    short = start(box)[:12]
    (row,) = runs()
    assert row["name"] == short
    assert json.loads(mis("inspect", short).stdout)["plan"]["profile"]["name"] == "default"
    assert met(box.docker("exec", "box", "act", "connect", GATEWAY, "9", check=False)) == EPERM
    assert f"wanted tcp to {GATEWAY}:9" in mis("explain", row["id"]).stdout
    assert mis("kill", short).returncode == 0
    assert ended(box)["ExitCode"] == 137


def test_a_paused_container_can_be_killed(box: Engine) -> None:
    """An box pauses by the v1 freezer where there is one, which SIGKILL does not wake."""
    short = start(box)[:12]
    box.docker("pause", "box")
    assert mis("kill", short).returncode == 0
    assert ended(box)["ExitCode"] == 137
