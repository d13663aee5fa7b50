"""A Docker engine of the tests' own: own data, own socket, own bridge, and nothing left behind.

It runs in a mount namespace of its own, so what it mounts goes with it; it is told to leave
iptables and the host's switches alone.  Images are made from a folder: busybox and one static
program, `ACT`, that tries one act and exits with the errno it met.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, ip, wait_for

from mis_run.report import RECORDS

BRIDGE, GATEWAY = "tstdock0", "198.18.79.1"
RUNTIME = str(ROOT / "mis-oci-runtime")
IMAGE = "mis-test:1"

ACT = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* act connect ADDRESS PORT | send ADDRESS PORT | syscall NUMBER [ARG]... : exits with the errno. */
int main(int argc, char **argv)
{
        struct sockaddr_in to = { .sin_family = AF_INET };
        long values[6] = { 0 };
        int fd, met = 0;

        if (argc == 4 && (!strcmp(argv[1], "connect") || !strcmp(argv[1], "send"))) {
                fd = socket(AF_INET, argv[1][0] == 'c' ? SOCK_STREAM : SOCK_DGRAM, 0);
                to.sin_port = htons(atoi(argv[3]));
                inet_pton(AF_INET, argv[2], &to.sin_addr);
                if (argv[1][0] == 'c')
                        met = connect(fd, (void *)&to, sizeof(to)) ? errno : 0;
                else
                        met = sendto(fd, "x", 1, 0, (void *)&to, sizeof(to)) < 0 ? errno : 0;
        } else if (argc >= 3 && !strcmp(argv[1], "syscall")) {
                for (int n = 3; n < argc; n++)
                        values[n - 3] = strtol(argv[n], NULL, 0);
                met = syscall(strtol(argv[2], NULL, 0), values[0], values[1], values[2], values[3],
                              values[4], values[5]) < 0 ? errno : 0;
        } else if (argc == 2 && !strcmp(argv[1], "nnp")) {
                met = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
        }
        printf("%d\n", met);
        return met;
}
"""


