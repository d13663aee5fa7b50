"""How long DEFCON 1 takes: from the deciding violation until the cgroup is proven empty.

    python bench/kill.py [ROUNDS]

Each round is a real run: a hundred sleeping processes and a fork bomb against the process limit, of
which one reads a forbidden file until the agent is killed.  The number is the record's own
(``run.killed``); ``populated`` must be 0.  It is how long the kernel takes to end so many processes
(each has Python's memory to give back), so there is a line for each of several limits.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROFILE = """
extends = "default"
[files]
deny = ["...", "**/.env"]
[limits]
pids = {limit}
"""
LIMITS = (128, 220)
AGENT = """
import os, signal, time
for _ in range(100):
    if os.fork() == 0:
        signal.pause()
if os.fork() == 0:
    while True:
        try:
            os.fork()
        except OSError:
            pass
time.sleep(0.3)
while True:
    try:
        open(".env")
    except OSError:
        pass
"""


def once(top: Path) -> float:
    """Milliseconds of one run."""
    record = top / "record.jsonl"
    record.unlink(missing_ok=True)
    argv = [sys.executable, "-I", "-m", "mis_run", "-q", "--log", str(record), "--net", "none"]
    argv += ["-p", str(top / "kill.toml"), "--", "/usr/bin/python3", "-c", AGENT]
    done = subprocess.run(argv, cwd=top / "work", stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == 119, done.returncode
    events = map(json.loads, record.read_text().splitlines())
    killed = next(event["subject"] for event in events if event["kind"] == "run.killed")
    assert killed["populated"] == 0
    return float(killed["milliseconds"])


def main(rounds: int) -> None:
    """Print the median and the extremes of ``rounds`` runs."""
    with tempfile.TemporaryDirectory(prefix="mis-bench-", dir="/var/tmp") as name:
        top = Path(name)
        (top / "work").mkdir()
        (top / "work/.env").write_text("SECRET")
        found: dict[int, list[float]] = {limit: [] for limit in LIMITS}
        for _ in range(rounds):
            for limit, times in found.items():
                (top / "kill.toml").write_text(PROFILE.format(limit=limit))
                times.append(once(top))
    for limit, times in found.items():
        print(
            f"DEFCON 1 to populated 0, {limit} processes, {rounds} runs: median "
            f"{statistics.median(times):.1f} ms, {min(times):.1f} to {max(times):.1f} ms"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
