"""What the kernel plane's hooks cost, in the test VM:

    .venv/bin/python -I tests/vm/vm.py run 6.12 --count -- .venv/bin/python -I bench/lsm.py --count

Time per call of a small C program: without the plane, outside of any agent with none and with 100
registered, and inside an agent. The situations take turns. The machine is emulated, so times say
little; with ``--count`` a nanosecond of its clock is an instruction, and the table is of those.
Natively instructions are not equal: an access to memory that nobody used for long costs a hundred.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mis_run.guards import lsm, lsm_plane, lsm_policy
from mis_run.guards.lsm_abi import Right

TOP = Path("/sys/fs/cgroup")
ROUNDS, AGENTS = 3, 100
SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FILES 64
static const char *file;
static char many[FILES][300], moved[2][300];
static int listening, listening_tcp;
static struct sockaddr_un address = { .sun_family = AF_UNIX };
static struct sockaddr_in here = { .sin_family = AF_INET };
static void nothing(void) { getppid(); }
static void reading(void) { close(open(file, O_RDONLY)); }
static void reading_many(void) { static int n; close(open(many[n++ % FILES], O_RDONLY)); }
static void moving(void) { static int n; rename(moved[n & 1], moved[!(n & 1)]); n++; }
static void moving_reading(void) { moving(); reading(); }
static void facts(void) { struct stat s; stat(file, &s); }
static void truncating(void) { truncate(file, 1); }
static void mapping(void) { munmap(mmap(0, 4096, 5, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096); }
static void mapping_file(void)
{
    int fd = open(file, O_RDONLY);
    munmap(mmap(0, 4096, 5, MAP_PRIVATE, fd, 0), 4096);
    close(fd);
}
static void socketing(void) { close(socket(AF_UNIX, SOCK_STREAM, 0)); }
static void connecting(void)
{
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(fd, (void *)&address, sizeof(address))) exit(9);
    close(accept(listening, 0, 0));
    close(fd);
}
static void connecting_tcp(void)
{
    struct linger at_once = { .l_onoff = 1 }; /* no port waits for late packets */
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
    if (connect(fd, (void *)&here, sizeof(here))) exit(7);
    close(accept(listening_tcp, 0, 0));
    close(fd);
}
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
    { "open-64", reading_many, 30000 }, { "move", moving, 10000 },
    { "move+open", moving_reading, 10000 }, { "truncate", truncating, 10000 },
    { "mmap", mapping, 20000 }, { "map-file", mapping_file, 10000 },
    { "socket", socketing, 10000 }, { "connect", connecting, 10000 },
    { "connect-tcp", connecting_tcp, 10000 }, { "fork", forking, 1000 },
    { "exec", executing, 1000 },
};
static double run(void (*act)(void), int times)
{
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int n = 0; n < times; n++) act();
    clock_gettime(CLOCK_MONOTONIC, &b);
    return ((b.tv_sec - a.tv_sec) * 1e9 + b.tv_nsec - a.tv_nsec) / times;
}
#define BATCHES 10
static double least(void (*act)(void), int times) /* a tick of the clock only adds */
{
    double best = 1e18;
    for (int n = 0; n < BATCHES; n++) {
        double one = run(act, times / BATCHES);
        if (one < best) best = one;
    }
    return best;
}
static int wanted(const char *name, char **names)
{
    if (!*names) return 1;
    for (; *names; names++) if (!strcmp(name, *names)) return 1;
    return 0;
}
int main(int argc, char **argv)
{
    if (argc < 3) return 0;
    file = argv[1];
    for (int n = 0; n < FILES; n++) {
        sprintf(many[n], "%s-%d", file, n);
        close(open(many[n], O_CREAT | O_WRONLY, 0600));
    }
    sprintf(moved[0], "%s-a", file);
    sprintf(moved[1], "%s-b", file);
    close(open(moved[0], O_CREAT | O_WRONLY, 0600));
    sprintf(address.sun_path, "%s-s", file);
    unlink(address.sun_path);
    listening = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(listening, (void *)&address, sizeof(address)) || listen(listening, 5)) return 8;
    socklen_t size = sizeof(here);
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listening_tcp = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listening_tcp, (void *)&here, size) || listen(listening_tcp, 5)) return 8;
    getsockname(listening_tcp, (void *)&here, &size);
    for (unsigned i = 0; i < sizeof(acts) / sizeof(*acts); i++) {
        int times = acts[i].times / atoi(argv[2]);
        if (!wanted(acts[i].name, argv + 3)) continue;
        run(acts[i].act, times < 64 ? 4 : 64); /* warm */
        printf("%s %.1f\n", acts[i].name, least(acts[i].act, times));
    }
}
"""