@dataclass(frozen=True)
class Engine:
    """A running dockerd."""

    folder: Path
    process: subprocess.Popen[bytes]
    space: int  # a process in its mount namespace

    @property
    def host(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def docker(
        self, *words: str, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """``docker WORDS`` against this engine."""
        done = subprocess.run(
            ["/usr/bin/docker", "-H", self.host, *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder)},
        )
        if check and done.returncode:
            raise AssertionError(f"docker {' '.join(words)}: {done.returncode}\n{done.stderr}")
        return done

    def run(
        self, *words: str, options: tuple[str, ...] = (), runtime: str = "mis"
    ) -> subprocess.CompletedProcess[str]:
        """``docker run --rm`` of the test image; the exit code is the container's."""
        argv = ("run", "--rm", "--runtime", runtime, *options, IMAGE, *words)
        return self.docker(*argv, check=False)


def events(container: str = "") -> list[dict[str, Any]]:
    """The record of the latest container whose id begins so; other agents' records are not ours."""
    records = sorted(RECORDS.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in records:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        # Not always the first event: on a slow machine the watchdog may have been late before.
        starts = [event["subject"] for event in found if event["kind"] == "run.start"]
        if starts and starts[0].get("container", "").startswith(container):
            return found
    raise AssertionError(f"no record of a container {container}")


def runs() -> list[dict[str, Any]]:
    """What the state of every guarded container says."""
    found = [_facts(path) for path in Path("/run/mis").glob("*/state.json")]
    return [facts for facts in found if "container" in facts and facts.get("phase") == "running"]


def traces() -> list[str]:
    """All that guarded containers, and the engine's, are on this machine: sorted words.

    Not `leftovers.snapshot`: launches of mis-run beside us are not ours to judge.
    """
    found = [
        f"state {path.parent.name}"
        for path in Path("/run/mis").glob("*/state.json")
        if "container" in _facts(path)
    ]
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            ours = "mis_run.oci.main" in words or "mis-init 3 -- true" in words
            if ours or (
                words.partition(" ")[0].endswith("/mis-watchdog")
                and "/mis/" not in words.partition(" -- ")[0]
            ):
                found.append(f"process {words[:200]}")
    for top in Path("/sys/fs/cgroup").glob("*"):
        found += [f"cgroup {path}" for path in top.glob("docker/*") if path.is_dir()]
    found += [f"interface {path.name}" for path in Path("/sys/class/net").glob("veth*")]
    return sorted(found)


def _facts(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):  # it ended meanwhile
        return {}


def left(before: list[str]) -> list[str]:
    """What `traces` finds that was not there ``before``. (What was, of an earlier test, may go.)"""
    return sorted({*traces()} - {*before})


def why_not() -> str | None:
    """Why no engine can run here; None when one can."""
    for program in ("dockerd", "containerd", "runc", "busybox", "clang", "/usr/bin/docker"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None


def make_root(folder: Path) -> Path:
    """A root file system: busybox, its names, ``act``, a file and a user."""
    root = folder / "image"
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "work", "root"):
        (root / name).mkdir(parents=True)
    busybox = shutil.copy(shutil.which("busybox") or "", root / "bin")
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for name in names.stdout.split():
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    (root / "etc/secret").write_text("secret of the image\n")
    (root / "bin/forbidden").write_text("#!/bin/sh\necho ran\n")
    (root / "bin/forbidden").chmod(0o755)
    source = folder / "act.c"
    source.write_text(ACT)
    argv = ["clang", "-static", "-O1", str(source), "-o", str(root / "bin/act")]
    subprocess.run(argv, check=True)
    return root


def make_image(folder: Path) -> Path:
    """The same as a tar."""
    argv = ["tar", "-C", str(make_root(folder)), "-cf", str(folder / "image.tar"), "."]
    subprocess.run(argv, check=True)
    return folder / "image.tar"


@contextmanager
def bridge() -> Iterator[None]:
    """The engine's bridge, removed on the way out."""
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        yield
    finally:
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


@contextmanager
def namespace() -> Iterator[int]:
    """A mount namespace for the engine and all it mounts; yields a process that is in it."""
    holder = subprocess.Popen(["unshare", "-m", "sleep", "infinity"])
    try:
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def start(folder: Path, space: int, runtimes: Mapping[str, Any], *options: str) -> Engine:
    """dockerd with these runtimes, ready to be asked."""
    (folder / "daemon.json").write_text(json.dumps({"runtimes": runtimes}))
    argv = ["nsenter", f"--mount=/proc/{space}/ns/mnt", "--wd=/"]
    argv += ["dockerd", "--config-file", f"{folder}/daemon.json"]
    argv += ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
    argv += ["--pidfile", f"{folder}/docker.pid", "-H", f"unix://{folder}/docker.sock"]
    argv += ["--bridge", BRIDGE, "--storage-driver=vfs", "--iptables=false", "--ip6tables=false"]
    argv += ["--ip-forward=false", "--ip-masq=false", *options]
    with (folder / "docker.log").open("a") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    engine = Engine(folder, process, space)
    wait_for(lambda: engine.docker("version", check=False).returncode == 0, 30)
    return engine


def stop(engine: Engine) -> None:
    """End dockerd and wait for it; SIGKILL when it takes too long."""
    engine.process.terminate()
    try:
        engine.process.wait(30)
    except subprocess.TimeoutExpired:
        engine.process.kill()
        engine.process.wait()


@contextmanager
def running(folder: Path, runtimes: Mapping[str, Any], *options: str) -> Iterator[Engine]:
    """An engine with the test image; stopped, and every container removed, on the way out."""
    with ExitStack() as stack:
        stack.callback(remove_cgroups)
        stack.enter_context(bridge())
        space = stack.enter_context(namespace())
        folder.mkdir(exist_ok=True)
        engine = start(folder, space, runtimes, *options)
        stack.callback(stop, engine)
        engine.docker("import", str(make_image(folder)), IMAGE)
        yield engine
        remove_all(engine)


def remove_cgroups() -> None:
    """Remove the empty parents that dockerd and ctr leave in every hierarchy."""
    for top in Path("/sys/fs/cgroup").glob("*"):
        for name in ("docker", "default"):
            with suppress(OSError):  # not there, or another engine's
                (top / name).rmdir()


def remove_all(engine: Engine) -> None:
    """Remove every container, if the engine still runs: a test may have ended it."""
    if engine.process.poll() is not None:
        return
    if names := engine.docker("ps", "-aq").stdout.split():
        engine.docker("rm", "-f", *names)


if __name__ == "__main__":  # by hand: python tests/system/engine.py FOLDER COMMAND...
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    given = {"mis": {"path": os.environ.get("TRY_RUNTIME", RUNTIME)}}
    with running(place, given) as made:
        subprocess.run(sys.argv[2:], env={**os.environ, "DOCKER_HOST": made.host}, check=False)
