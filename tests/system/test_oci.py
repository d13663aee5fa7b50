"""mis-oci-runtime called as engines call it: bundles by hand, containerd, an engine's restart."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import engine as engines
import pytest
from engine import GATEWAY, Engine, events, runs, traces
from harness import mis, wait_for

from mis_run import cgroup
from mis_run.linux import abi

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(engines.why_not() is not None, reason=str(engines.why_not())),
]

OPERATOR = """
profiles = "{folder}"
allowed = ["open", "dog"]
"""
OPEN = 'extends = "default"\n[network]\nallow = ["127.0.0.1:9"]\n'
EPERM = 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.make_root(tmp_path_factory.mktemp("root"))


class Runtime:
    """The runtime with a state directory, an operator's file and bundles of a test's own."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.root = root
        (folder / "open.toml").write_text(OPEN)
        self.operator("")

    def operator(self, more: str) -> None:
        """Write the operator's file."""
        text = OPERATOR.format(folder=self.folder) + more
        (self.folder / "oci.toml").write_text(text)

    def bundle(self, *command: str, **more: Any) -> Path:
        """A bundle that runs ``command``; ``more`` are further top-level keys."""
        bundle = self.folder / "bundle"
        bundle.mkdir(exist_ok=True)
        (bundle / "config.json").unlink(missing_ok=True)
        subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        config = json.loads((bundle / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": list(command)}
        config["root"] = {"path": str(self.root), "readonly": True}
        (bundle / "config.json").write_text(json.dumps({**config, **more}))
        return bundle

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [engines.RUNTIME, "--mis-config", f"{self.folder}/oci.toml"]
        argv += ["--root", f"{self.folder}/state", "--log", f"{self.folder}/log"]
        argv += ["--log-format", "json", *words]
        # Files, not pipes: a created container has them too, and a pipe would not end.
        with (self.folder / "out").open("w+") as out, (self.folder / "err").open("w+") as err:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=60, check=False
            )
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(argv, done.returncode, out.read(), err.read())

    def message(self) -> str:
        """The last error line of the log, which is what an engine shows."""
        lines = [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]
        return str([line["msg"] for line in lines if line["level"] == "error"][-1])


@pytest.fixture
def runtime(tmp_path: Path, root: Path) -> Iterator[Runtime]:
    before = traces()
    yield Runtime(tmp_path, root)
    assert traces() == before


def test_run_passes_output_and_code_through(runtime: Runtime) -> None:
    """``run`` in the foreground: the command's output and exit code, and nothing left."""
    bundle = runtime.bundle("sh", "-c", "echo hello; exit 7")
    before = (bundle / "config.json").read_text()
    done = runtime("run", "--bundle", str(bundle), "one")
    assert (done.returncode, done.stdout) == (7, "hello\n"), done.stderr
    assert json.loads((bundle / "config.json").read_text()) == json.loads(before)
    assert runtime("list", "-q").stdout == ""


def test_create_start_state_delete(runtime: Runtime) -> None:
    """The engine's steps one by one; between create and start the container is held, guarded."""
    bundle = str(runtime.bundle("sleep", "100"))
    assert runtime("create", "--bundle", bundle, "two").returncode == 0
    assert json.loads(runtime("state", "two").stdout)["status"] == "created"
    assert [run["name"] for run in runs()] == ["two"]
    assert runtime("start", "two").returncode == 0
    assert json.loads(runtime("state", "two").stdout)["status"] == "running"
    number = str(abi.number("ptrace"))
    assert runtime("exec", "two", "act", "syscall", number).returncode == EPERM
    assert runtime("exec", "two", "act", "nnp").returncode == 1
    done = runtime("exec", "--cap", "CAP_SYS_ADMIN", "two", "true")
    assert "capabilities that the container does not have" in done.stderr
    assert runtime("kill", "two", "KILL").returncode == 0
    wait_for(lambda: json.loads(runtime("state", "two").stdout)["status"] == "stopped")
    assert runtime("delete", "two").returncode == 0


def test_annotations_choose_among_the_allowed(runtime: Runtime) -> None:
    """mis.profile by annotation."""
    bundle = runtime.bundle("sleep", "100", annotations={"mis.profile": "open"})
    assert runtime("create", "--bundle", str(bundle), "three").returncode == 0
    assert [run["profile"] for run in runs()] == ["open"]
    assert runtime("delete", "--force", "three").returncode == 0


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ({"mis.profile": "../../etc/passwd"}, "no profile name"),
        ({"mis.profile": "/etc/passwd"}, "no profile name"),
        ({"mis.profile": "x" * 4000}, "no profile name"),
        ({"mis.profile": "y" * 1_000_000}, "longer than"),
        ({"mis.profile": "coding-agent"}, "not allowed for containers here"),
        ({"mis.profile": "nowhere"}, "not allowed for containers here"),
        ({"mis.profil": "open"}, "unknown"),
    ],
)
def test_hostile_annotations(runtime: Runtime, annotations: dict[str, str], words: str) -> None:
    """Refused before anything exists, in words that the engine shows."""
    bundle = runtime.bundle("true", annotations=annotations)
    done = runtime("create", "--bundle", str(bundle), "bad")
    assert done.returncode == 2
    assert words in runtime.message()
    assert len(runtime.message()) < 500
    assert "Traceback" not in done.stderr
    assert runtime("list", "-q").stdout == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"linux": []}', "[" * 10_000])
