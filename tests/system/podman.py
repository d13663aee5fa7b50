"""podman of the tests' own: own storage, own configuration, own network, and nothing left behind.

podman has no daemon, so what belongs to the machine is hidden instead: every command runs in one
mount namespace, where the folders that it uses are a tmpfs, and in one network namespace, where its
bridge and its iptables rules are nobody else's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import engine as engines
from harness import wait_for

GATEWAY = "10.88.0.1"
"""podman's default bridge, here in a namespace of our own."""
PARENT = "libpod_parent"  # cgroup of podman's containers where systemd does not manage them
HIDDEN = "/etc/containers /var/lib/containers /run/containers /run/libpod /run/netns /dev/shm"
# podman asks for 1048576 open files and for as many processes, and where root may not raise its own
# limits runc then fails: "error setting rlimits … operation not permitted".
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
init_path = "{init}"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
hooks_dir = ["/etc/containers/oci/hooks.d"]
{engine}
[engine.runtimes]
{runtimes}
"""
STORAGE = '[storage]\ndriver = "vfs"\nrunroot = "/run/containers"\ngraphroot = "{graph}"\n'
POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'


@dataclass(frozen=True)
class Podman:
    """A mount and a network namespace in which podman is at home."""

    holder: int

    def inside(
        self, *argv: str, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """A command in those namespaces. Output to files: conmon would keep a pipe open."""
        spaces = [f"--mount=/proc/{self.holder}/ns/mnt", f"--net=/proc/{self.holder}/ns/net"]
        done = subprocess.run(
            ["nsenter", *spaces, "--wd=/", *argv],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "HOME": "/root"},
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)}: {done.returncode}\n{done.stderr}")
        return done

    def __call__(
        self, *words: str, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """``podman WORDS``."""
        return self.inside("podman", *words, check=check, timeout=timeout)

    def run(
        self, *words: str, options: tuple[str, ...] = (), runtime: str = "mis"
    ) -> subprocess.CompletedProcess[str]:
        """``podman run --rm`` of the test image; the exit code is the container's."""
        argv = ("--runtime", runtime, "run", "--rm", *options, engines.IMAGE, *words)
        return self(*argv, check=False)

    def write(self, path: str, text: str) -> None:
        """A file that only this podman sees."""
        script = f'mkdir -p $(dirname {path}) && printf %s "$1" > {path}'
        self.inside("sh", "-c", script, "sh", text)

    def remove_all(self) -> None:
        """Remove every container."""
        self("rm", "--force", "--all", "--time", "0")


def why_not() -> str | None:
    """Why podman cannot be tried here; None when it can."""
    for program in ("podman", "conmon", "iptables"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return engines.why_not()


def traces() -> list[str]:
    """What `engine.traces` knows of, and podman's cgroups and processes."""
    found = engines.traces()
    for top in Path("/sys/fs/cgroup").glob("*"):
        found += [f"cgroup {path}" for path in top.glob(f"{PARENT}/libpod-*") if path.is_dir()]
    return sorted(found)


@contextmanager
def running(folder: Path, runtimes: dict[str, str], engine: str = "") -> Iterator[Podman]:
    """podman with the test image and these runtimes (name → program)."""
    with ExitStack() as stack:
        stack.callback(remove_cgroups)
        holder = subprocess.Popen(["unshare", "-m", "-n", "sleep", "infinity"])
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        podman = Podman(holder.pid)
        mine = Path("/proc/self/ns/net").readlink()
        wait_for(lambda: Path(f"/proc/{holder.pid}/ns/net").readlink() != mine)
        for path in HIDDEN.split():
            podman.inside("sh", "-c", f"mkdir -p {path} && mount -t tmpfs tmpfs {path}")
        podman.inside("ip", "link", "set", "lo", "up")
        listed = "\n".join(f'{name} = ["{path}"]' for name, path in runtimes.items())
        # What Debian's podman only recommends; tini, which dockerd brings, does as well.
        inits = (shutil.which(name) for name in ("catatonit", "docker-init", "tini"))
        text = CONFIGURATION.format(
            runtimes=f'runc = ["/usr/sbin/runc"]\n{listed}',
            engine=engine,
            init=next(filter(None, inits), ""),
        )
        podman.write("/etc/containers/containers.conf", text)
        podman.write("/etc/containers/storage.conf", STORAGE.format(graph=folder / "graph"))
        podman.write("/etc/containers/policy.json", POLICY)
        folder.mkdir(exist_ok=True)
        podman("import", str(engines.make_image(folder)), engines.IMAGE)
        stack.callback(podman.remove_all)
        yield podman


def remove_cgroups() -> None:
    """Remove the empty parents that podman leaves in every hierarchy."""
    for top in Path("/sys/fs/cgroup").glob("*"):
        for name in (f"{PARENT}/conmon", PARENT):
            with suppress(OSError):  # not there, or another podman's
                (top / name).rmdir()
