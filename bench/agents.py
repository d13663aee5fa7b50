"""What an agent's coming to and going from the kernel plane costs, natively:

    sudo .venv/bin/python -I bench/agents.py [ROUNDS]

On any kernel with BPF: the maps of `lsm_plane` are made in a bpffs of our own, without its
programs, which take no part in it.  CPU time of ours and of the kernel for us, with 0, 100 and
1,000 others there; an agent that goes also waits for a grace period: in the last column only.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lsm import policy
from mis_run.build import built
from mis_run.guards import lsm, lsm_plane
from mis_run.linux import bpf_pins, libbpf

OTHERS = (0, 100, 1000)
ROUNDS = 50


def load(folder: Path) -> None:
    """The maps of a plane, without its programs."""
    bpf, base = bpf_pins._functions(), libbpf._bpf()
    for place in (folder, folder / "maps", folder / "links"):
        place.mkdir(mode=0o700)
    for name in lsm_plane.OBJECTS:
        handle = base.open(str(built(name)).encode(), None)
        for one in bpf_pins._each(bpf.next_map, handle):
            bpf.pin_at(one, bytes(folder / "maps" / bpf.map_name(one).decode()))
        for one in bpf_pins._each(bpf.next_program, handle):
            bpf.set_autoload(one, False)
        base.load(handle)
        base.close(handle)


@contextmanager
def bpffs() -> Iterator[Path]:
    """One of our own, gone afterwards, and all that is pinned in it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "bpf", "bpf", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def life(group: Path, folder: Path) -> tuple[float, float, float]:
    """Of one agent: CPU milliseconds to come and to go, and how long it took to go."""
    rules = policy(group / "file")
    began = time.process_time_ns()
    guard = lsm.LsmGuard(group, rules, lsm_plane.Plane(folder))
    guard.register()
    there, before = time.process_time_ns(), time.monotonic_ns()
    guard.close()
    over = time.process_time_ns() - there, time.monotonic_ns() - before
    return (there - began) / 1e6, over[0] / 1e6, over[1] / 1e6


def main() -> int:
    """Print a table: medians, and the most."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    print(f"{'others':>6} {'comes: CPU ms':>22} {'goes: CPU ms':>22} {'goes: ms in all':>22}")
    with (
        bpffs() as top,
        mock.patch.object(lsm_plane, "TOP", top),
        tempfile.TemporaryDirectory() as groups,
    ):
        plane, group, there = top / "version", Path(groups), 0
        load(plane)
        for others in OTHERS:
            for number in range(there, others):
                other = Path(groups, str(number))
                other.mkdir()
                guard = lsm.LsmGuard(other, policy(other / "file"), lsm_plane.Plane(plane))
                guard.register()
                guard.release()  # known as before; it goes with the maps
            there = others
            lives = [life(group, plane) for _ in range(rounds)]
            cells = [
                f"{statistics.median(found):8.2f} (at most {max(found):5.2f})"
                for found in zip(*lives, strict=True)
            ]
            print(f"{others:6} " + " ".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
