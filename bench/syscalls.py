"""What a guarded agent's acts cost: guarded / bare, paired and interleaved, with intervals.

    python bench/syscalls.py [ROUNDS]

Two equal workers, one under mis-run and one bare, are asked in turn for the same batch of acts;
each times itself, so the pipe between us costs nothing.  ``warm open`` opens what the kernel has
been told to remember, ``first open`` files that nobody opened before (one verdict each), ``denied``
forbidden ones.  Prints the supervisor's memory and its verdicts and violations per second.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Series, ratio

ROOT = Path(__file__).resolve().parents[1]
PROFILE = """
extends = "default"
[files]
deny = ["...", "**/.env"]
[defcon]
act = false
"""
WORKER = r"""
import os, socket, subprocess, sys, time
listener = socket.create_server(("127.0.0.1", 0), backlog=512)
where = listener.getsockname()
firsts = iter(sorted(os.listdir("firsts")))
big = os.open("big", os.O_RDONLY)
def warm_open():
    os.close(os.open("big", os.O_RDONLY))
def first_open():
    os.close(os.open("firsts/" + next(firsts), os.O_RDONLY))
def read():
    os.pread(big, 4096, 0)
def run():
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
def connect():
    with socket.create_connection(where):
        listener.accept()[0].close()
def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
def build():
    subprocess.run(["gcc", "-O1", "-c", "unit.c", "-o", "unit.o"], check=True)
def denied():
    try:
        os.close(os.open(".env", os.O_RDONLY))
    except PermissionError:
        pass
acts = {f.__name__: f for f in (warm_open, first_open, read, run, connect, fork, build, denied)}
for line in sys.stdin:
    name, count = line.split()
    act = acts[name]
    began = time.perf_counter()
    for _ in range(int(count)):
        act()
    print((time.perf_counter() - began) / int(count), flush=True)
"""
BATCHES = {
    "warm_open": 2000,
    "first_open": 100,
    "read": 5000,
    "run": 20,
    "connect": 100,
    "fork": 50,
    "build": 1,
    "denied": 100,
}
UNIT = "#include <stdio.h>\n" + "\n".join(
    f'int f{n}(int x) {{ return x * {n} + printf("%d", x); }}' for n in range(300)
)


def worker(folder: Path, argv: list[str], rounds: int) -> subprocess.Popen[str]:
    """A worker in a folder of its own."""
    (folder / "firsts").mkdir(parents=True)
    for number in range(rounds * BATCHES["first_open"] + BATCHES["first_open"]):
        (folder / "firsts" / f"{number:06}").touch()
    (folder / "big").write_bytes(bytes(1 << 20))
    (folder / ".env").write_text("SECRET")
    (folder / "unit.c").write_text(UNIT)
    (folder / "worker.py").write_text(WORKER)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*argv, "/usr/bin/python3", "worker.py"], cwd=folder, stdin=pipe, stdout=pipe, text=True
    )


def ask(process: subprocess.Popen[str], name: str) -> float:
    """Seconds per act of one batch."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{name} {BATCHES[name]}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def memory(pid: int) -> float:
    """Resident MiB of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main(rounds: int) -> None:
    """Time ``rounds`` rounds and print."""
    with tempfile.TemporaryDirectory(prefix="mis-bench-", dir="/var/tmp") as name:
        top = Path(name)
        (top / "bench.toml").write_text(PROFILE)
        guard = [sys.executable, "-I", "-m", "mis_run", "-q", "-p", str(top / "bench.toml"), "--"]
        bare, guarded = worker(top / "bare", [], rounds), worker(top / "guarded", guard, rounds)
        times: dict[str, dict[str, list[float]]] = {}
        for turn in range(rounds + 1):
            for act in BATCHES:
                pair = [("bare", bare), ("guarded", guarded)]
                for kind, process in pair if turn % 2 else pair[::-1]:
                    seconds = ask(process, act)
                    if turn:  # the first round fills caches
                        times.setdefault(act, {}).setdefault(kind, []).append(seconds)
        resident = memory(guarded.pid)
        for process in (bare, guarded):
            assert process.stdin
            process.stdin.close()
            process.wait(60)
    results: dict[str, Any] = {"supervisor MiB": round(resident, 1)}
    for act, both in times.items():
        base, ours = Series("bare", tuple(both["bare"])), Series(act, tuple(both["guarded"]))
        found, low, high = ratio(ours, base)
        results[act] = [round(found, 3), round(low, 3), round(high, 3)]
        print(
            f"{act:<12} bare {base.median * 1e6:10.1f} µs   guarded {ours.median * 1e6:10.1f} µs   "
            f"ratio {found:6.3f} ({low:.3f} to {high:.3f})"
        )
    first, denied = (sum(times[act]["guarded"]) / rounds for act in ("first_open", "denied"))
    print(
        f"verdicts/s {1 / first:,.0f}   violations/s {1 / denied:,.0f}   "
        f"supervisor {resident:.1f} MiB resident"
    )
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
