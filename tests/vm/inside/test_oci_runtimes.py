"""`mis-oci-runtime` on a host with cgroup v2 only, in front of each OCI runtime it delegates to.

The development machine mounts v1 controllers too, where only a launch makes room for crun.  It
installs a container's filter when that is started, runc when it is made.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import events, make_root, traces
from harness import wait_for
from test_oci import Runtime

from mis_run.linux import abi

EPERM = 1
# An emulated machine is late without being lost.
SLOW = 'extends = "default"\n[liveness]\ndeadline = "4s"\nbeat = "200ms"\n'
SLOW += '[files]\ndeny = ["...", "**/*.key"]\n[exec]\ndeny = ["...", "/bin/forbidden"]\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_root(tmp_path_factory.mktemp("root"))
    (folder / "etc/a.key").write_text("key")
    return folder


@pytest.fixture(params=["runc", "crun"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path, root: Path) -> Iterator[Runtime]:
    before = traces()
    found = Runtime(tmp_path, root)
    (tmp_path / "slow.toml").write_text(SLOW)
    found.operator(f'profile = "slow"\nruntime = "{shutil.which(request.param)}"\n')
    yield found
    for row in json.loads(found("list", "--format", "json").stdout or "null") or []:
        found("delete", "--force", row["id"])  # of a test that failed
    wait_for(lambda: traces() == before, 60)


def ended(runtime: Runtime, name: str) -> None:
    wait_for(lambda: json.loads(runtime("state", name).stdout)["status"] == "stopped", 60)


def record(runtime: Runtime, name: str, kind: str) -> list[dict[str, Any]]:
    """The events of a kind; of this test's container, which no other has been called."""
    return [one for one in events(f"{runtime.folder.name}-{name}") if one["kind"] == kind]


def test_guarded_from_the_first_instruction(runtime: Runtime) -> None:
    """Output and exit code pass through; the very first call is refused, counted, and recorded."""
    name = f"{runtime.folder.name}-first"
    number = str(abi.number("ptrace"))
    script = f"echo out; act syscall {number}"
    done = runtime("run", "--bundle", str(runtime.bundle("sh", "-c", script)), name)
    assert (done.returncode, done.stdout) == (EPERM, "out\n1\n"), done.stderr
    (event,) = record(runtime, "first", "escape.ptrace")
    assert event["verdict"] == "deny"
    # The control: a call that nothing denies.
    done = runtime("run", "--bundle", str(runtime.bundle("act", "syscall", "39")), f"{name}-2")
    assert done.returncode == 0, done.stderr


def test_files_programs_and_later_processes(runtime: Runtime) -> None:
    """The same verdicts for the container's own process and for one that is executed in it."""
    name = f"{runtime.folder.name}-three"
    script = "cat /etc/a.key; /bin/forbidden; cat /etc/secret && touch /tmp/done; sleep 100"
    bundle = str(runtime.bundle("sh", "-c", script))
    done = runtime("create", "--bundle", bundle, name)
    assert done.returncode == 0, done.stderr
    assert runtime("start", name).returncode == 0
    wait_for(lambda: record(runtime, "three", "exec.run"), 60)
    assert [one["subject"]["path"] for one in record(runtime, "three", "file.open")] == [
        "/etc/a.key"
    ]
    number = str(abi.number("ptrace"))
    assert runtime("exec", name, "act", "syscall", number).returncode == EPERM
    assert runtime("exec", name, "cat", "/etc/secret").stdout == "secret of the image\n"
    assert runtime("kill", name, "KILL").returncode == 0
    ended(runtime, name)
    assert runtime("delete", name).returncode == 0
    assert len(record(runtime, "three", "escape.ptrace")) == 1


def test_the_supervisor_is_killed(runtime: Runtime) -> None:
    """Without its supervisor a container dies, whichever runtime made it."""
    name = f"{runtime.folder.name}-four"
    bundle = str(runtime.bundle("sleep", "100"))
    assert runtime("create", "--bundle", bundle, name).returncode == 0
    assert runtime("start", name).returncode == 0
    found = subprocess.run(["pgrep", "-f", "mis_run.oci.main"], capture_output=True, text=True)
    assert found.stdout.split()
    for pid in found.stdout.split():
        subprocess.run(["kill", "-9", pid], check=False)
    ended(runtime, name)
    assert runtime("delete", name).returncode == 0
