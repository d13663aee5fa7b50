"""The kernel plane of this machine: its programs, attached once and pinned, shared by all agents.

Everything lies below ``/sys/fs/bpf/mis-run/VERSION/``, where VERSION is the hash of the objects:
``links/`` keep the programs attached, ``maps/`` are how agents are told to them.  An upgrade loads
its own version beside the old one; an agent stays with the version it began with, which goes with
its last agent (`sweep`).  So there is no moment without programs, and no format to keep stable.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from functools import cache, cached_property
from pathlib import Path

from mis_run import locks
from mis_run.build import built
from mis_run.errors import SetupError
from mis_run.guards.lsm_abi import AGENT, PLACE, PLANE, SLOTS
from mis_run.linux import bpf_pins
from mis_run.model import Finding

BPFFS = Path("/sys/fs/bpf")
TOP = BPFFS / "mis-run"
OBJECTS = tuple(f"lsm_{area}.bpf.o" for area in ("file", "tree", "exec", "escape", "net"))


def supported() -> dict[str, Finding]:
    """Whether BPF programs can be LSM hooks here: one is loaded, none attached.

    Takes some 20 ms, to find the hook in the kernel's BTF, unless this boot has our programs.
    """
    try:
        if not (TOP / version() / "links").is_dir():
            bpf_pins.try_lsm()
    except SetupError as error:
        return {"bpf-lsm": Finding(False, error.message, error.hint)}
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        fix = "run as root, on a kernel that allows them: docs/decisions/kernel-plane.md"
        return {"bpf-lsm": Finding(False, f"the kernel refuses LSM programs: {reason}", fix)}
    return {"bpf-lsm": Finding(True, "files, programs and escapes are judged in LSM hooks")}


@cache
def version() -> str:
    """Names the objects we would load."""
    digest = hashlib.sha256()
    for name in OBJECTS:
        digest.update(built(name).read_bytes())
    return digest.hexdigest()[:16]


class Plane:
    """One loaded version: its maps, opened when first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _map(self, name: str) -> bpf_pins.PinnedMap:
        return bpf_pins.PinnedMap(self.folder / "maps" / name)

    @cached_property
    def agents(self) -> bpf_pins.MappedArray:
        """Slot → settings, written by us only."""
        return bpf_pins.MappedArray(self.folder / "maps" / "agents", SLOTS, AGENT.size)

    @cached_property
    def slots(self) -> bpf_pins.PinnedMap:
        """Cgroup id → slot."""
        return self._map("slots")

    @cached_property
    def states(self) -> bpf_pins.PinnedMap:
        """Slot → counts, written by the kernel."""
        return self._map("states")

    @cached_property
    def rings(self) -> bpf_pins.PinnedMap:
        """Cgroup id → ring buffer."""
        return self._map("rings")

    @cached_property
    def rules(self) -> bpf_pins.PinnedMap:
        """Place → rule."""
        return self._map("rules")

    @cached_property
    def _state(self) -> bpf_pins.MappedArray:
        return bpf_pins.MappedArray(self.folder / "maps" / "plane", 1, PLANE.size)

    def close(self) -> None:
        """Release descriptors; what is pinned stays."""
        for value in list(self.__dict__.values()):
            if isinstance(value, bpf_pins.PinnedMap):
                value.close()
        self.__dict__ = {"folder": self.folder}

    def hooks(self) -> list[str]:
        """Names of the attached programs."""
        return sorted(path.name for path in (self.folder / "links").iterdir())

    def registered(self) -> dict[int, int]:
        """Agents, each with the slot where its settings and counts are."""
        return {
            int.from_bytes(agent, "little"): int.from_bytes(slot, "little")
            for agent, slot in self.slots.items().items()
        }

    def slot(self, agent: int) -> int | None:
        """That of one agent, if it is registered."""
        found = self.slots.lookup(agent.to_bytes(8, "little"), 4)
        return None if found is None else int.from_bytes(found, "little")

    @staticmethod
    def free_slot(registered: Mapping[int, int]) -> int:
        """One that none of these agents has. To be called under `locked`. Raises SetupError."""
        taken = set(registered.values())
        free = next((slot for slot in range(SLOTS) if slot not in taken), None)
        if free is None:
            raise SetupError(f"kernel plane: {SLOTS} agents are running already")
        return free

    def next_epoch(self) -> int:
        """What `announce` will make of it: a number that never was. To be called under `locked`."""
        return int(PLANE.unpack(self._state.read(0))[0]) + 1

    def announce(self, agents: int | None = None) -> None:
        """Make every task look again which agent it belongs to, and all that is remembered void;
        ``agents`` are there now, where that has changed. To be called under `locked`."""
        if agents is None:
            agents = PLANE.unpack(self._state.read(0))[1]
        self._state.write(0, PLANE.pack(self.next_epoch(), agents))

    def forget(self, agent: int, places: Collection[bytes] | None = None) -> None:
        """Remove all that is known of an agent, its rules at ``places`` (None: wherever they are,
        which takes a look at everybody's). To be called under `locked`."""
        key, slot = agent.to_bytes(8, "little"), self.slot(agent)
        settings = b"" if slot is None else self.agents.read(slot)
        if slot is not None and settings[:8] == key:
            self.agents.write(slot, bytes(8) + settings[8:])  # its id, and with it the agent
        # A map of maps: the kernel waits here until no program runs that began before, and may
        # still have the slot in its hands (maybe_wait_bpf_programs). Only then it is free.
        self.rings.delete(key)
        if places is None:
            places = [place for place in self.rules.items() if PLACE.unpack(place)[0] == agent]
        for place in places:
            self.rules.delete(place)
        self.slots.delete(key)
        self.announce(len(self.registered()))


