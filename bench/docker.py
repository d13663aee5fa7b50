"""bench/docker: what `docker run` takes under mis-oci-runtime and under plain runc.

    .venv/bin/python bench/docker.py [ROUNDS [AT_ONCE]]

An engine of its own (tests/system/engine.py), one small image, interleaved rounds, ratios per
round; then the runtime alone, without an engine; then AT_ONCE containers started together.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import interleave, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/system"))
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


def main() -> int:
    if why := engines.why_not():
        print(f"left out: {why}")
        return 0
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    at_once = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory(prefix="mis-bench-") as name:
        place = Path(name)
        with engines.running(place / "engine", {"mis": {"path": engines.RUNTIME}}) as engine:

            def docker(runtime: str, *options: str) -> None:
                done = engine.run("true", options=options, runtime=runtime)
                assert done.returncode == 0, done.stderr

            series = interleave(
                {
                    "docker run, runc": lambda: docker("runc"),
                    "docker run, mis": lambda: docker("mis"),
                },
                rounds,
            )
            print_table(series, series[0])
            folder = bundle(place / "bundle", place / "engine/image")
            numbers = iter(range(1 << 30))

            def alone(program: str) -> None:
                argv = [program, "--root", str(place / "state"), "run", "--bundle", folder]
                subprocess.run([*argv, f"bench-{next(numbers)}"], check=True)

            series = interleave(
                {"run, runc": lambda: alone("runc"), "run, mis": lambda: alone(engines.RUNTIME)},
                rounds,
            )
            print_table(series, series[0])
            for runtime in ("runc", "mis") if at_once else ():
                began = time.perf_counter()
                with ThreadPoolExecutor(at_once) as pool:
                    list(pool.map(docker, [runtime] * at_once))
                print(f"{at_once} at once, {runtime}: {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
