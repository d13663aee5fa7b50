"""`mis-oci-runtime` on a host with cgroup v2 only, in front of each OCI runtime it delegates to.

crun does not run where v1 controllers are mounted, so the development machine cannot try it.  It
installs a container's filter when that is started, runc when it is made.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import events, make_root, traces
from harness import wait_for
from test_oci import Runtime

from mis_run.linux import abi

EPERM = 1
# An emulated machine is late without being lost.
SLOW = 'extends = "default"\n[liveness]\ndeadline = "4s"\nbeat = "200ms"\n'
SLOW += '[files]\ndeny = ["...", "/etc/secret"]\n[exec]\ndeny = ["...", "/bin/forbidden"]\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(params=["runc", "crun"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path, root: Path) -> Iterator[Runtime]:
    before = traces()
    found = Runtime(tmp_path, root)
    (tmp_path / "slow.toml").write_text(SLOW)
    found.operator(f'profile = "slow"\nruntime = "{shutil.which(request.param)}"\n')
    yield found
    assert traces() == before


def ended(runtime: Runtime, name: str) -> None:
    wait_for(lambda: json.loads(runtime("state", name).stdout)["status"] == "stopped", 60)


def test_guarded_from_the_first_instruction(runtime: Runtime) -> None:
    """Output and exit code pass through; the very first call is refused, counted, and recorded."""
    number = str(abi.number("ptrace"))
    done = runtime("run", "--bundle", str(runtime.bundle("act", "syscall", number)), "first")
    assert done.returncode == EPERM, done.stderr
    (event,) = (one for one in events("first") if one["kind"] == "escape.ptrace")
    assert event["verdict"] == "deny"
    # The control: a call that nothing denies.
    done = runtime("run", "--bundle", str(runtime.bundle("act", "syscall", "39")), "second")
    assert done.returncode == 0, done.stderr


def test_files_programs_and_later_processes(runtime: Runtime) -> None:
    """The same verdicts for the container's own process and for one that is executed in it."""
    script = "cat /etc/secret; /bin/forbidden; cat /etc/passwd >/dev/null && echo read; sleep 100"
    bundle = str(runtime.bundle("sh", "-c", script))
    assert runtime("create", "--bundle", bundle, "three").returncode == 0
    assert runtime("start", "three").returncode == 0
    told = {"file.open", "exec.run"}
    wait_for(lambda: {one["kind"] for one in events("three")} >= told, 60)
    number = str(abi.number("ptrace"))
    assert runtime("exec", "three", "act", "syscall", number).returncode == EPERM
    assert runtime("exec", "three", "cat", "/etc/passwd").returncode == 0
    assert runtime("kill", "three", "KILL").returncode == 0
    ended(runtime, "three")
    assert runtime("delete", "three").returncode == 0
    assert [one["kind"] for one in events("three")].count("escape.ptrace") == 1


def test_the_supervisor_is_killed(runtime: Runtime) -> None:
    """Without its supervisor a container dies, whichever runtime made it."""
    bundle = str(runtime.bundle("sleep", "100"))
    assert runtime("create", "--bundle", bundle, "four").returncode == 0
    assert runtime("start", "four").returncode == 0
    found = subprocess.run(["pgrep", "-f", "mis_run.oci.main"], capture_output=True, text=True)
    for pid in found.stdout.split():
        subprocess.run(["kill", "-9", pid], check=False)
    ended(runtime, "four")
    assert runtime("delete", "four").returncode == 0
