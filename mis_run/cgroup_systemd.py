"""A place in the cgroup tree that systemd leaves to us: a delegated scope per run.

systemd is the single writer of the tree except below units with ``Delegate=yes``
(systemd.resource-control(5), "Control Group APIs and Delegation").  A scope lives as long as a
process is in it, so a holder (``cat`` on a pipe of ours) sits in a leaf of its own next to the
run's cgroup; it ends when we close the pipe or die, and systemd then removes the scope once the
agent is gone too.

Tried with systemd 252 as init of a virtual machine with cgroup v2 only, by hand
(docs/decisions/cgroups.md); the tests put a script that does what the manual says in the place of
``systemd-run``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from mis_run.cgroup_detect import places
from mis_run.errors import SetupError
from mis_run.hints import Any
from mis_run.linux import programs

SLICE = "mis.slice"
HOLDER = "holder"
READY_WITHIN = 30.0  # seconds systemd gets to start the scope, as for a container (`runtime`)
ENDS_WITHIN = 5.0  # seconds to wait for the holder's end, which is otherwise its own affair
HINT = "see: systemctl status; or place cgroups without systemd: MIS_CGROUP=direct mis-run …"


def command(run_id: str) -> list[str]:
    """What is executed, for one run."""
    return [
        *("systemd-run", "--scope", "--quiet", "--collect", f"--unit=mis-{run_id}.scope"),
        *(f"--slice={SLICE}", "--property=Delegate=yes", "--", "cat"),
    ]


@contextmanager
def scope(run_id: str, unified: Path) -> Iterator[PurePosixPath]:
    """Yield the path (from the root of the ``unified`` mount) of a scope that is ours to fill.

    Raises SetupError when systemd-run is missing, fails, or does not answer.
    """
    import subprocess

    argv = command(run_id)
    try:
        holder = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=programs.environment(),
        )
    except FileNotFoundError as error:
        raise SetupError("this is a systemd host without systemd-run", hint=HINT) from error
    try:
        path = _wait(holder, f"mis-{run_id}.scope", argv)
        # A cgroup with controllers for its children must hold no process itself.
        leaf = unified / path.relative_to("/") / HOLDER
        try:
            leaf.mkdir()
            (leaf / "cgroup.procs").write_text(str(holder.pid))
        except OSError as error:
            raise SetupError(f"cannot use scope {path}: {error.strerror}", hint=HINT) from error
        yield path
    finally:
        assert holder.stdin is not None
        holder.stdin.close()  # which ends it
        # Not killed: a late systemd would start a scope for a process that is gone, which nothing
        # ends any more (systemd 252).  So it may find its input closed, whenever it comes to run.
        with suppress(subprocess.TimeoutExpired):
            holder.wait(ENDS_WITHIN)
        if holder.stderr is not None:
            holder.stderr.close()


def _wait(holder: Any, unit: str, argv: list[str]) -> PurePosixPath:
    end = time.monotonic() + READY_WITHIN
    while holder.poll() is None and time.monotonic() < end:
        path = PurePosixPath(places(Path(f"/proc/{holder.pid}")).get("", "/"))
        if path.name == unit:
            return path
        time.sleep(0.002)
    if holder.poll() is None:
        raise SetupError(f"{' '.join(argv)}: not in {unit} after {READY_WITHIN:g} s", hint=HINT)
    said = holder.stderr.read().decode(errors="replace").strip() if holder.stderr else ""
    raise SetupError(f"{' '.join(argv)}: exit {holder.returncode}: {said}", hint=HINT)
