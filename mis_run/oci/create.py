"""``create`` and ``run``: the OCI runtime's own, with the guards in the gap before ``start``.

1. the engine's configuration is read, judged, and a plan made
2. a supervisor is started, which says where it listens (`guardian`)
3. the edited configuration takes the engine's place while the OCI runtime makes the container
4. the supervisor guards the container, which waits before its first instruction
5. only then the call succeeds; on any failure the container is removed again

Out of scope: the container's start, and its end (`supervisor`, ``delete``).
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from mis_run import profiles, state
from mis_run.dataclass import replace
from mis_run.errors import GuardLost, MisError, SetupError, UsageError
from mis_run.linux import memfd
from mis_run.oci import dangers, edit, guardian, operator, planning, runs, spec
from mis_run.oci.operator import Operator
from mis_run.oci.order import INFO, RESOLV_CONF, SOCKET, Order
from mis_run.oci.spec import Spec
from mis_run.oci.words import RUN_FLAGS, Call

SEARCH = (profiles.SYSTEM, profiles.BUILT_IN)
"""Never a user's own profiles: whose would they be?"""
SHORT_ID = 12  # characters of an id that engines show


class RuntimeFailed(SetupError):
    """The OCI runtime failed and has said why itself, to its own log."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.exit_code = code


def create(call: Call, runtime: str, decided: Operator) -> int:
    """The container, held and guarded; returns 0. Raises MisError, and nothing is left then."""
    found = spec.read(_bundle(call))
    order = prepare(call, Path(runtime), found, decided)
    machine = replace(planning.SKETCH, cpus=len(os.sched_getaffinity(0)))
    plan = planning.make(order.profile, found, decided, machine, order.name)
    with guardian.start(order) as supervisor:
        run_dir = supervisor.run_dir()
        inside = edit.Inside(
            listener=run_dir / SOCKET,
            resolv_conf=run_dir / RESOLV_CONF if edit.uses_our_resolver(plan) else None,
            info=run_dir / INFO,
            sealed=order.sealed,
            swap=any(path.exists() for path in edit.SWAP),
        )
        edited = edit.apply(found, plan, inside)
        config = found.bundle / "config.json"
        pid_file = Path(call.options.get("pid-file") or run_dir / "init.pid")
        spec.write(config, edited)
        try:
            code = runs.run_and_wait(
                runtime, *call.base, *_create_words(call, found.bundle, pid_file)
            )
        finally:
            spec.write(config, found.data)  # the bundle is the engine's
        if code:
            raise RuntimeFailed(code)
        try:
            supervisor.guard(int(pid_file.read_text()))
        except (SetupError, OSError, ValueError) as error:
            remove(call, runtime)
            if isinstance(error, SetupError):
                raise
            raise SetupError(f"{pid_file}: {error}") from error
    return 0


def prepare(call: Call, runtime: Path, found: Spec, decided: Operator) -> Order:
    """What is to be guarded. Raises UsageError for what may not be, and for a bad profile."""
    dangers.check(found, decided.allow)
    chosen = operator.choose(decided, call.profile, found.annotations, found.environment)
    search = (*([decided.profiles] if decided.profiles else ()), *SEARCH)
    new_pids = not found.shares("pid") and not found.joins("pid")
    return Order(
        profile=profiles.load(chosen, search=search),
        spec=found,
        operator=decided,
        container=call.container,
        name=_name(call.container),
        root=runs.root_of(call),
        runtime=runtime,
        sealed=new_pids and memfd.sealable(),
    )


def _name(container: str) -> str | None:
    """The run's name for ``mis ps``: the engine's short id, unless that is taken."""
    short = container[:SHORT_ID] if len(container) == 64 else container
    if not state.NAME.fullmatch(short):
        return None
    # Ids are unique within one engine only.
    return None if any(facts.get("name") == short for _, facts in state.live()) else short


def _bundle(call: Call) -> Path:
    return Path(call.options.get("bundle") or call.options.get("b") or ".").absolute()


def _create_words(call: Call, bundle: Path, pid_file: Path) -> list[str]:
    """``create`` with every option spelled out, so that the runtime cannot read it differently."""
    ours = {"bundle", "b", "pid-file", *RUN_FLAGS}
    kept = [f"--{name}={value}" for name, value in call.pairs if name not in ours]
    return ["create", f"--bundle={bundle}", f"--pid-file={pid_file}", *kept, call.container]


def remove(call: Call, runtime: str) -> None:
    """Remove a container that could not be guarded, with whatever the runtime says about it."""
    runs.run_and_wait(runtime, *_quiet(call), "delete", "--force", call.container)


def _quiet(call: Call) -> tuple[str, ...]:
    """The global options without the log: the engine shows its last line, which must be ours."""
    root = call.globals.get("root")
    return ("--root", root, "--log", os.devnull) if root else ("--log", os.devnull)


def _init_of(call: Call) -> int:
    """A pidfd of the held container's init. Raises GuardLost when nobody guards it any more."""
    folder, _ = runs.live(call)
    try:
        return os.pidfd_open(int(state.facts(Path(folder))["pid"]))
    except (KeyError, OSError) as error:
        raise GuardLost(f"container {call.container[:64]} ended before it began") from error


def run(call: Call, runtime: str, decided: Operator) -> int:
    """``run``: create, start, and unless detached wait for the end and remove."""
    found = spec.read(_bundle(call))
    detached = "detach" in call.options or "d" in call.options
    if found.at("process.terminal") and not detached and "console-socket" not in call.options:
        raise UsageError(
            "run: a terminal in the foreground is not supported",
            hint="create with --console-socket, then start; or process.terminal = false",
        )
    if not detached:
        from mis_run.runtime import subreaper

        subreaper()  # the container's init becomes our child when the OCI runtime has made it
    create(call, runtime, decided)
    try:
        pidfd = _init_of(call)  # before the start: a short container takes its guard along
    except MisError:
        remove(call, runtime)
        raise
    if code := runs.run_and_wait(runtime, *call.base, "start", call.container):
        remove(call, runtime)
        return code
    if detached:
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda n, _: signal.pidfd_send_signal(pidfd, n))
    status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    with suppress(SetupError):
        if "keep" not in call.options:
            remove(call, runtime)
            runs.wait_gone(call)
    if status is None or status.si_code == os.CLD_EXITED:
        return status.si_status if status else 0
    return 128 + status.si_status
