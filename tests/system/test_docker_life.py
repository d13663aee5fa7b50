"""What people do with Docker beside `docker run`: compose, health checks, logs, -i, and privileges.

Each works under mis-oci-runtime as under runc; guards are not lost on the way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import engine as engines
import pytest
from engine import GATEWAY, Engine, events, runs, traces
from harness import wait_for
from test_docker import ECONNREFUSED, EPERM, start, state_of, write_profiles

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(engines.why_not() is not None, reason=str(engines.why_not())),
]
TO_GATEWAY = f"act connect {GATEWAY} 9"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    config = write_profiles(folder / "etc")
    wide = folder / "etc/wide.toml"
    wide.write_text('allow = ["privileged", "devices", "host-paths"]\n')
    path = engines.RUNTIME
    runtimes = {
        "mis": {"path": path, "runtimeArgs": ["--mis-config", str(config)]},
        "mis-open": {
            "path": path,
            "runtimeArgs": ["--mis-config", str(config), "--mis-profile", "open"],
        },
        "mis-wide": {"path": path, "runtimeArgs": ["--mis-config", str(wide)]},
    }
    before = traces()
    with engines.running(folder, runtimes) as running:
        yield running
    assert traces() == before


@pytest.fixture
def box(engine: Engine) -> Iterator[Engine]:
    before = traces()
    yield engine
    engines.remove_all(engine)
    wait_for(lambda: traces() == before, 5)


@pytest.mark.parametrize("runtime", ["mis", "runc"])
def test_standard_input(engine: Engine, runtime: str) -> None:
    """-i: what is piped in arrives, and its end too."""
    argv = ["/usr/bin/docker", "-H", engine.host, "run", "--rm", "-i", "--runtime", runtime]
    done = subprocess.run(
        [*argv, engines.IMAGE, "sh", "-c", "cat; echo end"],
        input="a\nb\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "a\nb\nend\n"), done.stderr


@pytest.mark.parametrize("runtime", ["mis", "runc"])
def test_a_terminal_with_input(engine: Engine, runtime: str) -> None:
    """-it: a shell on a terminal takes its words from ours, and gets the size of its window."""
    docker = f"/usr/bin/docker -H {engine.host} run --rm -it --runtime {runtime} {engines.IMAGE} sh"
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", docker, "/dev/null"],
        input="tty; exit 7\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 7, done.stdout + done.stderr
    assert "/dev/pts/0" in done.stdout


@pytest.mark.parametrize("driver", ["json-file", "local"])
def test_log_drivers(box: Engine, driver: str) -> None:
    """docker logs has both streams, whoever keeps them."""
    argv = ("run", "--runtime", "mis", "--name", "box", "--log-driver", driver)
    box.docker(*argv, engines.IMAGE, "sh", "-c", "echo out; echo err >&2")
    done = box.docker("logs", "box")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_health_checks(box: Engine) -> None:
    """A health check is an exec: it runs, is guarded, and its verdict is the engine's."""
    every = ("--health-interval", "500ms", "--health-retries", "1")
    start(box, "--health-cmd", "true", *every, name="well")
    start(box, "--health-cmd", f"! {TO_GATEWAY}", *every, name="ill")

    def health(name: str) -> str:
        return str(state_of(box, name)["Health"]["Status"])

    wait_for(lambda: health("well") == "healthy", 20)
    wait_for(lambda: "net.connect" in {event["kind"] for event in events(_id(box, "ill"))}, 20)
    wait_for(lambda: health("ill") == "healthy", 20)  # refused, as its check expects


def _id(box: Engine, name: str) -> str:
    return box.docker("inspect", "-f", "{{.Id}}", name).stdout.strip()


def test_an_init_reaps_and_passes_signals_on(box: Engine) -> None:
    """--init: Docker's own init is pid 1, a guarded child ends by its signal."""
    start(box, "--init")
    assert "init" in box.docker("exec", "box", "cat", "/proc/1/comm").stdout
    box.docker("stop", "-t", "20", "box")
    assert state_of(box)["ExitCode"] == 143


