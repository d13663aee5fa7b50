"""bench/launch: how long `true` takes under mis-run and under what people use today.

    .venv/bin/python bench/launch.py [ROUNDS]

One interleaved run; candidates that are not installed are named and left out.  "bare runc" is
`runc run` of a bundle with the same namespaces on an overlay of the host's root that is already
mounted; everything mis-run adds (overlay, network, guards, verification, watchdog) is on top.
mis-run is measured as it is by default, where nothing may leave, and with a destination, for which
the machine forwards and translates.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common import interleave, print_table

SOMEWHERE = "192.0.2.1:443"  # a documentation address, RFC 5737: never asked
ROOT = Path(__file__).resolve().parents[1]


def must(*argv: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def bare_bundle(folder: Path) -> None:
    """An OCI bundle of `true` on the host's root, nothing guarded."""
    for name in ("layer", "merged"):
        (folder / name).mkdir()
    must("mount", "-t", "tmpfs", "tmpfs", str(folder / "layer"))
    for name in ("upper", "work"):
        (folder / "layer" / name).mkdir()
    options = f"lowerdir=/,upperdir={folder}/layer/upper,workdir={folder}/layer/work"
    must("mount", "-t", "overlay", "overlay", "-o", options, str(folder / "merged"))
    kinds = ("pid", "ipc", "uts", "mount", "cgroup", "network")
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/true"],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": str(folder / "merged")},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in kinds]},
    }
    (folder / "config.json").write_text(json.dumps(config))


def candidates(folder: Path) -> dict[str, Callable[[], object]]:
    """Every launcher that works here; the others are named with their reason."""
    mis = (str(ROOT / "mis-run"), "-q", "--log", "/dev/null")  # as the README has it
    numbers = iter(range(1 << 30))
    work = folder / "work"
    work.mkdir()

    def runc() -> None:
        must("runc", "run", "--bundle", str(folder), f"bench-{next(numbers)}")

    wanted: dict[str, tuple[str, Callable[[], object]]] = {
        "runc (bare)": ("runc", runc),
        "bwrap": (
            "bwrap",
            lambda: must(
                *("bwrap", "--ro-bind", "/", "/", "--unshare-all", "--proc", "/proc"),
                *("--dev", "/dev", "true"),
            ),
        ),
        "podman run": (
            "podman",
            lambda: must(
                *("podman", "run", "--rm", "--network", "none", "--log-driver", "none"),
                # Its own defaults are more than root may have in some containers.
                *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
                *("--runtime", "runc", "--rootfs", str(folder / "merged"), "/bin/true"),
            ),
        ),
        "docker run": (
            "dockerd",
            lambda: must(
                *("/usr/bin/docker", "-H", f"unix://{folder}/docker.sock", "run", "--rm"),
                *("--network", "none", "bench:1", "/bin/true"),
            ),
        ),
        "mis-run --net none": (
            "runc",
            lambda: must(*mis, "--workdir", str(work), "--net", "none", "--", "true"),
        ),
        "mis-run": ("runc", lambda: must(*mis, "--workdir", str(work), "--", "true")),
        "mis-run --allow-net …": (
            "runc",
            lambda: must(*mis, "--workdir", str(work), "--allow-net", SOMEWHERE, "--", "true"),
        ),
    }
    found = {}
    for name, (program, act) in wanted.items():
        if shutil.which(program) is None:
            print(f"left out: {name}: {program} is not installed")
            continue
        try:
            act()
        except subprocess.CalledProcessError as error:
            words = error.stderr.decode(errors="replace").strip().splitlines()
            print(f"left out: {name}: {words[-1] if words else error}")
            continue
        found[name] = act
    return found


@contextmanager
def docker_engine(folder: Path) -> Iterator[None]:
    """A Docker engine of our own with a one-file image, where dockerd and busybox are installed."""
    if not all(map(shutil.which, ("dockerd", "busybox"))):
        yield
        return
    host = f"unix://{folder}/docker.sock"
    argv = ["dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "-H", host]
    argv += ["--pidfile", f"{folder}/docker.pid", "--bridge=none", "--storage-driver=vfs"]
    argv += ["--iptables=false", "--ip6tables=false"]
    with (folder / "docker.log").open("w") as log:
        engine = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 20
        while not (folder / "docker.sock").exists() and time.monotonic() < end:
            time.sleep(0.1)
        (folder / "image/bin").mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "", folder / "image/bin/true")
        must("tar", "-C", str(folder / "image"), "-cf", str(folder / "image.tar"), ".")
        must("/usr/bin/docker", "-H", host, "import", str(folder / "image.tar"), "bench:1")
        yield
    finally:
        engine.terminate()
        engine.wait(30)


def import_time() -> None:
    """What Python and our modules cost before anything happens."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); began = time.perf_counter(); "
        "from mis_run import startup; startup.begin(); "
        "from mis_run import command, host, launch, plan, profiles, words; "
        "print(f'{(time.perf_counter() - began) * 1000:.1f}')"
    )
    argv = [sys.executable, "-I", "-S", "-c", code]
    runs = [subprocess.run(argv, capture_output=True, text=True, check=True) for _ in range(5)]
    print(f"import of everything: {min(float(run.stdout) for run in runs):.1f} ms")


def shares(work: Path) -> None:
    """Each setup step's share, from one run's own record."""
    log = work / "record.jsonl"
    argv = (str(ROOT / "mis-run"), "-q", "--log", str(log))
    must(*argv, "--workdir", str(work), "--", "true")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    setup = next(event for event in events if event["kind"] == "run.exit")["subject"]["setup"]
    total = sum(setup.values())
    print(f"setup: {total * 1000:.1f} ms, of which")
    for name, seconds in setup.items():
        print(f"  {name:<20}{seconds * 1000:>7.1f} ms{seconds / total:>7.0%}")


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    if "--inside" not in sys.argv:
        # A mount namespace of our own: the bench's mounts end with it.
        argv = ["unshare", "-m", sys.executable, *sys.argv, "--inside"]
        if len(sys.argv) < 2:
            argv.insert(-1, str(rounds))
        return subprocess.run(argv, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="mis-bench-") as name:
        folder = Path(name)
        bare_bundle(folder)
        try:
            with docker_engine(folder):
                series = interleave(candidates(folder), rounds, settle=0.1)
            print_table(series, series[0])
            import_time()
            shares(folder / "work")
        finally:
            must("umount", str(folder / "merged"))
            must("umount", str(folder / "layer"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
