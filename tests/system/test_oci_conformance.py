"""mis-oci-runtime against runc, case by case: the same bundle, the same calls, the same results.

The cases are those of the validation suite in opencontainers/runtime-tools, by its names, written
afresh: the suite itself is Go that nothing packages.  A case passes when both runtimes say the
same; where ours is stricter on purpose, `STRICTER` has what it says instead, and why.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engine as engines
import pytest
from engine import traces
from harness import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(engines.why_not() is not None, reason=str(engines.why_not())),
]
RUNTIMES = {"runc": "/usr/sbin/runc", "mis": engines.RUNTIME}
Config = dict[str, Any]


@dataclass
class Case:
    """One bundle: what is changed in the default configuration, and what the container runs."""

    script: str
    change: dict[str, Any] = field(default_factory=dict)  # path in config.json → value
    setup: Callable[[Path], None] = lambda folder: None  # in the bundle


def mount(target: str, kind: str, *options: str, source: str = "none") -> Config:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def spaces(*kinds: str, **paths: str) -> list[Config]:
    every = [{"type": kind} for kind in kinds]
    return [*every, *({"type": kind, "path": path} for kind, path in paths.items())]


V1 = Path("/sys/fs/cgroup/memory").is_dir()
SHOW = "grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb):' /proc/self/status"
CASES = {
    "default": Case("id; pwd; env | sort; ls -l /proc/self/fd | wc -l; ls /dev"),
    "hostname": Case("hostname", {"hostname": "somewhere"}),
    "process-args-env-cwd": Case(
        "pwd; echo $A; umask", {"process.cwd": "/work", "process.env": ["A=b", "PATH=/bin"]}
    ),
    "process-user": Case(
        "id -u; id -g; id -G; umask",
        {"process.user": {"uid": 1000, "gid": 1000, "additionalGids": [5, 7], "umask": 63}},
    ),
    "process-rlimits": Case(
        "ulimit -n; ulimit -Hn; ulimit -c",
        {
            "process.rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            ]
        },
    ),
    "process-oom-score-adj": Case("cat /proc/self/oom_score_adj", {"process.oomScoreAdj": 300}),
    "process-capabilities": Case(
        SHOW,
        {
            "process.capabilities": {
                kind: ["CAP_CHOWN", "CAP_KILL"]
                for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")
            }
        },
    ),
    "process-no-new-privileges": Case(
        "grep NoNewPrivs /proc/self/status", {"process.noNewPrivileges": False}
    ),
    "root-readonly": Case("touch /x 2>&1; echo $?"),
    "root-writable": Case("touch /tmp/y && ls /tmp && rm /tmp/y", {"root.readonly": False}),
    "mounts": Case(
        "grep -E ' /tmp | /work ' /proc/mounts | cut -d' ' -f2-3; cat /work/file; touch /work/x",
        {
            "+mounts": [
                mount("/tmp", "tmpfs", "nosuid", "noexec", "size=64k", "mode=1777"),
                mount("/work", "bind", "rbind", "ro", source="{bundle}/given"),
            ]
        },
        lambda folder: _give(folder / "given/file", "given\n"),
    ),
    "masked-paths": Case(
        "cat /etc/secret; echo $?; ls /work; cat /proc/kcore | wc -c",
        {"linux.maskedPaths": ["/etc/secret", "/work", "/proc/kcore", "/no/such"]},
    ),
    "readonly-paths": Case(
        "touch /tmp/x; echo $?; touch /work/x 2>/dev/null; echo $?",
        {
            "linux.readonlyPaths": ["/work", "/no/such"],
            "+mounts": [mount("/tmp", "tmpfs"), mount("/work", "tmpfs")],
        },
    ),
    "sysctl": Case(
        "cat /proc/sys/net/ipv4/ip_default_ttl", {"linux.sysctl": {"net.ipv4.ip_default_ttl": "7"}}
    ),
    "devices": Case(
        "ls -l /dev/some | cut -c1-10; stat -c '%t %T %u %a' /dev/some",
        {
            "linux.devices": [
                {
                    "type": "c",
                    "path": "/dev/some",
                    "major": 1,
                    "minor": 5,
                    "uid": 7,
                    "fileMode": 438,
                }
            ]
        },
    ),
    "seccomp": Case(
        "act syscall 79; act syscall 39 | wc -l",  # getcwd, getpid
        {
            "linux.seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [
                    {"names": ["getcwd"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42},
                ],
            }
        },
    ),
    "rootfs-propagation-private": Case(
        "grep -c shared: /proc/self/mountinfo", {"linux.rootfsPropagation": "private"}
    ),
    "rootfs-propagation-slave": Case(
        "grep ' / / ' /proc/self/mountinfo | grep -c shared:",
        {"linux.rootfsPropagation": "slave"},
    ),
    "ns-itype": Case(
        "for n in pid net ipc uts mnt; do readlink /proc/1/ns/$n; done | sort | uniq | wc -l"
    ),
    "ns-nopath-uts": Case(
        "hostname | wc -l", {"linux.namespaces": spaces("pid", "network", "ipc", "mount")}
    ),
    "ns-path": Case(
        "ls /sys/class/net | wc -l",
        {"linux.namespaces": spaces("pid", "ipc", "uts", "mount", network="/proc/{other}/ns/net")},
    ),
    "ns-path-wrong-type": Case(
        "true",
        {"linux.namespaces": spaces("pid", "ipc", "uts", "mount", network="/proc/{other}/ns/uts")},
    ),
    "cgroup-path": Case("cut -d: -f3 /proc/self/cgroup | sort -u", {"linux.cgroupsPath": "/{cg}"}),
    "cgroup-pids": Case(
        "cat /sys/fs/cgroup/pids/pids.max", {"linux.resources.pids": {"limit": 50}}
    ),
    "cgroup-memory": Case(
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes",
        {"linux.resources.memory": {"limit": 64 << 20, "swap": 64 << 20}},
    ),
    "cgroup-cpus": Case(
        "cd /sys/fs/cgroup/cpu; cat cpu.shares cpu.cfs_quota_us cpu.cfs_period_us",
        {"linux.resources.cpu": {"shares": 512, "quota": 5000, "period": 100000}},
    ),
    "cgroup-blkio": Case(
        "cat /sys/fs/cgroup/blkio/blkio.bfq.weight", {"linux.resources.blockIO": {"weight": 500}}
    ),
    "uid-gid-mappings": Case(
        "cat /proc/self/uid_map /proc/self/gid_map; id -u; touch /tmp 2>&1",
        {
            "+linux.namespaces": [{"type": "user"}],
            "linux.uidMappings": [{"containerID": 0, "hostID": 0, "size": 1000}],
            "linux.gidMappings": [{"containerID": 0, "hostID": 0, "size": 1000}],
        },
    ),
    "cgroup-devices": Case(
        "head -c 1 /dev/full >/dev/null 2>&1; echo $?; head -c 1 /dev/zero 2>&1 | wc -c",
        {
            "linux.resources.devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
                {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            ]
        },
    ),
    "misc-unknown-properties": Case(
        "echo ran", {"unknown": {"a": [1]}, "process.unknown": 1, "linux.unknown": "x"}
    ),
    "misc-unknown-version": Case("echo ran", {"ociVersion": "9.9.9"}),
    "exit-code": Case("exit 42"),
    "signal": Case("sh -c 'kill -KILL $$'; echo $?"),
    "no-such-program": Case("", {"process.args": ["/no/such"]}),
    "no-such-cwd": Case("pwd", {"process.cwd": "/not/there"}),
    "annotations": Case("echo ran", {"annotations": {"org.example": "x"}}),
}

STRICTER: dict[str, tuple[str, str]] = {
    # name: what ours says, why
    "process-no-new-privileges": (
        "NoNewPrivs:\t1\n",
        "setuid programs gain nothing in a guarded container",
    ),
}


def _give(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def other() -> Iterator[int]:
    """A process with namespaces of its own."""
    process = subprocess.Popen(["unshare", "-n", "-u", "sleep", "100"])
    mine = Path("/proc/self/ns/net").readlink()
    wait_for(lambda: Path(f"/proc/{process.pid}/ns/net").readlink() != mine)
    yield process.pid
    process.kill()
    process.wait()


class Runtime:
    """One of the two runtimes, with a state directory and a bundle of its own."""

    def __init__(self, name: str, folder: Path, root: Path) -> None:
        self.folder = folder / name
        self.bundle = self.folder / "bundle"
        self.bundle.mkdir(parents=True)
        self.argv = [RUNTIMES[name], "--root", str(self.folder / "state")]
        subprocess.run(["runc", "spec"], cwd=self.bundle, check=True)
        self.config = json.loads((self.bundle / "config.json").read_text())
        self.config["process"]["terminal"] = False
        self.config["root"]["path"] = str(root)

    def write(self, script: str, change: Config, words: dict[str, str]) -> None:
        """The bundle's configuration: defaults, the script, the changes."""
        self.config["process"]["args"] = ["sh", "-c", script]
        text = json.dumps(change)
        for key, value in {"bundle": str(self.bundle), **words}.items():
            text = text.replace(f"{{{key}}}", value)
        for path, value in json.loads(text).items():
            *above, last = path.removeprefix("+").split(".")
            at = self.config
            for key in above:
                at = at.setdefault(key, {})
            at[last] = [*at[last], *value] if path.startswith("+") else value
        (self.bundle / "config.json").write_text(json.dumps(self.config))

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        # Files: a created container keeps them open, and a pipe would not end.
        with (self.folder / "out").open("w+") as out, (self.folder / "err").open("w+") as err:
            argv = [*self.argv, *words]
            code = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=60, check=False
            ).returncode
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(argv, code, out.read(), err.read())