# As --privileged, but for the one right that this project's own machine does not have to give.
PRIVILEGED = (
    *("--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE", "--security-opt", "seccomp=unconfined"),
    *("--device-cgroup-rule", "a *:* rwm"),
)


def test_privileged_where_the_operator_allows_it(box: Engine) -> None:
    """Every right and device, and still no connection and no mount, by docker exec neither."""
    refused = box.run("true", options=PRIVILEGED)
    assert "the container is privileged" in refused.stderr
    script = f"{TO_GATEWAY}; mkdir -p /tmp/m; mount -t tmpfs x /tmp/m 2>/dev/null; echo $?"
    met = box.run("sh", "-c", script, options=PRIVILEGED, runtime="mis-wide").stdout.split()
    assert met[0] == str(EPERM) and met[1] != "0"
    bare = box.run("sh", "-c", script, options=PRIVILEGED, runtime="runc").stdout.split()
    assert bare == [str(ECONNREFUSED), "0"]
    start(box, *PRIVILEGED, runtime="mis-wide")
    met = box.docker("exec", "box", "sh", "-c", script, check=False).stdout.split()
    assert met[0] == str(EPERM) and met[1] != "0"


COMPOSE = """
version: "2.4"
services:
  server:
    image: {image}
    runtime: mis-open
    networks: {{ agents: {{ ipv4_address: 198.18.80.10 }} }}
    command: ["sh", "-c", "while :; do echo hello | nc -l -p 8087; done"]
    healthcheck: {{ test: ["CMD", "true"], interval: 1s }}
  agent:
    image: {image}
    runtime: {runtime}
    networks: [agents]
    command: ["sh", "-c", "act connect 198.18.80.10 8087; sleep 1000"]
    depends_on: [server]
networks:
  agents:
    driver: bridge
    driver_opts: {{ com.docker.network.bridge.name: tstdock1 }}
    ipam: {{ config: [{{ subnet: 198.18.80.0/24 }}] }}
"""


@pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="docker-compose is not installed"
)
def test_compose(box: Engine, tmp_path: Path) -> None:
    """Two services: each under the profile of its runtime, up, down, and nothing left."""
    told = {}
    for runtime in ("mis", "runc"):
        text = COMPOSE.format(image=engines.IMAGE, runtime=runtime)
        (tmp_path / "docker-compose.yml").write_text(text)
        _compose(box, tmp_path, "up", "-d")
        try:
            assert len(runs()) == (2 if runtime == "mis" else 1)
            assert {run["profile"] for run in runs()} <= {"open", "default"}

            def said() -> list[str]:
                return box.docker("logs", "t_agent_1").stdout.split()

            told[runtime] = wait_for(said)
            done = _compose(box, tmp_path, "exec", "-T", "server", "sh", "-c", TO_GATEWAY)
            assert done.stdout.split() == [str(ECONNREFUSED)]
            _compose(box, tmp_path, "restart", "-t", "0", "agent")
            assert len(runs()) == (2 if runtime == "mis" else 1)
        finally:
            _compose(box, tmp_path, "down", "-t", "0")
        assert runs() == []
    # The agent's profile allows nothing; without it the other service answers.
    assert told == {"mis": [str(EPERM)], "runc": ["0"]}


def _compose(box: Engine, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "DOCKER_HOST": box.host}
    done = subprocess.run(
        ["docker-compose", "--project-name", "t", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if "exec" not in words:
        assert done.returncode == 0, done.stderr
    return done


def test_a_container_is_inspected_as_made(box: Engine) -> None:
    """docker inspect, top and stats know nothing of us: the bundle is the engine's."""
    start(box)
    (found,) = json.loads(box.docker("inspect", "box").stdout)
    assert found["HostConfig"]["Runtime"] == "mis"
    assert "sleep" in box.docker("top", "box").stdout
    assert "box" in box.docker("stats", "--no-stream", "box").stdout
    box.docker("update", "--pids-limit", "100", "box")
    assert met_after_update(box) == EPERM


def met_after_update(box: Engine) -> int:
    """What a connection meets once limits were changed from outside."""
    done = box.docker("exec", "box", "sh", "-c", TO_GATEWAY, check=False)
    return int(done.stdout)
