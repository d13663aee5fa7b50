"""From an engine's container to the run that guards it: `state` knows runs, engines know ids."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from mis_run import state
from mis_run.errors import GuardLost, SetupError
from mis_run.oci.words import Call

GONE = 5.0  # seconds a supervisor gets to end after its container
DEFAULT_ROOT = "/run/runc"


def root_of(call: Call) -> str:
    """The OCI runtime's state directory, within which a container's id is unique."""
    return str(Path(call.globals.get("root", DEFAULT_ROOT)).absolute())


def of(call: Call) -> list[tuple[Path, dict[str, Any]]]:
    """Every run of this call's container, live or not."""
    wanted = (root_of(call), call.container)
    found = ((path, state.facts(path)) for path in state.run_dirs())
    return [(path, f) for path, f in found if (f.get("root"), f.get("container")) == wanted]


def live(call: Call) -> dict[str, Any]:
    """What the run that guards this container noted. Raises GuardLost when there is none."""
    for path, facts in of(call):
        if state.is_live(path) and facts.get("phase") == "running":
            return facts
    raise GuardLost(
        f"container {call.container[:64]} is not guarded: it has no supervisor",
        hint="remove it and make it anew",
    )


def wait_gone(call: Call) -> None:
    """Wait until the supervisor of a removed container has ended and cleaned up behind itself."""
    end = time.monotonic() + GONE
    while runs := of(call):
        if time.monotonic() > end or not any(state.is_live(path) for path, _ in runs):
            from mis_run import gc

            gc.sweep()
            return
        time.sleep(0.005)


def run_and_wait(runtime: Path, *words: str) -> int:
    """One call of the OCI runtime with our own descriptors, as if it had been called itself."""
    try:
        pid = os.posix_spawn(runtime, [str(runtime), *words], os.environ)
    except OSError as error:
        raise SetupError(f"{runtime}: {error.strerror}", hint="apt-get install runc") from error
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