@pytest.fixture
def both(tmp_path: Path, root: Path) -> Iterator[list[Runtime]]:
    before = traces()
    yield [Runtime(name, tmp_path, root) for name in RUNTIMES]
    wait_for(lambda: traces() == before, 5)


@pytest.mark.parametrize("name", CASES)
def test_bundle(both: list[Runtime], other: int, name: str) -> None:
    """The same output and exit code from both."""
    if name.startswith("cgroup-") and name not in ("cgroup-path", "cgroup-devices") and not V1:
        pytest.skip("reads files of cgroup v1")
    case = CASES[name]
    said = []
    for number, runtime in enumerate(both):
        words = {"other": str(other), "cg": "tst-conformance"}
        case.setup(runtime.bundle)
        runtime.write(case.script, case.change, words)
        done = runtime("run", "--bundle", str(runtime.bundle), f"case-{os.getpid()}-{number}")
        assert "Traceback" not in done.stderr
        said.append((done.returncode, done.stdout))
    bare, ours = said
    if name in STRICTER:
        assert ours == (0, STRICTER[name][0])
        assert ours != bare
    else:
        assert ours == bare
    if bare[0] == 0:
        assert bare[1], "a case that says nothing compares nothing"


# ---- the life of a container ------------------------------------------------------------------