def test_malformed_bundles(runtime: Runtime, text: str) -> None:
    """No configuration, no container, no traceback."""
    bundle = runtime.bundle("true")
    (bundle / "config.json").write_text(text)
    done = runtime("create", "--bundle", str(bundle), "bad")
    assert done.returncode == 2
    assert "config.json" in runtime.message()
    assert "Traceback" not in done.stderr


def test_what_containers_cannot_have_is_refused(runtime: Runtime) -> None:
    """A profile that asks for more than an engine's container gets is no profile for it."""
    text = 'extends = "default"\n[liveness]\non_loss = "open"\n'
    (runtime.folder / "dog.toml").write_text(text)
    bundle = runtime.bundle("true", annotations={"mis.profile": "dog"})
    done = runtime("create", "--bundle", str(bundle), "bad")
    assert done.returncode == 2
    assert "on_loss = 'open' would let a container run on" in runtime.message()


def crowded(runtime: Runtime, action: str) -> str:
    """The bundle of a container that reaches its process limit, for which the profile has
    ``action``, and lives for four seconds."""
    text = f'extends = "default"\n[limits]\npids = 12\non_pids = "{action}"\n'
    (runtime.folder / "dog.toml").write_text(text)
    script = "(for n in $(seq 40); do sleep 1 & done); exec sleep 4"
    return str(runtime.bundle("sh", "-c", script, annotations={"mis.profile": "dog"}))


@pytest.mark.parametrize(("action", "code"), [("kill", 137), ("log", 0)])
def test_a_limit_of_a_container_does_what_the_profile_says(
    action: str, code: int, runtime: Runtime
) -> None:
    """As for an agent of mis-run."""
    done = runtime("run", "--bundle", crowded(runtime, action), f"limited-{action}")
    assert done.returncode == code, done.stderr
    told = wait_for(
        lambda: (found := events(f"limited-{action}"))[-1]["kind"] == "run.exit" and found
    )
    assert "limits.pids" in {event["kind"] for event in told}
    ending = str(told[-1]["subject"]["ending"])
    assert ("limits.on_pids" in ending) == (action == "kill"), ending


def test_a_limit_freezes_a_container_which_then_goes_on(runtime: Runtime) -> None:
    """The kernel says so of its cgroup; it ends by itself, and its engine can delete it."""
    assert runtime("create", "--bundle", crowded(runtime, "freeze"), "cold").returncode == 0
    pid = json.loads(runtime("state", "cold").stdout)["pid"]
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    place = next(line[3:] for line in lines if line.startswith("0::"))
    _, unified, _ = cgroup.detect()
    assert unified is not None
    state = unified / place[1:] / "cgroup.events"
    assert runtime("start", "cold").returncode == 0
    wait_for(lambda: "frozen 1" in state.read_text(), 4)
    wait_for(lambda: "frozen 0" in state.read_text(), 4)
    wait_for(lambda: json.loads(runtime("state", "cold").stdout)["status"] == "stopped")
    assert runtime("delete", "cold").returncode == 0
    assert events("cold")[-1]["subject"]["ending"] == "ended"


WITHOUT_FILTER = """#!/bin/sh
# An OCI runtime that forgets the seccomp filter.
for word; do
    case $word in --bundle=*) sed -i 's/"seccomp": /"forgotten": /' "${word#*=}/config.json" ;; esac
done
exec runc "$@"
"""


SLOW_TO_START = """#!/bin/sh
# An OCI runtime that comes back from `start` when the container is long gone.
runc "$@"
code=$?
for word; do [ "$word" != start ] || sleep 1; done
exit $code
"""


def test_a_container_shorter_than_its_start(runtime: Runtime) -> None:
    """``run`` knows its exit code even if it ended, guard and all, before `start` came back."""
    fake = runtime.folder / "runc-slow"
    fake.write_text(SLOW_TO_START)
    fake.chmod(0o755)
    runtime.operator(f'runtime = "{fake}"\n')
    done = runtime("run", "--bundle", str(runtime.bundle("sh", "-c", "exit 5")), "short")
    assert done.returncode == 5, done.stderr
    assert runtime("list", "-q").stdout == ""


def test_without_a_supervisor_no_container(runtime: Runtime) -> None:
    """What cannot be guarded is removed again, and create fails with the reason."""
    fake = runtime.folder / "runc-without-filter"
    fake.write_text(WITHOUT_FILTER)
    fake.chmod(0o755)
    runtime.operator(f'runtime = "{fake}"\n')
    done = runtime("create", "--bundle", str(runtime.bundle("true")), "bad")
    assert done.returncode != 0
    assert "has no seccomp filter" in runtime.message()
    assert runtime("list", "-q").stdout == ""