def locked() -> AbstractContextManager[int]:
    """One process at a time changes the plane, machine-wide."""
    TOP.mkdir(mode=0o700, exist_ok=True)
    return locks.Exclusive(TOP, os.O_RDONLY | os.O_DIRECTORY)


def ensure() -> Plane:
    """The plane of our version, loaded when this boot has not got it yet. Raises SetupError.

    Where no bpffs is mounted it is mounted here, so call this in the host's mount namespace: the
    pins end with the last mount of it.
    """
    try:
        bpf_pins.mount(BPFFS)
        folder = TOP / version()
        with locked():
            if not folder.exists():
                _load(folder)
    except OSError as error:
        raise SetupError(f"kernel plane: {error}", hint="mis doctor") from error
    return Plane(folder)


def _load(folder: Path) -> None:
    """Load into a folder beside, which then gets its name: never a version that lacks a hook."""
    part = TOP / "part"
    _remove(part)
    for place in (part, part / "maps", part / "links"):
        place.mkdir(mode=0o700)
    try:
        for name in OBJECTS:
            bpf_pins.load_and_pin(built(name), part / "maps", part / "links")
    except BaseException:
        _remove(part)
        raise
    part.rename(folder)


def _remove(folder: Path) -> None:
    """Unpin a version: links first, so that no program is left that knows no agent."""
    for name in ("links", "maps"):
        with suppress(FileNotFoundError):
            for pin in (folder / name).iterdir():
                pin.unlink()
            (folder / name).rmdir()
    with suppress(FileNotFoundError):
        folder.rmdir()


def sweep(cgroups: Path) -> list[int]:
    """Forget agents whose cgroup below ``cgroups`` is gone, and versions that nobody needs.

    Ours stays, so that the next launch is quick. Returns the agents that were forgotten.
    """
    if not TOP.exists():
        return []
    alive = set()
    for path, _, _ in os.walk(cgroups):  # unlike rglob it bears that some go meanwhile
        with suppress(FileNotFoundError):
            alive.add(os.stat(path).st_ino)  # noqa: PTH116
    gone: list[int] = []
    with locked():
        for folder in TOP.iterdir():
            if folder.name == "part":
                _remove(folder)
                continue
            plane = Plane(folder)
            try:
                dead = [agent for agent in plane.registered() if agent not in alive]
                for agent in dead:
                    plane.forget(agent)
                gone += dead
                unused = not plane.registered()
            finally:
                plane.close()
            if unused and folder.name != version():
                _remove(folder)
    return gone


def unload() -> None:
    """Detach everything of all versions; agents that still run lose this plane's guards."""
    if TOP.exists():
        with locked():
            for folder in list(TOP.iterdir()):
                _remove(folder)
        TOP.rmdir()
