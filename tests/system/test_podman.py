"""Containers of a real podman under mis-oci-runtime: guarded as Docker's are, and nothing left.

Each denial has its negative control under plain runc, in the same podman and image.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine as engines
import podman as podmans
import pytest
from engine import events, runs
from harness import MIS, mis, wait_for
from podman import GATEWAY, Podman, traces
from test_docker import write_profiles

from mis_run.linux import abi

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(podmans.why_not() is not None, reason=str(podmans.why_not())),
]
EPERM, ENETUNREACH, ECONNREFUSED = 1, 101, 111
NO_ANSWER = {ENETUNREACH, ECONNREFUSED}
TO_GATEWAY = f"act connect {GATEWAY} 9"
PTRACE = f"act syscall {abi.number('ptrace')}"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    folder = tmp_path_factory.mktemp("podman")
    config = write_profiles(folder / "etc", gateway=GATEWAY)
    program = folder / "mis"
    program.write_text(f'#!/bin/sh\nexec {engines.RUNTIME} --mis-config {config} "$@"\n')
    program.chmod(0o755)
    before = traces()
    with podmans.running(folder / "home", {"mis": str(program)}) as running:
        yield running
    wait_for(lambda: traces() == before, 5)


@pytest.fixture
def box(engine: Podman) -> Iterator[Podman]:
    """For tests that start containers by name: they are removed, and leave nothing."""
    before = traces()
    yield engine
    engine.remove_all()
    wait_for(lambda: traces() == before, 5)


def said(done: subprocess.CompletedProcess[str]) -> list[int]:
    """The errno that each `act` met inside."""
    assert done.stdout.split(), done.stderr
    return [int(word) for word in done.stdout.split()]


def start(box: Podman, *options: str, runtime: str = "mis", name: str = "box") -> str:
    """``podman run -d`` of a sleeping container; its id."""
    argv = ("--runtime", runtime, "run", "-d", "--name", name, *options)
    return box(*argv, engines.IMAGE, "sleep", "1000").stdout.strip()


def state_of(box: Podman, name: str = "box") -> dict[str, Any]:
    return dict(json.loads(box("inspect", "-f", "{{json .State}}", name).stdout))


def ended(box: Podman) -> dict[str, Any]:
    wait_for(lambda: state_of(box)["Status"] == "exited", 10)
    return state_of(box)


def test_network_and_escapes_are_denied_and_recorded(engine: Podman) -> None:
    """What no rule allows is refused and recorded; under plain runc it passes."""
    script = f"{TO_GATEWAY}; {PTRACE}; act nnp"
    assert said(engine.run("sh", "-c", script)) == [EPERM, EPERM, 1]
    told = [event["kind"] for event in events() if event.get("verdict") == "deny"]
    assert told == ["net.connect", "escape.ptrace"]
    assert said(engine.run("sh", "-c", script, runtime="runc")) == [ECONNREFUSED, 0, 0]


def test_the_annotation_chooses_the_profile(engine: Podman) -> None:
    """--annotation mis.profile: an allowed one applies, another one refuses the container."""
    asked = ("--annotation", "mis.profile=open")
    script = f"{TO_GATEWAY}; act connect {GATEWAY} 10"
    assert said(engine.run("sh", "-c", script, options=asked)) == [ECONNREFUSED, EPERM]
    done = engine.run("true", options=("--annotation", "mis.profile=../x"))
    assert done.returncode == 126
    assert "is no profile name" in done.stderr
    assert "Traceback" not in done.stderr


def test_files_and_programs(engine: Podman, tmp_path: Path) -> None:
    """files.deny by inode, in a volume too, and exec.deny; plain runc reads and runs them."""
    (tmp_path / "a.key").write_text("key\n")
    os.link(tmp_path / "a.key", tmp_path / "harmless")
    options = ("-v", f"{tmp_path}:/work", "-w", "/work")
    asked = (*options, "--annotation", "mis.profile=files")
    script = "cat /etc/secret; cat harmless; forbidden; echo end"
    assert engine.run("sh", "-c", script, options=asked).stdout == "end\n"
    told = {event["kind"] for event in events() if event.get("verdict") == "deny"}
    assert told == {"file.open", "exec.run"}
    bare = engine.run("sh", "-c", script, options=options, runtime="runc")
    assert bare.stdout == "secret of the image\nkey\nran\nend\n"


def test_networks(engine: Podman) -> None:
    """--network none; host needs a profile with mode 'host', whose rules apply there."""
    assert said(engine.run("sh", "-c", TO_GATEWAY, options=("--network", "none"))) == [EPERM]
    host = ("--network", "host")
    assert "network mode 'guarded'" in engine.run("true", options=host).stderr
    asked = (*host, "--annotation", "mis.profile=host")
    script = f"{TO_GATEWAY}; act connect {GATEWAY} 10"
    # What is allowed finds no way there, or nobody: some network stacks keep podman's bridge.
    allowed, denied = said(engine.run("sh", "-c", script, options=asked))
    assert allowed in NO_ANSWER and denied == EPERM
    free = said(engine.run("sh", "-c", script, options=host, runtime="runc"))
    assert len(free) == 2 and {*free} <= NO_ANSWER


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--privileged",), "refused"),
        (("--pid", "host"), "host's pid namespace"),
        (("-v", "/etc:/host"), "the volume /etc"),
    ],
)
def test_refusals(engine: Podman, options: tuple[str, ...], words: str) -> None:
    """What would hand over the host is refused in words that podman shows, and leaves nothing."""
    done = engine.run("true", options=options)
    assert done.returncode == 126
    assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert engine.run("true", options=options, runtime="runc").returncode == 0


def test_life_cycle(box: Podman) -> None:
    """run -d, exec, pause, unpause, restart, stop, start, kill, rm: one supervisor at a time."""
    short = start(box, "--init")[:12]
    assert [run["name"] for run in runs()] == [short]
    assert said(box("exec", "box", "sh", "-c", f"{TO_GATEWAY}; act nnp", check=False)) == [EPERM, 1]
    box("pause", "box")
    assert state_of(box)["Status"] == "paused"
    box("unpause", "box")
    first = runs()[0]["supervisor"]
    box("restart", "--time", "1", "box")
    wait_for(lambda: [run["supervisor"] != first for run in runs()] == [True])
    assert said(box("exec", "box", "sh", "-c", TO_GATEWAY, check=False)) == [EPERM]
    box("stop", "--time", "1", "box")
    assert state_of(box)["ExitCode"] in (137, 143)
    wait_for(lambda: not runs())
    box("start", "box")
    assert len(runs()) == 1
    box("kill", "--signal", "USR1", "box")
    assert ended(box)["ExitCode"] == 128 + signal.SIGUSR1
    box("rm", "box")


def test_exec_with_more_rights_is_refused(box: Podman) -> None:
    """podman exec --privileged does not get around what the container was made with."""
    start(box)
    done = box("exec", "--privileged", "box", "true", check=False)
    assert done.returncode != 0
    assert "capabilities that the container does not have" in done.stdout + done.stderr
    start(box, runtime="runc", name="bare")
    assert box("exec", "--privileged", "bare", "true").returncode == 0


def test_health_check_and_log(box: Podman) -> None:
    """A health check is an exec, guarded; the log driver gets the container's output."""
    script = "echo hello; sleep 1000"
    argv = ("--runtime", "mis", "run", "-d", "--name", "box", "--log-driver", "k8s-file")
    box(*argv, "--health-cmd", TO_GATEWAY, engines.IMAGE, "sh", "-c", script)
    assert box("healthcheck", "run", "box", check=False).returncode == 1
    assert [event["kind"] for event in events() if event.get("verdict")] == ["net.connect"]
    assert wait_for(lambda: box("logs", "box").stdout) == "hello\n"