LIFE = {
    "create-twice": ["create", "create", "delete --force"],
    "start-twice": ["create", "start", "start", "delete --force"],
    "start-unknown": ["start"],
    "state-unknown": ["state"],
    "kill-unknown": ["kill X"],
    "delete-unknown": ["delete", "delete --force"],
    "delete-created": ["create", "delete", "delete --force"],
    "delete-running": ["create", "start", "delete", "delete --force", "state"],
    "kill-created": ["create", "kill X KILL", "stopped", "start", "delete"],
    "kill-running": ["create", "start", "kill X KILL", "stopped", "kill X KILL", "delete"],
    "killsig": ["create", "start", "until stopped", "delete"],
    "kill-no-effect": ["create", "start", "kill X 0", "state", "delete --force"],
    "pause": ["create", "start", "pause", "state", "resume", "state", "delete --force"],
    "again": ["create", "start", "delete --force", "create", "start", "delete --force"],
    "exec": ["create", "start", "exec X echo hello", "exec X sh -c 'exit 9'", "delete --force"],
    "create-option": ["create --what", "create", "delete --force"],
}


@pytest.mark.parametrize("name", LIFE)
def test_life(both: list[Runtime], name: str) -> None:
    """The same calls succeed and fail, and the state says the same after each."""
    told = []
    for number, runtime in enumerate(both):
        # The shell is pid 1: it gets only signals that it has asked for.
        runtime.write("trap 'exit 3' USR1; while :; do sleep 0.1; done", {}, {})
        container = f"life-{os.getpid()}-{number}"
        told.append([_step(runtime, words, container) for words in LIFE[name]])
    assert told[0] == told[1]


