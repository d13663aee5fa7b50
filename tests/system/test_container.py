"""The container by itself: shim, layer, bundle and runtime, without network or guards.

Run as a program (``python test_container.py SPEC``) this file is the smallest supervisor there is;
the tests start it, since a supervisor leaves the host's mount namespace for good.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mis_run import bundle, cgroup, rootfs, runtime, seccomp
from mis_run.build import built
from mis_run.errors import MisError
from mis_run.model import Bind, Host, Limits, NetMode, NetPlan, Plan, Profile, User

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]
NOBODY = 65534
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# ---- the smallest supervisor ----------------------------------------------------------------


def make_plan(spec: dict[str, Any]) -> Plan:
    kind, unified, controllers = cgroup.detect()
    mounts = tuple(
        (line.split()[4], line.split(" - ")[1].split()[0])
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    )
    return Plan(
        name=None,
        command=tuple(spec["command"]),
        cwd=Path(spec["cwd"]),
        env=(("PATH", PATH), ("HOME", spec["home"]), ("TERM", "xterm")),
        user=User(spec["uid"], spec["uid"], (), "tester", spec["home"]),
        tty=spec["tty"],
        rootfs=Path(spec["rootfs"]) if spec["rootfs"] else None,
        binds=tuple(Bind(Path(a), Path(b), ro) for a, b, ro in spec["binds"]),
        masked=tuple(spec["masked"]),
        protected=tuple(spec["protected"]),
        mechanisms=(),
        profile=Profile(name="test"),
        network=NetPlan(
            mode=NetMode.NONE, ipv6=False, allow=(), listen=(), resolvers=(), host_addresses=()
        ),
        limits=Limits(**spec["limits"]),
        host=Host(
            mechanisms={},
            cgroup=kind,
            unified=unified,
            controllers=controllers,
            runtime=None,
            mounts=mounts,
        ),
    )


@contextmanager
def container(spec: dict[str, Any]) -> Iterator[runtime.Box]:
    chosen = runtime.find()
    assert chosen.path, chosen.finding
    plan = make_plan(spec)
    run_id = secrets.token_hex(4)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="mis-container-", dir="/run"))
        stack.callback(shutil.rmtree, folder)
        (folder / "info").mkdir(mode=0o755)
        (folder / "info" / "init").touch()
        stack.callback(remove_cgroups, run_id)
        root = stack.enter_context(rootfs.mount(plan, folder, rootfs.etc_files(())))
        inside = bundle.Inside(
            root=root.path,
            netns="",
            # Not below /mis: whatever has no live mis-run there is swept by the next launch.
            cgroups_path=f"/mis-test-{run_id}",
            shim=built("mis-init"),
            info=folder / "info",
            seccomp=seccomp.profile(),
            hidden=rootfs.hidden(plan),
            protected=(protected := rootfs.protected(plan)),
            single=rootfs.single(plan, protected),
            files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        )
        config = bundle.config(plan, inside)
        if not spec["seccomp"]:
            del config["linux"]["seccomp"]
        if not spec["pinned"]:  # protected paths alone, without the folders above them
            rw = set(map(str, Path(spec["protected"][0]).parents)) - {spec["cwd"]}
            config["mounts"] = [m for m in config["mounts"] if m["destination"] not in rw]
        box = stack.enter_context(
            runtime.create(config, runtime=chosen.path, run_id=run_id, folder=folder)
        )
        yield box


def remove_cgroups(run_id: str) -> None:
    for point, kind in make_plan(SPEC).host.mounts:
        folder = Path(point) / f"mis-test-{run_id}"
        if kind in ("cgroup", "cgroup2") and folder.is_dir():
            # The kernel empties a cgroup a moment after its last process was reaped.
            for _ in range(100):
                with suppress(OSError):
                    folder.rmdir()
                    break
                time.sleep(0.01)


def supervise(spec: dict[str, Any]) -> int:
    from mis_run import supervise, terminal

    rootfs.isolate()
    runtime.suit(runtime.find().path or Path())
    runtime.subreaper()
    with supervise.loop() as loop, container(spec) as box:
        box.start()
        for act in spec["acts"]:
            print(f"{act} = {box.probe(act)}", file=sys.stderr, flush=True)
        if spec["onloss"]:
            box.on_loss(spec["onloss"])
        with terminal.relay(loop, box.pty), supervise.signals(loop, box.signal):
            box.go(spec["command"][0], None if spec["tty"] else (0, 1, 2))
            while True:
                loop.add(box.fileno(), lambda: None)
                loop.turn()
                loop.remove(box.fileno())
                for word, value in box.read():
                    if word == "stopped":
                        print(f"stopped {value}", file=sys.stderr, flush=True)
                        box.signal(signal.SIGCONT)
                    else:
                        return {"exit": value, "killed": 128 + value}.get(word, 199)


SPEC: dict[str, Any] = {
    "command": ["true"],
    "cwd": "/",
    "uid": NOBODY,
    "home": "/nonexistent",
    "tty": False,
    "rootfs": None,
    "binds": [],
    "masked": [],
    "protected": [],
    "limits": {},
    "acts": [],
    "onloss": "",
    "seccomp": True,
    "pinned": True,
}


# ---- what the tests use ---------------------------------------------------------------------


def argv(*command: str, cwd: Path, **spec: Any) -> list[str]:
    full = SPEC | {"command": command, "cwd": str(cwd)} | spec
    return [sys.executable, "-I", __file__, json.dumps(full)]


def run(*command: str, cwd: Path, **spec: Any) -> subprocess.CompletedProcess[str]:
    text = spec.pop("input", "")
    words = argv(*command, cwd=cwd, **spec)
    return subprocess.run(
        words, input=text, capture_output=True, text=True, timeout=60, check=False
    )


def sh(script: str, cwd: Path, **spec: Any) -> str:
    """stdout and stderr of a shell script in a container that must end well."""
    done = run("sh", "-c", script, cwd=cwd, **spec)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout + done.stderr


def python(script: str, cwd: Path, **spec: Any) -> str:
    done = run("/usr/bin/python3", "-c", script, cwd=cwd, **spec)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing came true in time"
        time.sleep(0.01)
    return value


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def on_root() -> Iterator[Path]:
    """A folder on the host's root file system, outside everything that starts fresh."""
    folder = Path(tempfile.mkdtemp(prefix="mis-test-", dir="/var/lib"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No container may leave a mount, a folder or a process."""
    yield
    assert "mis-container-" not in Path("/proc/self/mountinfo").read_text()
    assert not list(Path("/run").glob("mis-container-*"))


# ---- the agent's life -----------------------------------------------------------------------


def test_exit_codes(workspace: Path) -> None:
    """The agent's own code comes back, and 128 + n for a signal."""
    assert run("true", cwd=workspace).returncode == 0
    assert run("sh", "-c", "exit 3", cwd=workspace).returncode == 3
    assert run("sh", "-c", "kill -SEGV $$", cwd=workspace).returncode == 128 + signal.SIGSEGV


def test_commands_that_cannot_be_executed(workspace: Path) -> None:
    """A missing command is 127, one without permission to execute 126."""
    assert run("no-such-command", cwd=workspace).returncode == 127
    (workspace / "data").write_text("words")
    assert run("./data", cwd=workspace).returncode == 126
    (workspace / "script").write_text("#!/bin/sh\nexit 4\n")
    (workspace / "script").chmod(0o755)
    assert run("./script", cwd=workspace).returncode == 4


def test_ten_megabytes_pass_through(workspace: Path) -> None:
    """stdin reaches the agent and its stdout comes back, whole."""
    text = "0123456789abcde\n" * (10 << 16)
    assert run("cat", cwd=workspace, input=text).stdout == text


def test_redirected_files_keep_their_owner(workspace: Path) -> None:
    """The runtime gives the agent's user every stdio it sees; it must not see ours."""
    target = workspace.parent / "log"
    with target.open("w") as log:
        subprocess.run(argv("echo", "hello", cwd=workspace), stdout=log, stdin=log, check=True)
    assert target.read_text() == "hello\n"
    assert target.stat().st_uid == 0


def test_no_descriptor_leaks_into_the_agent(workspace: Path) -> None:
    """The agent has 0, 1 and 2 and nothing of ours."""
    assert sh("echo /proc/self/fd/*", workspace).split()[:3] == [
        f"/proc/self/fd/{n}" for n in range(3)
    ]
    assert python("import os; print(os.listdir('/proc/self/fd'))", workspace) == (
        "['0', '1', '2', '3']\n"  # 3: the listing itself
    )


def test_signals_reach_the_agent(workspace: Path) -> None:
    """A signal to the supervisor arrives in the agent's process group."""
    script = "trap 'echo caught; exit 9' TERM; echo up; while :; do sleep 0.02; done"
    agent = subprocess.Popen(
        argv("sh", "-c", script, cwd=workspace), stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout and agent.stdout.readline() == "up\n"
    agent.terminate()
    assert agent.communicate(timeout=20)[0] == "caught\n"
    assert agent.returncode == 9


def test_zombies_are_reaped(workspace: Path) -> None:
    """Orphans of the agent do not pile up as zombies under pid 1."""
    script = "for i in 1 2 3 4 5; do (true & ) ; done; sleep 0.3; cat /proc/[0-9]*/stat"
    states = [line.rpartition(")")[2].split()[0] for line in sh(script, workspace).splitlines()]
    assert len(states) >= 2
    assert "Z" not in states


def test_stop_is_reported(workspace: Path) -> None:
    """An agent that stops itself (Ctrl-Z) is reported, and goes on after SIGCONT."""
    done = run("sh", "-c", "kill -STOP $$; exit 6", cwd=workspace)
    assert done.returncode == 6
    assert f"stopped {int(signal.SIGSTOP)}" in done.stderr


def test_background_processes_end_with_the_agent(workspace: Path) -> None:
    """What the agent left behind, in whatever session, dies with its container."""
    mark = f"9{secrets.randbelow(10**8):08}"
    done = run("sh", "-c", f"setsid sleep {mark} >/dev/null 2>&1 & sleep 0.1", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert not processes(f"sleep {mark}")


# ---- the terminal ---------------------------------------------------------------------------


def test_terminal(workspace: Path) -> None:
    """Under a terminal the agent has its own, of our size; Ctrl-C is a SIGINT to the agent; and
    our terminal is afterwards as it was."""
    import fcntl
    import pty
    import struct
    import termios

    script = "trap 'echo int; exit 7' INT; tty; stty size; echo ready; while :; do sleep 0.02; done"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    before = termios.tcgetattr(slave)
    agent = subprocess.Popen(
        argv("sh", "-c", script, cwd=workspace, tty=True),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    seen = b""
    sent = False
    os.set_blocking(master, False)
    end = time.monotonic() + 20
    while agent.poll() is None and time.monotonic() < end:
        with suppress(BlockingIOError):
            seen += os.read(master, 4096)
        if b"ready" in seen and not sent:
            os.write(master, b"\x03")
            sent = True
        time.sleep(0.01)
    with suppress(BlockingIOError):
        seen += os.read(master, 4096)
    assert agent.wait(5) == 7, seen
    assert b"/dev/pts/0" in seen or b"/dev/console" in seen
    assert b"33 99" in seen
    assert b"int\r\n" in seen
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


BULK = """
import hashlib, os, sys, tty
tty.setraw(0)
os.write(1, b"ready")
data = b""
while len(data) < 200000:
    data += os.read(0, 65536)
for _ in range(100):
    os.write(1, b"x" * 4000)
os.write(1, b"sum " + hashlib.sha256(data).hexdigest().encode())
"""


def test_terminal_loses_nothing(workspace: Path) -> None:
    """A large paste and a large output come through whole, though neither side takes it at once."""
    import hashlib
    import pty

    paste = os.urandom(100_000).hex().encode()
    master, slave = pty.openpty()
    agent = subprocess.Popen(
        argv("/usr/bin/python3", "-c", BULK, cwd=workspace, tty=True),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    seen = os.read(master, 65536)
    while not seen.endswith(b"ready"):
        seen += os.read(master, 65536)
    rest = memoryview(paste)
    while rest:
        rest = rest[os.write(master, rest[:50_000]) :]
    time.sleep(0.5)  # nobody reads: the relay has to wait, not to drop
    out = b""
    with suppress(OSError):  # EIO when the agent and the relay are gone
        while data := os.read(master, 65536):
            out += data
    assert agent.wait(20) == 0
    assert out == b"x" * 400_000 + b"sum " + hashlib.sha256(paste).hexdigest().encode()
    os.close(master)


# ---- files ----------------------------------------------------------------------------------


def test_writes_vanish_but_the_workspace_stays(workspace: Path, on_root: Path) -> None:
    """Files in the workspace stay and are the user's; everything else is thrown away."""
    (on_root / "here").write_text("host")
    script = f"echo agent > {on_root}/here && cat {on_root}/here && rm -r {on_root} && id -u > mine"
    assert sh(script, workspace, uid=0) == "agent\n"
    assert (on_root / "here").read_text() == "host"
    sh("touch nobodys", workspace)
    assert (workspace / "mine").read_text() == "0\n"
    assert (workspace / "nobodys").stat().st_uid == NOBODY


def test_masked_paths_are_hidden(workspace: Path, on_root: Path) -> None:
    """Masked files and folders are empty, by any name, also for root; unmasked they are read."""
    (on_root / "keys").mkdir()
    (on_root / "keys" / "id").write_text("secret")
    (on_root / "token").write_text("secret")
    (on_root / "real").write_text("secret")
    (on_root / "link").symlink_to("real")
    script = f"cd {on_root}; cat keys/id token real link /proc/self/root{on_root}/token; exit 0"
    masked = [f"{on_root}/keys/**", f"{on_root}/tok*", f"{on_root}/link", f"{on_root}/missing"]
    assert sh(script, workspace, uid=0).count("secret") == 5
    assert "secret" not in sh(script, workspace, uid=0, masked=masked)
    assert "secret" not in sh(script, workspace, masked=masked)


def test_a_hidden_folder_stays_hidden(workspace: Path, on_root: Path) -> None:
    """Removing, renaming and making anew what hides a folder brings nothing of the host back."""
    (on_root / "a" / "keys").mkdir(parents=True)
    (on_root / "a" / "keys" / "id").write_text("secret")
    script = f"""cd {on_root}; rmdir a/keys; mkdir a/keys; cat a/keys/id; mv a b; cat b/keys/id
    rm -r a; mkdir -p a/keys; cat a/keys/id; exit 0"""
    assert "secret" not in sh(script, workspace, uid=0, masked=[f"{on_root}/a/keys"])


def test_masks_inside_the_workspace(workspace: Path) -> None:
    """A secret in the workspace is hidden too, though the workspace is the host's own folder."""
    (workspace / ".env").write_text("secret")
    (workspace / "keys").mkdir()
    (workspace / "keys" / "id").write_text("secret")
    masked = [f"{workspace}/.env", f"{workspace.parent}/*/keys"]
    assert sh("cat .env keys/id", workspace) == "secretsecret"
    assert "secret" not in sh(
        "cat .env keys/id; rm -rf .env keys; exit 0", workspace, masked=masked
    )
    assert (workspace / ".env").read_text() == "secret"


def test_protected_paths(workspace: Path) -> None:
    """A protected path can be neither written nor replaced by renaming a folder above it."""
    hooks = workspace / ".git" / "hooks"
    hooks.mkdir(parents=True)
    for folder in (hooks, hooks.parent):
        folder.chmod(0o777)
    write = "echo evil > .git/hooks/pre-commit; exit 0"
    rename = f"mv .git old; mkdir -p .git/hooks; {write}"
    for script in (write, rename):
        sh(script, workspace, protected=[str(hooks)])
        assert list(hooks.iterdir()) == []
    sh("touch .git/index; mv .git/index .git/index2", workspace, protected=[str(hooks)])
    sh(rename, workspace, protected=[str(hooks)], pinned=False)
    assert (hooks / "pre-commit").exists(), "without the pins the attack must work"
    shutil.rmtree(workspace / "old")
    (hooks / "pre-commit").unlink()
    sh(write, workspace)
    assert (hooks / "pre-commit").exists()


def test_binds(workspace: Path, tmp_path: Path) -> None:
    """--bind shows a folder elsewhere, read-only when asked."""
    (tmp_path / "data").mkdir(mode=0o777)
    (tmp_path / "data").chmod(0o777)
    (tmp_path / "data" / "x").write_text("data")
    source = str(tmp_path / "data")
    binds = [(source, "/srv/ro", True), (source, "/srv/rw", False)]
    sh("cat /srv/ro/x; ! touch /srv/ro/y; touch /srv/rw/z", workspace, binds=binds)
    assert sorted(os.listdir(source)) == ["x", "z"]


def test_fresh_folders(workspace: Path, tmp_path: Path) -> None:
    """/tmp, /var/tmp and /run start without the host's files and can be used; the home is the
    user's own and empty."""
    (tmp_path / "other").write_text("somebody's")
    assert tmp_path.is_relative_to("/tmp")
    script = (
        f"cat {tmp_path}/other; echo x > /tmp/a && echo x > /var/tmp/a && echo x > ~/a; ls /run"
    )
    out = sh(script, workspace, home="/home/tester")
    assert "somebody's" not in out
    assert out.startswith("mis\n")
    assert not Path("/home/tester").exists()


def test_host_sockets_cannot_be_reached(workspace: Path, on_root: Path) -> None:
    """A service listening on a path of the host's root is not reachable through the overlay."""
    with socket.socket(socket.AF_UNIX) as service:
        path = f"{on_root}/service.sock"
        service.bind(path)
        Path(path).chmod(0o777)
        connect = "import socket; socket.socket(socket.AF_UNIX).connect({!r})"
        service.listen()
        done = run("/usr/bin/python3", "-c", connect.format(path), cwd=workspace)
        assert done.returncode == 1
        assert "refused" in done.stderr  # an overlay's inode is not the one that was bound
        # Nor through a bind of its folder; negative control: a bind of the socket itself.
        inner = connect.format("/srv/service.sock")
        shared = [(str(on_root), "/srv", False)]
        done = run("/usr/bin/python3", "-c", inner, cwd=workspace, binds=shared)
        assert done.returncode == 1
        assert "refused" in done.stderr
        python(inner, workspace, binds=[*shared, (path, "/srv/service.sock", False)])


def test_separate_file_systems(workspace: Path, on_root: Path) -> None:
    """A file system of its own below /opt, and a single file bound there, are seen, masked and
    written to as the rest is."""
    elsewhere, place = on_root / "elsewhere", Path(tempfile.mkdtemp(prefix="mis-test-", dir="/opt"))
    (elsewhere / "keys").mkdir(parents=True)
    (elsewhere / "keys" / "id").write_text("secret")
    for name in ("tool", "token"):
        (elsewhere / name).write_text(name)
    (on_root / "driver").write_text("driver")
    (place / "driver").touch()
    (place / "fs").mkdir()
    place.chmod(0o755)
    script = f"cd {place}; cat fs/tool fs/token fs/keys/id driver; echo x > fs/new; rm fs/tool; "
    script += "! echo x > driver"
    mount = f"mount --bind {elsewhere} {place}/fs; mount --bind {on_root}/driver {place}/driver"
    try:
        for masked, seen in (([], "tooltokensecretdriver"), (["fs/keys", "fs/tok*"], "tooldriver")):
            command = argv(
                *("sh", "-c", script),
                cwd=workspace,
                uid=0,
                masked=[f"{place}/{pattern}" for pattern in masked],
            )
            done = subprocess.run(
                ["unshare", "-m", "sh", "-ec", f'{mount}; exec "$@"', "sh", *command],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.stdout == seen, done.stderr
        assert sorted(os.listdir(elsewhere)) == ["keys", "token", "tool"]
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize(("readonly", "written"), [(True, []), (False, ["new"])])
def test_mounts_below_a_bind(
    readonly: bool, written: list[str], workspace: Path, tmp_path: Path
) -> None:
    """What is mounted below a read-only bind is read-only too, and never set-user-ID; writable
    binds are the control."""
    for name in ("shared", "inner"):
        (tmp_path / name).mkdir()
    nested = tmp_path / "shared" / "nested"
    nested.mkdir()
    script = (
        "grep -c ' /shared/nested .*nosuid,nodev' /proc/self/mountinfo; touch /shared/nested/new"
    )
    bind = [(str(tmp_path / "shared"), "/shared", readonly)]
    command = argv("sh", "-c", script, cwd=workspace, uid=0, binds=bind)
    mount = f'mount --bind {tmp_path}/inner {nested}; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", mount, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1\n", done.stderr
    assert ("Read-only file system" in done.stderr) == readonly
    assert os.listdir(tmp_path / "inner") == written


def test_other_rootfs(workspace: Path, tmp_path: Path) -> None:
    """--rootfs runs another root file system, whatever characters its path has."""
    root = tmp_path / "a:b,c d\\e"
    (root / "bin").mkdir(parents=True)
    shutil.copy(built("mis-init"), root / "bin" / "prog")
    (root / "etc").mkdir()
    (root / "etc" / "shadow").symlink_to("/etc/passwd")  # would lead out, were it followed
    # mis-init without arguments says 125: a program that needs no library.
    done = run("/bin/prog", cwd=workspace, rootfs=str(root), masked=["/etc/shadow"])
    assert done.returncode == 125, done.stderr
    missing = run("/bin/sh", cwd=workspace, rootfs=str(root))
    assert missing.returncode == 127
    assert sorted(os.listdir(root)) == ["bin", "etc"]
    wrong = run("true", cwd=workspace, rootfs=str(tmp_path / "nowhere"))
    assert wrong.returncode == 121
    assert "--rootfs" in wrong.stderr


# ---- walls ----------------------------------------------------------------------------------


def status(workspace: Path, **spec: Any) -> dict[str, str]:
    lines = sh("cat /proc/self/status", workspace, **spec).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_privileges(workspace: Path) -> None:
    """no_new_privs and seccomp are on; a user has no capability, root the documented six."""
    user, root = status(workspace), status(workspace, uid=0)
    numbers = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "KILL": 5}
    numbers |= {"SETGID": 6, "SETUID": 7}  # linux/capability.h
    six = sum(1 << number for number in numbers.values())
    assert set(bundle.ROOT_CAPABILITIES) == {f"CAP_{name}" for name in numbers}
    for facts in (user, root):
        assert facts["NoNewPrivs"] == "1"
        assert facts["Seccomp"] == "2"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(user[name], 16) == 0
    assert int(root["CapEff"], 16) == int(root["CapBnd"], 16) == six
    assert int(root["CapAmb"], 16) == 0


def test_setuid_programs_are_inert(workspace: Path, on_root: Path) -> None:
    """A set-uid root program runs as the agent; outside the same file gives root."""
    for folder in (workspace, on_root):
        shutil.copy("/usr/bin/id", folder / "suid")
        (folder / "suid").chmod(0o4755)
    outside = subprocess.run(
        ["setpriv", "--reuid", str(NOBODY), "--clear-groups", f"{on_root}/suid", "-u"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert outside.stdout == "0\n"
    assert sh(f"./suid -u; {on_root}/suid -u", workspace).split() == [str(NOBODY)] * 2


DANGEROUS = ("mount", "umount2", "unshare", "setns", "ptrace", "bpf", "perf_event_open", "keyctl")


def test_dangerous_calls_are_refused(workspace: Path) -> None:
    """Calls outside the profile fail with EPERM, tried by pid 1 with root's capabilities."""
    from mis_run.linux import abi

    acts = [f"syscall {abi.number(name)}" for name in DANGEROUS]
    acts += ["socket 17 3 0", "socket 38 5 0", "socket 40 1 0", "socket 16 3 16"]
    out = sh("true", workspace, uid=0, acts=acts)
    assert [line.rpartition(" = ")[2] for line in out.splitlines()] == ["1"] * len(acts)
    # Negative control: without the filter, some of the same acts get past it.
    bare = sh("true", workspace, uid=0, acts=acts, seccomp=False)
    assert "socket 16 3 16 = 0" in bare
    assert "socket 1 1 0 = 0" in sh("true", workspace, acts=["socket 1 1 0", "socket 16 3 0"])


def test_other_architectures_are_refused(workspace: Path) -> None:
    """A call by the 32-bit or x32 entry point ends the caller; the native one works."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86_64 only")
    script = """
import ctypes, mmap, os
def call(code):
    child = os.fork()
    if child == 0:
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        ctypes.CFUNCTYPE(ctypes.c_long)(address)()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
getpid = bytes.fromhex
print(call(getpid("b827000000" "0f05" "c3")), call(getpid("b814000000" "cd80" "c3")),
      call(getpid("b827000040" "0f05" "c3")))
"""
    native, int80, x32 = map(int, python(script, workspace).split())
    assert native == 0
    assert int80 < 0
    assert x32 < 0


def test_pid_1_is_out_of_reach(workspace: Path) -> None:
    """The agent can neither read, trace, stop nor kill its init; its own child it can read."""
    script = """
import os, signal, subprocess, time
def readable(pid):
    try:
        with open(f"/proc/{pid}/mem", "rb") as memory, open(f"/proc/{pid}/maps") as maps:
            memory.seek(int(maps.readline().split("-")[0], 16))
            return len(memory.read(8)) == 8
    except PermissionError:
        return False
child = subprocess.Popen(["sleep", "9"])
print(readable(child.pid), readable(1), os.access("/proc/1/fd/3", os.F_OK))
child.kill()
for number in range(1, 65):
    # Those we forward come back to us; nothing may happen to pid 1.
    if number in (signal.SIGKILL, signal.SIGSTOP) or number not in FORWARDED:
        os.kill(1, number)
time.sleep(0.1)
print(open("/proc/1/stat").read().split()[2])
""".replace("FORWARDED", "(1, 2, 3, 10, 12, 15, 18, 28)")
    assert python(script, workspace, uid=0).split() == ["True", "False", "False", "S"]
    assert python(script, workspace).split() == ["True", "False", "False", "S"]


def test_kernel_paths(workspace: Path) -> None:
    """What tells of the host in /proc and /sys is empty; /proc/sys and /sys cannot be written."""
    assert Path("/proc/kallsyms").read_bytes()[:1]
    assert os.listdir("/sys/kernel")
    script = """cat /proc/kallsyms /proc/kcore /proc/keys /proc/interrupts /proc/kmsg
    ls -A /sys/kernel; ls -A /sys/firmware; echo 1 > /proc/sys/kernel/panic
    echo 1 > /sys/kernel/mm/ksm/run; echo end"""
    out = run("sh", "-c", script, cwd=workspace, uid=0)
    assert out.stdout == "end\n"
    assert "ead-only" in out.stderr
    # A user's container masks fewer: the others refuse by their mode.
    assert run("sh", "-c", script, cwd=workspace).stdout == "end\n"
    hidden = " ".join(bundle.MASKED_FROM_ROOT)
    opened = sh(f"for f in {hidden}; do test -r $f || test -w $f && echo $f; done; true", workspace)
    assert opened == ""


def test_limits_of_pid_1_are_out_of_reach(workspace: Path) -> None:
    """Resource limits can be set for oneself, not for the init that has the same user."""
    script = """
import resource
resource.prlimit(0, resource.RLIMIT_NOFILE, (100, 100))
resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))
"""
    command = ("/usr/bin/python3", "-c", script)
    refused = run(*command, cwd=workspace)
    assert refused.returncode == 1
    assert "PermissionError" in refused.stderr
    assert "line 4" in refused.stderr
    assert run(*command, cwd=workspace, seccomp=False).returncode == 0


def test_own_namespaces(workspace: Path) -> None:
    """pid, ipc, uts, mount, cgroup and net namespaces are the agent's own."""
    kinds = ("pid", "ipc", "uts", "mnt", "cgroup", "net")
    out = sh("hostname; cd /proc/self/ns; readlink " + " ".join(kinds), workspace).split()
    assert out[0] == "agent"
    assert not set(out[1:]) & {os.readlink(f"/proc/self/ns/{kind}") for kind in kinds}
    assert len(sh("ls -d /proc/[0-9]*", workspace).split()) <= 3


def test_oom_order(workspace: Path) -> None:
    """Under memory pressure the agent goes before its init."""
    script = "cat /proc/1/oom_score_adj /proc/self/oom_score_adj"
    init, agent = map(int, sh(script, workspace).split())
    assert agent == 500 > init


# ---- the lifeline ---------------------------------------------------------------------------


def processes(words: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if entry.read_bytes().replace(b"\0", b" ").decode().strip() == words:
                found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("onloss", ["closed", "open"])
def test_death_of_the_supervisor(onloss: str, workspace: Path) -> None:
    """SIGKILL of the supervisor ends everything within a second, unless told otherwise."""
    mark = f"9{secrets.randbelow(10**8):08}"
    script = f"setsid sleep {mark} & sleep {mark} & sleep {mark}"
    before = set(Path("/run").glob("mis-container-*"))
    supervisor = subprocess.Popen(argv("sh", "-c", script, cwd=workspace, onloss=onloss))
    sleepers = wait_for(lambda: len(p := processes(f"sleep {mark}")) == 3 and p)
    group = Path(f"/proc/{sleepers[0]}/cgroup").read_text().split("/mis-test-")[1].split()[0]
    supervisor.kill()
    began = time.monotonic()
    supervisor.wait()
    try:
        if onloss == "closed":
            wait_for(lambda: not processes(f"sleep {mark}"))
            assert time.monotonic() - began < 1.0
        else:
            time.sleep(1.0)
            assert len(processes(f"sleep {mark}")) == 3
    finally:
        for pid in processes(f"sleep {mark}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not processes(f"sleep {mark}"))
        remove_cgroups(group)
        for folder in set(Path("/run").glob("mis-container-*")) - before:
            shutil.rmtree(folder)


def test_errors_of_the_runtime_are_told(workspace: Path, tmp_path: Path) -> None:
    """A container that cannot be made is one message with the runtime's words, and code 121."""
    done = run("true", cwd=workspace, binds=[(str(tmp_path / "missing"), "/srv", False)])
    assert done.returncode == 121
    assert "create failed" in done.stderr
    assert "missing" in done.stderr


if __name__ == "__main__":
    try:
        sys.exit(supervise(json.loads(sys.argv[1])))
    except MisError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
