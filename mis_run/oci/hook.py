"""``mis-oci-hook``: the network guard for engines with hooks.d, whatever OCI runtime they use.

Called when a container is made (``createRuntime``; ``prestart`` of old engines), it has the
container's cgroup guarded before the first instruction and leaves a supervisor behind; called again
when the container is gone (``poststop``), it waits until nothing of ours is left.  If it cannot
guard it fails, and then the engine does not start the container.

A hook comes too late to change the container's filter, mounts and limits, and it gets no listener
and no file system to mark: `planning.of` leaves out what only the runtime (`main`) can give, and a
profile that requires it is refused unless the hook's own file waives it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mis_run.dataclass import dataclass, replace
from mis_run.errors import MisError, SetupError, UsageError
from mis_run.events import Guarantee
from mis_run.hints import Any, NoReturn
from mis_run.oci import create, guardian, operator, runs, spec
from mis_run.oci.main import complain
from mis_run.oci.spec import Spec
from mis_run.oci.words import FILE, Call

MOST_BYTES = 1 << 20  # of a container's state; annotations are most of it
SHAPE = {"id": str, "pid": int, "bundle": str, "status": str}
STOPPED = "stopped"

# With one of these root inside could take the guard off its cgroup, send packets past it, or become
# root outside. The runtime allows them, for there the escape guard denies what they are good for.
TOO_MUCH = (
    *("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF", "CAP_PERFMON"),
    *("CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_PTRACE"),
)


@dataclass(frozen=True, kw_only=True)
class Words:
    """The arguments that the hook's file gives."""

    config: str = FILE
    profile: str | None = None
    waived: frozenset[Guarantee] = frozenset()


def main() -> NoReturn:
    """The program."""
    code = 0
    try:
        dispatch(sys.argv[1:], sys.stdin.buffer.read(MOST_BYTES + 1))
    except MisError as error:
        complain(error, ())
        code = error.exit_code
    except OSError as error:
        failure = SetupError(str(error), hint="mis doctor")
        complain(failure, ())
        code = failure.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def dispatch(argv: Sequence[str], raw: bytes) -> None:
    """What the container's state, as the OCI runtime wrote it, asks for. Raises MisError."""
    given = words(argv)
    state = read(raw)
    named = {"root": state["bundle"]} | ({"mis-profile": given.profile} if given.profile else {})
    call = Call((), named, "hook", (), (), state["id"])
    if state["status"] == STOPPED:
        runs.wait_gone(call)
        return
    found = spec.read(Path(state["bundle"]))
    decided = operator.load(given.config)
    decided = replace(decided, waived=decided.waived | given.waived)
    if "privileged" not in decided.allow:
        check_rights(found)
    order = create.prepare(call, Path("/"), found, decided)
    with guardian.start(replace(order, by_hook=True, sealed=False)) as supervisor:
        supervisor.run_dir()
        supervisor.guard(state["pid"])


def words(argv: Sequence[str]) -> Words:
    """The arguments. Raises UsageError."""
    parser = argparse.ArgumentParser(
        "mis-oci-hook",
        description="Guard a container's network; see docs/docker.md.",
        add_help=True,
    )
    parser.add_argument("--mis-config", default=FILE, metavar="FILE")
    parser.add_argument("--mis-profile", metavar="NAME")
    parser.add_argument("--allow-missing", default="", metavar="GUARANTEE[,…]")
    parser.error = _refuse  # type: ignore[method-assign]
    found = parser.parse_args(list(argv))
    listed = [name for name in found.allow_missing.split(",") if name]
    names = [guarantee.value for guarantee in Guarantee]
    for name in listed:
        if name not in names:
            raise UsageError(
                f"--allow-missing: {name!r} is no guarantee", hint=f"use {', '.join(names)}"
            )
    return Words(
        config=found.mis_config,
        profile=found.mis_profile,
        waived=frozenset(map(Guarantee, listed)),
    )


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"mis-oci-hook: {message}", hint="see the hook's file in hooks.d")


def read(raw: bytes) -> dict[str, Any]:
    """The state on standard input. Raises UsageError for what is none."""
    state = spec.parse(raw, MOST_BYTES, "the container's state on standard input")
    for key, kind in SHAPE.items():
        if key == "pid" and state.get("status") == STOPPED:
            continue
        if not isinstance(state.get(key), kind) or isinstance(state[key], bool):
            raise UsageError(
                f"the container's state has no {key}, or {key} is not {spec.WORDS[kind]}",
                hint="mis-oci-hook is called by an engine: docs/docker.md",
            )
    if not state["bundle"].startswith("/"):
        raise UsageError("the container's state: bundle is no absolute path")
    return state


def check_rights(found: Spec) -> None:
    """Raise UsageError for a container that a network guard alone cannot hold."""
    sets = found.at("process.capabilities", {}).values()
    has = {name for one in sets if isinstance(one, list) for name in one}
    if more := [name for name in TOO_MUCH if name in has]:
        raise UsageError(
            f"refused: a hook cannot guard a container with {', '.join(more)}",
            hint="--cap-drop it, or use the runtime: --runtime mis",
        )