def _step(runtime: Runtime, words: str, container: str) -> tuple[str, bool, str]:
    """(the step, whether it succeeded, the container's status afterwards or what exec said)."""

    def status() -> str:
        done = runtime("state", container)
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else "none"

    if words == "stopped":
        wait_for(lambda: status() == "stopped")
        return words, True, "stopped"
    if words == "until stopped":  # by a signal that it may not have asked for yet
        wait_for(lambda: runtime("kill", container, "USR1") and status() == "stopped")
        return words, True, "stopped"
    command, *rest = ["exec", "X", "sh", "-c", "exit 9"] if "exit 9" in words else words.split()
    given = [container if word == "X" else word for word in rest]
    if command == "create":
        given += ["--bundle", str(runtime.bundle)]
    if "X" not in rest:
        given += [container]
    done = runtime(command, *given)
    assert "Traceback" not in done.stderr
    if command == "exec":
        return words, done.returncode == 0, f"{done.returncode} {done.stdout}"
    return words, done.returncode == 0, status()


# ---- hooks, files ------------------------------------------------------------------------------

STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


@pytest.mark.parametrize("failing", [None, *STAGES])
def test_hooks(both: list[Runtime], failing: str | None) -> None:
    """Each stage runs as often, in the same order, told the same; one that fails ends the same."""
    said = []
    for number, runtime in enumerate(both):
        log = runtime.folder / "hooks"
        log.touch()
        made: dict[str, list[Config]] = {}
        for stage in STAGES:
            # What runs inside the container has its files, and no way to ours.
            code = 1 if stage == failing else 0
            keys = f'sed \'s/.*"status":"\\([a-z]*\\)".*/{stage} \\1/\''
            script = f"{keys} >> {log}; exit {code}"
            if stage == "startContainer":
                script = f"exit {code}"
            made[stage] = [{"path": "/bin/sh", "args": ["sh", "-c", script]}]
        runtime.write("echo ran", {}, {})
        runtime.config["hooks"] = made
        (runtime.bundle / "config.json").write_text(json.dumps(runtime.config))
        container = f"hooks-{os.getpid()}-{number}"
        done = runtime("run", "--bundle", str(runtime.bundle), container)
        runtime("delete", "--force", container)
        said.append((done.returncode == 0, done.stdout, log.read_text().split("\n")))
    assert said[0] == said[1]
    assert any(line for line in said[0][2])


def test_pid_file_and_later_edits(both: list[Runtime]) -> None:
    """The pid file holds the container's init; what is edited after create has no effect."""
    said = []
    for number, runtime in enumerate(both):
        runtime.write("echo first; exec sleep 100", {}, {})
        container, pid_file = f"pid-{os.getpid()}-{number}", runtime.folder / "pid"
        argv = ("--bundle", str(runtime.bundle), "--pid-file", str(pid_file))
        assert runtime("create", *argv, container).returncode == 0
        told = json.loads(runtime("state", container).stdout)
        assert told["pid"] == int(pid_file.read_text())
        assert told["bundle"] == str(runtime.bundle)
        runtime.write("echo second; exec sleep 100", {}, {})
        assert runtime("start", container).returncode == 0
        words = Path(f"/proc/{told['pid']}/cmdline")
        wait_for(lambda words=words: b"sleep" in words.read_bytes())
        said.append((sorted(told), told["ociVersion"], told["status"]))
        assert runtime("delete", "--force", container).returncode == 0
    assert said[0] == said[1]


def test_state_has_the_annotations(both: list[Runtime]) -> None:
    """And nothing of ours."""
    said = []
    for number, runtime in enumerate(both):
        runtime.write("exec sleep 100", {"annotations": {"org.example": "x"}}, {})
        container = f"state-{os.getpid()}-{number}"
        assert runtime("create", "--bundle", str(runtime.bundle), container).returncode == 0
        said.append(json.loads(runtime("state", container).stdout)["annotations"])
        assert runtime("delete", "--force", container).returncode == 0
    assert said == [{"org.example": "x"}] * 2