def test_the_runtimes_own_failure_is_passed_on(runtime: Runtime) -> None:
    """runc's words and code, not ours: the engine knows them."""
    done = runtime("create", "--bundle", str(runtime.bundle("/no/such/program")), "bad")
    assert done.returncode == 1
    assert "no such file or directory" in runtime.message()
    assert runtime("list", "-q").stdout == ""


def test_start_without_a_supervisor_is_refused(runtime: Runtime) -> None:
    """A container that another runtime made has no guards, and we do not start it."""
    bundle = runtime.bundle("true")
    argv = ["runc", "--root", f"{runtime.folder}/state", "create", "--bundle", str(bundle), "bare"]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=False)
    assert runtime("start", "bare").returncode == 123
    assert "has no supervisor" in runtime.message()
    assert runtime("delete", "--force", "bare").returncode == 0


@pytest.mark.parametrize("words", [("--version",), ("features",), ("spec", "--help"), ("list",)])
def test_what_needs_no_guard_is_runc(runtime: Runtime, words: tuple[str, ...]) -> None:
    """The same words as runc's, to the byte."""
    bare = subprocess.run(
        ["runc", "--root", f"{runtime.folder}/state", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    done = runtime(*words)
    assert (done.returncode, done.stdout) == (bare.returncode, bare.stdout)


@pytest.mark.parametrize("words", [("restore", "x"), ("checkpoint", "x"), ("--what", "create")])
def test_what_could_make_an_unguarded_container_is_refused(
    runtime: Runtime, words: tuple[str, ...]
) -> None:
    """Commands and options that we do not know."""
    assert runtime(*words).returncode == 2


# ---- engines ---------------------------------------------------------------------------------


def test_containerd(tmp_path: Path, root: Path) -> None:
    """containerd by itself, with its own shim: an annotation chooses the profile."""
    runtime = Runtime(tmp_path, root)
    wrapper = tmp_path / "mis"
    wrapper.write_text(f'#!/bin/sh\nexec {engines.RUNTIME} --mis-config {tmp_path}/oci.toml "$@"\n')
    wrapper.chmod(0o755)
    before = traces()
    with engines.running(tmp_path / "engine", {}) as engine:
        _installed_and_reloaded(engine)
        address = str(tmp_path / "engine/exec/containerd/containerd.sock")
        number = abi.number("ptrace")
        argv = ["ctr", "-a", address, "run", "--rm", "--rootfs", "--runc-binary", str(wrapper)]
        act = ("/bin/act", "syscall", str(number))
        done = subprocess.run(
            [*argv, "--annotation", "mis.profile=open", str(root), "c1", *act],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.stdout.strip() == str(EPERM), done.stderr
        told = events("c1")
        assert [event["kind"] for event in told] == ["run.start", "escape.ptrace", "run.exit"]
        assert told[0]["subject"]["profile"] == "open"
        done = subprocess.run(
            [*argv, "--annotation", "mis.profile=../x", str(root), "c2", *act],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "no profile name" in done.stderr
    assert traces() == before
    assert runtime("list", "-q").stdout == ""


def _installed_and_reloaded(engine: Engine) -> None:
    """mis docker install, a reload, a container; uninstall gives the file back to the byte."""
    path = engine.folder / "daemon.json"
    text = path.read_text()
    config = ("--config", str(path))
    assert "now tell Docker" in mis("docker", "install", *config).stdout
    assert "mis-ci-untrusted: installed" in mis("docker", "status", *config).stdout

    def known() -> bool:
        engine.process.send_signal(signal.SIGHUP)
        return "mis-ci-untrusted" in engine.docker("info", "-f", "{{json .Runtimes}}").stdout

    wait_for(known)
    done = engine.run("act", "connect", GATEWAY, "9", runtime="mis-ci-untrusted")
    assert done.stdout.strip() == str(EPERM), done.stderr
    assert mis("docker", "uninstall", *config).returncode == 0
    assert path.read_text() == text


def test_live_restore(tmp_path: Path) -> None:
    """dockerd ends and comes back: the container ran on, guarded, and still is."""
    runtimes = {"mis": {"path": engines.RUNTIME}}
    before = traces()
    with engines.running(tmp_path, runtimes, "--live-restore") as engine:
        argv = ("run", "-d", "--runtime", "mis", "--name", "box", engines.IMAGE, "sleep", "1000")
        engine.docker(*argv)
        before_it = runs()
        engines.stop(engine)
        assert runs() == before_it
        again = engines.start(tmp_path, engine.space, runtimes, "--live-restore")
        number = str(abi.number("ptrace"))
        done = again.docker("exec", "box", "act", "syscall", number, check=False)
        assert done.stdout.strip() == str(EPERM)
        engines.remove_all(again)
        engines.stop(again)
    # A dockerd 20.10 that came back sometimes leaves the network sandbox of what it took
    # over: a namespace held by a mount below its own folder. That is not ours to judge.
    for sandbox in (tmp_path / "exec/netns").glob("*"):
        subprocess.run(["umount", sandbox], check=False, capture_output=True)
    with suppress(AssertionError):  # compared below, with a difference to read
        wait_for(lambda: not engines.left(before), 30)
    assert engines.left(before) == []