def test_a_pod(box: Podman) -> None:
    """Containers of a pod share a network, and each is guarded by its own profile."""
    box("pod", "create", "--infra=false", "--name", "pod")
    try:
        start(box, "--pod", "pod", "--annotation", "mis.profile=open")
        start(box, "--pod", "pod", name="other")
        (loose,), (strict,) = (
            said(box("exec", name, "sh", "-c", TO_GATEWAY, check=False))
            for name in ("box", "other")
        )
        assert (loose, strict) == (ECONNREFUSED, EPERM)
    finally:
        box("pod", "rm", "--force", "--time", "0", "pod")


def test_losing_the_supervisor_ends_the_container(box: Podman) -> None:
    """SIGKILL of the supervisor: the watchdog kills the container, podman sees 137."""
    start(box)
    (run,) = runs()
    os.kill(run["supervisor"], signal.SIGKILL)
    assert ended(box)["ExitCode"] == 137


def test_mis_kill_finds_it(box: Podman) -> None:
    """mis knows the container by podman's short id."""
    short = start(box)[:12]
    assert json.loads(mis("inspect", short).stdout)["plan"]["profile"]["name"] == "default"
    assert mis("kill", short).returncode == 0
    assert ended(box)["ExitCode"] == 137


def test_open_lets_the_container_run_on(box: Podman) -> None:
    """on_loss = "open": it outlives its supervisor, mis attach guards it again, podman ends it."""
    short = start(box, "--annotation", "mis.profile=lasting")[:12]
    script = f"{TO_GATEWAY}; {PTRACE}"
    assert said(box("exec", "box", "sh", "-c", script, check=False)) == [EPERM, EPERM]
    os.kill(runs()[0]["supervisor"], signal.SIGKILL)
    wait_for(lambda: "watchdog.open" in {event["kind"] for event in events()})
    assert state_of(box)["Status"] == "running"
    assert box("exec", "box", "true", check=False).returncode != 0  # nobody could guard it
    again = subprocess.Popen([*MIS, "attach", short], stderr=subprocess.DEVNULL)
    wait_for(lambda: "run.attached" in {event["kind"] for event in events()})
    assert said(box("exec", "box", "sh", "-c", script, check=False)) == [EPERM, EPERM]
    box("stop", "--time", "0", "box")
    assert again.wait(20) == 0
    assert state_of(box)["ExitCode"] == 137
