"""From an engine's container to the run that guards it: `state` knows runs, engines know ids.

A run directory whose container is guarded has a small file, `NOTE`, which can be read without
importing anything (see `words`).
"""

from __future__ import annotations

import os
import time

from mis_run import locks
from mis_run.errors import GuardLost, SetupError

TYPE_CHECKING = False  # as typing's, without importing typing
if TYPE_CHECKING:
    from pathlib import Path

    from mis_run.oci.words import Call

STATE = "/run/mis"
NOTE = "container"
GONE = 5.0  # seconds a supervisor gets to end after its container
DEFAULT_ROOT = "/run/runc"


def root_of(call: Call) -> str:
    """The OCI runtime's state directory, within which a container's id is unique."""
    return os.path.abspath(call.globals.get("root", DEFAULT_ROOT))  # noqa: PTH100 - no pathlib here


def note(run_dir: Path, root: str, container: str, runtime: Path) -> None:
    """Say that this run guards this container from now on, which ``runtime`` made."""
    part = run_dir / f"{NOTE}.part"
    part.write_text(f"{runtime}\n{container}\n{root}")
    part.replace(run_dir / NOTE)


def of(call: Call) -> dict[str, str]:
    """The directory of each run of this call's container, live or not → the OCI runtime."""
    found: dict[str, str] = {}
    try:
        names = os.listdir(STATE)  # noqa: PTH208
    except OSError:
        return found
    for name in names:
        try:
            with open(f"{STATE}/{name}/{NOTE}") as file:
                runtime, container, root = file.read().split("\n", 2)
        except (OSError, ValueError):  # a run of another kind, or one that is just ending
            continue
        if (root, container) == (root_of(call), call.container):
            found[f"{STATE}/{name}"] = runtime
    return found


def live(call: Call) -> tuple[str, str]:
    """(run directory, OCI runtime) of this container's guard. Raises GuardLost without one."""
    for folder, runtime in of(call).items():
        if locks.held(folder):
            return folder, runtime
    raise GuardLost(
        f"container {call.container[:64]} is not guarded: it has no supervisor",
        hint="remove it and make it anew",
    )


def wait_gone(call: Call) -> None:
    """Wait until the supervisor of a removed container has ended and cleaned up behind itself."""
    end = time.monotonic() + GONE
    while found := of(call):
        if time.monotonic() > end or not any(map(locks.held, found)):
            from mis_run import gc

            gc.sweep()
            return
        time.sleep(0.002)


def run_and_wait(runtime: str, *words: str) -> int:
    """One call of the OCI runtime with our own descriptors, as if it had been called itself."""
    try:
        pid = os.posix_spawn(runtime, [runtime, *words], os.environ)
    except OSError as error:
        raise SetupError(f"{runtime}: {error.strerror}", hint="apt-get install runc") from error
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
