"""bench/docker: what `docker run` takes under mis-oci-runtime and under plain runc.

    .venv/bin/python bench/docker.py [--rounds 20] [--at-once N]

An engine of its own (tests/system/engine.py), one small image, interleaved rounds, ratios per
round; then the runtime alone, without an engine; then N containers started together, each looked
at while all of them run (tests/system/crowd.py). ``--rounds 0`` leaves the first two out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import interleave, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/system"))
import crowd
import engine as engines


def bundle(folder: Path, root: Path) -> str:
    """A bundle of `true` on the test image's root."""
    folder.mkdir()
    subprocess.run(["runc", "spec"], cwd=folder, check=True)
    config = json.loads((folder / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": ["true"]}
    config["root"] = {"path": str(root), "readonly": True}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def compare(place: Path, docker: Callable[[str], None], rounds: int) -> None:
    """One container after the other: by the engine, then by the runtime alone."""
    series = interleave(
        {"docker run, runc": lambda: docker("runc"), "docker run, mis": lambda: docker("mis")},
        rounds,
    )
    print_table(series, series[0])
    folder = bundle(place / "bundle", place / "engine/image")
    numbers = iter(range(1 << 30))

    def alone(program: str) -> None:
        argv = [program, "--root", str(place / "state"), "run", "--bundle", folder]
        subprocess.run([*argv, f"bench-{next(numbers)}"], check=True)

    series = interleave(
        {"run, runc": lambda: alone("runc"), "run, mis": lambda: alone(engines.RUNTIME)}, rounds
    )
    print_table(series, series[0])


def together(engine: engines.Engine, docker: Callable[[str], None], count: int) -> None:
    """Many containers at once: the time, and that each is guarded for itself."""
    for runtime in ("runc", "mis"):
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(docker, [runtime] * count))
        print(f"{count} at once, {runtime}: {time.perf_counter() - began:.1f} s")
    found = crowd.gather(engine, count)
    print(
        f"{count} running at once: all guarded after {found.started:.1f} s, "
        f"each supervisor resident with at most {found.resident:.0f} MB"
    )


def main() -> int:
    if why := engines.why_not():
        print(f"left out: {why}")
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=0, metavar="N")
    options = parser.parse_args()
    rounds, at_once = options.rounds, options.at_once
    before = engines.traces()
    with tempfile.TemporaryDirectory(prefix="mis-bench-") as name:
        place = Path(name)
        with engines.running(place / "engine", {"mis": {"path": engines.RUNTIME}}) as engine:

            def docker(runtime: str) -> None:
                argv = ("run", "--rm", "--runtime", runtime, engines.IMAGE, "true")
                done = engine.docker(*argv, check=False, timeout=crowd.TIMEOUT)
                assert done.returncode == 0, done.stderr

            if rounds:
                compare(place, docker, rounds)
            if at_once:
                together(engine, docker, at_once)
    left = [one for one in engines.traces() if one not in before]
    print(f"left behind: {left or 'nothing'}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
