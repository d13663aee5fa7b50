"""Where a run is known from outside: ``/run/mis/<id>/`` while it lives, nothing afterwards.

Whoever holds the lock of a run directory supervises it; the kernel drops the lock when that
process dies, however it dies, so ``live()`` never has to trust a PID.  Records of ended runs are
not state: `report` writes them elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from mis_run import locks, trees
from mis_run.errors import NotFound, SetupError, UsageError
from mis_run.hints import Any

STATE = Path("/run/mis")
ID = re.compile(r"[0-9a-f]{8}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class RunDir:
    """The directory of one live run. ``id`` names everything the run makes on this machine."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.id = path.name
        self.lock = lock
        self._facts: dict[str, Any] = {}

    def note(self, **facts: Any) -> None:
        """Merge ``facts`` into state.json, atomically: a reader sees the old or the new file."""
        self._facts.update(facts)
        part = self.path / "state.json.part"
        part.write_text(json.dumps(self._facts))
        part.replace(self.path / "state.json")

    def clear(self) -> None:
        """Remove everything but what tells that it is there: its lock and its facts.

        All of that goes when `create` ends; something else can be waited for meanwhile.
        """
        trees.remove(self.path, keep=("lock", "state.json"))


@contextmanager
def create(name: str | None) -> Iterator[RunDir]:
    """Make and lock a new run directory; it is removed on the way out.

    Raises UsageError for a name that is malformed or taken by a live run, SetupError when the
    state directory cannot be written.
    """
    if name is not None:
        if not NAME.fullmatch(name):
            raise UsageError(
                f"--name {name!r}: use letters, digits, '_', '.', '-', at most 63 characters"
            )
        if any(facts.get("name") == name for _, facts in live()):
            raise UsageError(f"--name {name!r}: a live run has this name", hint=f"mis kill {name}")
    try:
        STATE.mkdir(mode=0o755, parents=True, exist_ok=True)
        path, lock = _claim()
    except OSError as error:
        raise SetupError(
            f"cannot write {STATE}: {error.strerror}", hint="run as root: sudo mis-run …"
        ) from error
    run = RunDir(path, lock)
    try:
        run.note(id=run.id, name=name, phase="setup", supervisor=os.getpid())
        yield run
    finally:
        trees.remove(path)
        os.close(lock)


def _claim() -> tuple[Path, int]:
    """A fresh directory and its held lock.

    Between mkdir and flock the directory looks like a dead run to gc, so both happen under the
    lock of the whole state directory, which gc takes too.
    """
    with exclusive():
        while True:
            path = STATE / os.urandom(4).hex()
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                continue
            lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return path, lock


def exclusive() -> AbstractContextManager[int]:
    """Hold the one lock of the state directory (short: claims and gc only)."""
    return locks.Exclusive(STATE, os.O_RDONLY | os.O_DIRECTORY)


def run_dirs() -> list[Path]:
    """Every run directory, live or not."""
    try:
        return sorted(path for path in STATE.iterdir() if ID.fullmatch(path.name))
    except (FileNotFoundError, PermissionError):
        return []


def is_live(path: Path) -> bool:
    """Whether a process holds the run's lock."""
    return locks.held(str(path))


def facts(path: Path) -> dict[str, Any]:
    """What a run noted of itself; empty while it has noted nothing or the file is damaged."""
    with suppress(OSError, ValueError):
        found = json.loads((path / "state.json").read_text())
        if isinstance(found, dict):
            return found
    return {}


def live() -> list[tuple[Path, dict[str, Any]]]:
    """Live runs with what they noted."""
    return [(path, facts(path)) for path in run_dirs() if is_live(path)]


def find(which: str) -> tuple[Path, dict[str, Any]]:
    """The live run with this id, unique id prefix or name. Raises NotFound."""
    runs = live()
    named = [run for run in runs if run[1].get("name") == which or run[0].name == which]
    found = named or [run for run in runs if which and run[0].name.startswith(which)]
    if len(found) == 1:
        return found[0]
    problem = "matches several runs" if found else "no live run has this id or name"
    raise NotFound(f"{which}: {problem}", hint="mis ps")
