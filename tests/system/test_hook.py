"""mis-oci-hook, called by a real podman and by runc itself: the network guard without our runtime.

The negative control of each denial is the same container without the hook.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine as engines
import podman as podmans
import pytest
from engine import GATEWAY, events, runs
from harness import MIS, ROOT, wait_for
from podman import Podman, traces

from mis_run.linux import abi

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(podmans.why_not() is not None, reason=str(podmans.why_not())),
]
EPERM, ENETUNREACH, ECONNREFUSED = 1, 101, 111
TO_GATEWAY = f"act connect {podmans.GATEWAY} 9"
PTRACE = f"act syscall {abi.number('ptrace')}"
NETWORK_ONLY = [f"--allow-missing={name}" for name in ("file", "exec", "escape", "limits")]
ASKING = ("--annotation", "mis.profile=default")


# ---- podman ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    before = traces()
    with podmans.running(tmp_path_factory.mktemp("podman") / "home", {}) as running:
        yield running
    wait_for(lambda: traces() == before, 5)


@pytest.fixture
def box(engine: Podman) -> Iterator[Podman]:
    """podman as it was before: no containers, nothing of ours in its configuration."""
    before = traces()
    files = engine.inside("find", "/etc/containers").stdout
    yield engine
    engine.remove_all()
    wait_for(lambda: traces() == before, 5)
    docker(engine, "uninstall")
    assert engine.inside("find", "/etc/containers").stdout == files


def docker(box: Podman, *words: str) -> subprocess.CompletedProcess[str]:
    """``mis docker WORDS --engine podman`` where this podman's configuration is."""
    return box.inside(*MIS, "docker", *words, "--engine", "podman")


def said(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.stdout.split(), done.stderr
    return [int(word) for word in done.stdout.split()]


def test_installed_and_removed(box: Podman) -> None:
    """install: podman knows the runtime by name, and calls the hook; uninstall: neither."""
    assert "invalid argument" in box.run("true").stderr
    docker(box, "install", *NETWORK_ONLY)
    assert docker(box, "status").stdout.count(": installed\n") == 2
    script = f"{TO_GATEWAY}; {PTRACE}"
    assert said(box.run("sh", "-c", script, options=ASKING)) == [EPERM, EPERM]
    # What only the runtime gives is not there: the hook guards the network.
    assert said(box.run("sh", "-c", script, options=ASKING, runtime="runc")) == [EPERM, 0]
    assert said(box.run("sh", "-c", script, runtime="runc")) == [ECONNREFUSED, 0]
    docker(box, "uninstall")
    assert said(box.run("sh", "-c", script, options=ASKING, runtime="runc")) == [ECONNREFUSED, 0]


def test_the_record_says_what_is_missing(box: Podman) -> None:
    """Denials, counters and waived guarantees, from start to exit."""
    docker(box, "install", *NETWORK_ONLY)
    box.run("sh", "-c", TO_GATEWAY, options=ASKING, runtime="runc")
    told = events()
    assert [event["kind"] for event in told] == ["run.start", "net.connect", "run.exit"]
    assert told[0]["subject"]["waived"] == ["escape", "exec", "file", "limits"]
    assert told[0]["subject"]["mechanisms"] == ["cgroup-bpf", "perf-cgroup", "watchdog"]
    assert told[-1]["subject"]["counters"]


def test_for_every_container(box: Podman) -> None:
    """--always: also who asks for nothing, under the operator's profile; ours are guarded once."""
    docker(box, "install", "--always", *NETWORK_ONLY)
    assert said(box.run("sh", "-c", TO_GATEWAY, runtime="runc")) == [EPERM]
    argv = ("--runtime", "mis", "run", "-d", "--name", "box", engines.IMAGE, "sleep", "1000")
    box(*argv)
    (run,) = runs()
    assert "seccomp-notify" in run["mechanisms"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ASKING, "profile default requires"),
        (("--annotation", "mis.profile=../x"), "no profile name"),
        (("--annotation", "mis.profil=default"), "unknown"),
        ((*ASKING, "--cap-add", "NET_RAW"), "cannot guard a container with CAP_NET_RAW"),
        ((*ASKING, "--privileged"), "refused"),
        ((*ASKING, "--network", "host"), "host's network namespace"),
    ],
)
def test_what_cannot_be_guarded_does_not_start(
    box: Podman, options: tuple[str, ...], words: str
) -> None:
    """The hook fails, podman shows its words, and the container's program never runs."""
    docker(box, "install")
    done = box.run("echo", "ran", options=options, runtime="runc")
    assert done.returncode == 126
    assert done.stdout == ""
    assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    docker(box, "uninstall")
    assert box.run("echo", "ran", options=options, runtime="runc").stdout == "ran\n"


