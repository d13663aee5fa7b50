"""Compile what is not Python into ``mis_run/_built``: BPF objects, the static C programs, profiles.

``python -m mis_run.build`` builds what is older than its sources and prints what it built.
Sources live beside the package in a checkout; a wheel carries the results instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mis_run.errors import SetupError

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
BUILT = PACKAGE / "_built"
PROFILES = PACKAGE / "data" / "profiles"
# The kernel's names for the architecture that libbpf's bpf_tracing.h expects.
BPF_ARCH = {"x86_64": "x86", "aarch64": "arm64"}


def built(name: str) -> Path:
    """Path of a compiled object (``net.bpf.o``, ``mis-init``). Raises SetupError if missing."""
    path = BUILT / name
    if not path.exists():
        raise SetupError(
            f"compiled object missing: {path}", hint="build it: python -m mis_run.build"
        )
    return path


def main() -> int:
    """Build everything that is out of date; returns an exit code."""
    BUILT.mkdir(exist_ok=True)
    machine = os.uname().machine
    include = f"-I/usr/include/{machine}-linux-gnu"  # Debian's asm/ headers for -target bpf
    bpf = ["clang", "-target", "bpf", "-O2", "-g", "-Wall", "-Wextra", "-Werror", include]
    bpf += [f"-D__TARGET_ARCH_{BPF_ARCH.get(machine, machine)}"]
    shim = ["clang", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-s"]
    jobs = [
        ([*bpf, "-c"], source, BUILT / f"{source.stem}.o")
        for source in sorted((ROOT / "bpf").glob("*.bpf.c"))
    ]
    jobs += [
        (shim, source, BUILT / f"mis-{source.stem}")
        for source in sorted((ROOT / "shim").glob("*.c"))
    ]
    headers = max((h.stat().st_mtime for h in ROOT.glob("bpf/*.h")), default=0.0)
    import subprocess  # late: a launch only asks where things are

    for command, source, target in jobs:
        if target.exists() and target.stat().st_mtime > max(headers, source.stat().st_mtime):
            continue
        # Into a sibling first: a reader never sees half an object.
        part = target.with_name(f"{target.name}.{os.getpid()}")
        argv = [*command, str(source), "-o", str(part)]
        try:
            result = subprocess.run(argv, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            print("mis-run: clang is missing; apt-get install clang libbpf-dev", file=sys.stderr)
            return SetupError.exit_code
        if result.returncode:
            part.unlink(missing_ok=True)
            print(f"mis-run: {' '.join(argv)}\n{result.stderr}", file=sys.stderr)
            return SetupError.exit_code
        part.replace(target)
        print(f"mis-run: built {target.name}")
    _profiles()
    return 0


def _profiles() -> None:
    """Our own profiles as JSON, each with the text it was made from: what tomllib would say."""
    import json
    import tomllib

    for source in sorted(PROFILES.glob("*.toml")):
        text = source.read_text()
        made = json.dumps({"text": text, "values": tomllib.loads(text)})
        target = BUILT / f"{source.stem}.json"
        if not target.exists() or target.read_text() != made:
            part = target.with_name(f"{target.name}.{os.getpid()}")
            part.write_text(made)
            part.replace(target)


if __name__ == "__main__":
    sys.exit(main())