def measure(program: Path, file: Path, cgroup: Path, less: int, only: str) -> dict[str, float]:
    """Nanoseconds per call, by a process in ``cgroup``."""
    command = f"echo 0 >{cgroup}/cgroup.procs && exec {program} {file} {less} {only}"
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
    return lsm.LsmPolicy(rules=rules, deadline=6000.0)


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
def agents(count: int, file: Path, lives: dict[str, list[int]]) -> Iterator[Path]:
    """``count`` agents; the cgroup of the last.  ``lives`` gets the CPU time of ours that each took
    to come and to go, in nanoseconds."""
    with ExitStack() as stack:
        last = TOP
        for number in range(count):
            last, rules = stack.enter_context(group(str(number))), policy(file)
            clock = Clock(lives)
            stack.callback(clock.stop, "goes")
            stack.enter_context(lsm.attach(last, rules))
            clock.stop("comes")
            stack.callback(clock.start)
        yield last


class Clock:
    """Our own CPU time: waiting for a grace period is no work."""

    def __init__(self, lives: dict[str, list[int]]) -> None:
        self.lives = lives
        self.start()

    def start(self) -> None:
        self.began = time.process_time_ns()

    def stop(self, what: str) -> None:
        self.lives.setdefault(what, []).append(time.process_time_ns() - self.began)


def until_detached() -> None:
    """The kernel takes programs off their hooks later, each after it waited for all tasks."""
    links = ["bpftool", "link", "list"]
    while "lsm_mac" in subprocess.run(links, capture_output=True, text=True, check=True).stdout:
        time.sleep(0.2)


@contextmanager
def tmpfs(folder: str) -> Iterator[None]:
    """A tmpfs on ``folder``: /tmp is an overlay on 9P in the test VM, where all costs more."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


Taken = dict[str, list[dict[str, float]]]


def main() -> int:
    """Print a table of ratios."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
    counting = "--count" in sys.argv[1:]
    rounds = next((int(word) for word in sys.argv[1:] if word.isdecimal()), ROUNDS)
    only = " ".join(word for word in sys.argv[1:] if not word.isdecimal() and word != "--count")
    less = 20 if counting else 1
    taken: Taken = {}
    lives: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder, tmpfs(folder), group("outside") as outside:
        file = Path(folder, "a", "b", "file")
        file.parent.mkdir(parents=True)
        file.write_text("x")
        program = Path(folder, "a", "acts")
        source = Path(folder, "acts.c")
        source.write_text(SOURCE)
        subprocess.run(["clang", "-O2", "-static", "-w", source, "-o", program], check=True)

        def take(name: str, cgroup: Path) -> None:
            taken.setdefault(name, []).append(measure(program, file, cgroup, less, only))

        measure(program, file, outside, less, only)  # what is read from disk is read
        for _ in range(rounds):
            lsm_plane.unload()
            until_detached()
            take("no plane", outside)
            lsm_plane.ensure().close()
            take("0 agents", outside)
            with agents(AGENTS, file, lives) as inside:
                take(f"{AGENTS} agents, outside", outside)
                take("inside", inside)
    unit = "instructions" if counting else "ns"
    show(taken, unit, print)
    for what, found in lives.items():
        print(f"an agent {what}: {statistics.median(found):,.0f} {unit}, at most {max(found):,.0f}")
    return 0


def show(taken: Taken, unit: str, say: Callable[[str], None]) -> None:
    """What a call costs without the plane, and what the other situations add: of the best rounds,
    since whatever else happens in a round only adds; and how far its rounds lie apart."""
    say(f"{'act':11} {'no plane, ' + unit:>24} " + " ".join(f"{name:>25}" for name in taken))
    for act in taken["no plane"][0]:
        cells = []
        for rounds in taken.values():
            found = [one[act] for one in rounds]
            base = min(one[act] for one in taken["no plane"])
            more = min(found) - base
            apart = (max(found) - min(found)) / base / 2
            cells.append(f"{more:+8.0f} {more / base:+7.1%} (±{apart:5.1%})")
        say(f"{act:11} {base:24.0f} " + " ".join(cells))


if __name__ == "__main__":
    sys.exit(main())