def test_life_cycle(box: Podman) -> None:
    """exec, pause, restart, stop, start, rm: guarded each time it starts, by a new supervisor."""
    docker(box, "install", *NETWORK_ONLY)
    argv = ("--runtime", "runc", "run", "-d", "--name", "box", *ASKING)
    short = box(*argv, engines.IMAGE, "sleep", "1000").stdout.strip()[:12]
    assert [run["name"] for run in runs()] == [short]
    assert said(box("exec", "box", "sh", "-c", TO_GATEWAY, check=False)) == [EPERM]
    box("pause", "box")
    box("unpause", "box")
    first = runs()[0]["supervisor"]
    box("restart", "--time", "0", "box")
    wait_for(lambda: [run["supervisor"] != first for run in runs()] == [True])
    assert said(box("exec", "box", "sh", "-c", TO_GATEWAY, check=False)) == [EPERM]
    box("stop", "--time", "0", "box")
    wait_for(lambda: not runs())
    box("start", "box")
    assert said(box("exec", "box", "sh", "-c", TO_GATEWAY, check=False)) == [EPERM]
    os.kill(runs()[0]["supervisor"], 9)

    def code() -> str:
        return box("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box").stdout.strip()

    wait_for(lambda: code() == "exited 137", 10)


# ---- runc itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = traces()
    yield
    wait_for(lambda: traces() == before, 5)


def run_bundle(
    folder: Path, root: Path, *arguments: str, hooks: bool = True, **more: Any
) -> subprocess.CompletedProcess[str]:
    """``runc run`` of a bundle that connects to an address and prints what it met."""
    bundle = folder / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "config.json").unlink(missing_ok=True)
    subprocess.run(["runc", "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": ["act", "connect", GATEWAY, "9"]}
    for names in config["process"]["capabilities"].values():
        names[:] = ["CAP_KILL"]
    config["root"] = {"path": str(root), "readonly": True}
    config |= more
    if hooks:
        one = {"path": str(ROOT / "mis-oci-hook"), "args": ["mis-oci-hook", *arguments]}
        config["hooks"] = {"createRuntime": [one], "poststop": [one]}
    (bundle / "config.json").write_text(json.dumps(config))
    argv = ["runc", "--root", str(folder / "state"), "run", "--bundle", str(bundle), "hooked"]
    return subprocess.run(
        argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )


WAIVING = ("--allow-missing", "file,exec,escape,limits")


@pytest.mark.usefixtures("nothing_left")
def test_runc_calls_it_natively(tmp_path: Path, root: Path) -> None:
    """No engine at all: hooks in a bundle's config.json."""
    assert said(run_bundle(tmp_path, root, *WAIVING)) == [EPERM]
    assert said(run_bundle(tmp_path, root, hooks=False)) == [ENETUNREACH]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("arguments", "more", "words"),
    [
        ((), {}, "profile default requires"),
        (("--what",), {}, "unrecognized arguments"),
        ((*WAIVING, "--mis-profile", "nowhere"), {}, "nowhere"),
        ((*WAIVING, "--mis-config", "/nonexistent"), {}, "/nonexistent"),
        (WAIVING, {"annotations": {"mis.profile": "coding-agent"}}, "not allowed for containers"),
    ],
)
def test_runc_does_not_start_what_the_hook_refuses(
    tmp_path: Path, root: Path, arguments: tuple[str, ...], more: dict[str, Any], words: str
) -> None:
    """It fails closed: runc passes our words on and removes the container."""
    done = run_bundle(tmp_path, root, *arguments, **more)
    assert done.returncode != 0
    assert done.stdout == ""
    assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    listed = ["runc", "--root", str(tmp_path / "state"), "list", "-q"]
    assert subprocess.run(listed, capture_output=True, check=True).stdout == b""


@pytest.mark.parametrize("state", ["", "{}", '{"id": "x", "pid": 1, "bundle": "/nonexistent"}'])
def test_called_by_hand(state: str) -> None:
    """Without a container's state: said so, exit code of a usage error."""
    done = subprocess.run(
        [ROOT / "mis-oci-hook"], input=state, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "state" in done.stderr
    assert "Traceback" not in done.stderr
