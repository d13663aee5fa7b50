"""What the kernel plane's hooks cost, in the test VM:

    .venv/bin/python -I tests/vm/vm.py run 6.12 -- .venv/bin/python -I bench/lsm.py

Time per call of a small C program: without the plane, outside of any agent with none and with 100
registered, and inside an agent. The machine is emulated, so only the ratios say something; the
situations take turns, and of each the best round counts.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mis_run.guards import lsm, lsm_plane, lsm_policy
from mis_run.guards.lsm_abi import Right

TOP = Path("/sys/fs/cgroup")
ROUNDS, AGENTS = 3, 100
SOURCE = r"""
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *file;
static void nothing(void) { getppid(); }
static void reading(void) { close(open(file, O_RDONLY)); }
static void facts(void) { struct stat s; stat(file, &s); }
static void truncating(void) { truncate(file, 1); }
static void mapping(void) { munmap(mmap(0, 4096, 5, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096); }
static void socketing(void) { close(socket(AF_UNIX, SOCK_STREAM, 0)); }
static void forking(void)
{
    pid_t pid = vfork();
    if (!pid) _exit(0);
    waitpid(pid, 0, 0);
}
static void executing(void)
{
    char *argv[] = { "self", 0 };
    pid_t pid;
    posix_spawn(&pid, "/proc/self/exe", 0, 0, argv, 0);
    waitpid(pid, 0, 0);
}
static struct { const char *name; void (*act)(void); int times; } acts[] = {
    { "getppid", nothing, 200000 }, { "stat", facts, 30000 }, { "open", reading, 30000 },
    { "truncate", truncating, 10000 }, { "mmap", mapping, 20000 },
    { "socket", socketing, 10000 }, { "fork", forking, 1000 }, { "exec", executing, 200 },
};
int main(int argc, char **argv)
{
    if (argc < 2) return 0;
    file = argv[1];
    for (unsigned i = 0; i < sizeof(acts) / sizeof(*acts); i++) {
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        for (int n = 0; n < acts[i].times; n++) acts[i].act();
        clock_gettime(CLOCK_MONOTONIC, &b);
        printf("%s %.1f\n", acts[i].name,
               ((b.tv_sec - a.tv_sec) * 1e9 + b.tv_nsec - a.tv_nsec) / acts[i].times);
    }
}
"""


def measure(program: Path, file: Path, cgroup: Path) -> dict[str, float]:
    """Nanoseconds per call, by a process in ``cgroup``."""
    command = f"echo 0 >{cgroup}/cgroup.procs && exec {program} {file}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    return {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}


def policy(file: Path) -> lsm.LsmPolicy:
    """Rules as a profile gives: the file's folder is two levels above it."""
    root = os.open("/", os.O_PATH)
    lines = [lsm_policy.Line(str(path), Right.ALL, Right(0), "all") for path in (file.parents[1],)]
    lines += [
        lsm_policy.Line(path, Right.READ | Right.EXEC, Right(0), path)
        for path in ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/dev")
    ]
    rules = lsm_policy.compile(
        lines, root, lsm_policy.devices(os.getpid()), lsm_policy.points(os.getpid())
    )
    os.close(root)
    return lsm.LsmPolicy(rules=rules, deadline=600.0)


@contextmanager
def group(name: str) -> Iterator[Path]:
    """A cgroup."""
    folder = TOP / f"misbench-{name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        folder.rmdir()


@contextmanager
def agents(count: int, file: Path) -> Iterator[Path]:
    """``count`` agents; the cgroup of the last."""
    with ExitStack() as stack:
        last = TOP
        for number in range(count):
            last = stack.enter_context(group(str(number)))
            stack.enter_context(lsm.attach(last, policy(file)))
        yield last


def main() -> int:
    """Print a table of ratios."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
    best: dict[str, dict[str, float]] = {}

    def take(name: str, program: Path, file: Path, cgroup: Path) -> None:
        for act, ns in measure(program, file, cgroup).items():
            mine = best.setdefault(name, {})
            mine[act] = min(ns, mine.get(act, ns))

    with tempfile.TemporaryDirectory() as folder, group("outside") as outside:
        file = Path(folder, "a", "b", "file")
        file.parent.mkdir(parents=True)
        file.write_text("x")
        program = Path(folder, "a", "acts")
        source = Path(folder, "acts.c")
        source.write_text(SOURCE)
        subprocess.run(["clang", "-O2", "-static", "-w", source, "-o", program], check=True)
        for _ in range(ROUNDS):
            lsm_plane.unload()
            take("no plane", program, file, outside)
            lsm_plane.ensure().close()
            take("0 agents", program, file, outside)
            with agents(AGENTS, file) as inside:
                take("100 agents, outside", program, file, outside)
                take("inside", program, file, inside)
    show(best, print)
    return 0


def show(best: dict[str, dict[str, float]], say: Callable[[str], None]) -> None:
    """Nanoseconds without the plane, and what the other situations add."""
    others = [name for name in best if name != "no plane"]
    say(f"{'act':10} {'no plane':>12} " + " ".join(f"{name:>20}" for name in others))
    for act, base in best["no plane"].items():
        more = [
            f"{best[name][act] - base:+9.0f} ns {best[name][act] / base - 1:+7.1%}"
            for name in others
        ]
        say(f"{act:10} {base:9.0f} ns " + " ".join(more))


if __name__ == "__main__":
    sys.exit(main())
