"""Which plane gives the file, exec and escape guarantees, decided at plan time. Pure.

The kernel plane wherever the BPF LSM works, and with it the file guard where a profile has rules
that only names or contents can tell (`needs_names`): the kernel judges first, so nothing is counted
twice.  docs/decisions/kernel-plane.md argues the choice.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from mis_run import masks, profiles
from mis_run.events import Guarantee
from mis_run.file_rules import WILD, floats
from mis_run.model import Host, Options, PlaneChoice, Profile

LSM, FANOTIFY = "bpf-lsm", "fanotify"
HOST_PLANE = ((Guarantee.FILE, FANOTIFY), (Guarantee.EXEC, FANOTIFY))
KERNEL_PLANE = ((Guarantee.FILE, LSM), (Guarantee.EXEC, LSM), (Guarantee.ESCAPE, LSM))


def choose(options: Options, profile: Profile, host: Host) -> list[tuple[Guarantee, str]]:
    """The mechanisms of the plane.

    Not chosen by itself: without enforcement where both would judge (each act would count twice).
    """
    wanted = options.plane
    if wanted is PlaneChoice.HOST or (wanted is PlaneChoice.AUTO and not host.works(LSM)):
        return list(HOST_PLANE)
    names = needs_names(options, profile)
    if wanted is PlaneChoice.AUTO and names and not profile.enforce:
        return list(HOST_PLANE)
    return [*KERNEL_PLANE, *(HOST_PLANE if names else ())]


def needs_names(options: Options, profile: Profile) -> str:
    """A rule that cannot be told by the inodes that exist at launch; empty when there is none."""
    # The home is a place like any other for this question.
    facts = {"HOME": "/home/agent", "WORKSPACE": str(options.workdir)}
    shared = [str(options.workdir), *(str(bind.target) for bind in options.binds)]
    scratch = profiles.expand(("@scratch",), facts)
    writable = [*shared, *(path.removesuffix("/**") for path in scratch)]
    files, programs = profile.files, profile.exec
    if files.taint:  # only the file guard can let an open wait until a level is in force
        return files.taint[0]
    if programs.deny:  # a copy of it, and what the loader runs, is known by content
        return programs.deny[0]
    allowed = profiles.expand((*files.read, *files.write), facts)
    runs = [entry.partition("#")[0] for entry in programs.allow]
    for entry in programs.allow:
        if "#sha256:" in entry:
            return entry
    executable = profiles.expand(runs, facts)
    for entry in (*allowed, *executable):
        if floats(entry) or masks.normal(entry) is None:
            return entry
        if WILD.search(entry.removesuffix("/**")) and _inside(entry, writable):
            return entry
    for entry in allowed:
        if entry not in executable:  # a program there could be run by the loader
            return entry
    for entry in executable:
        if entry not in allowed:  # only what is a program may be read there
            return entry
    for entry in profiles.expand((*files.deny, *files.kill), facts):
        if floats(entry) or masks.normal(entry) is None or _inside(entry, shared):
            return entry
    return ""


def _inside(pattern: str, places: Iterable[str]) -> bool:
    """Whether a pattern may name something in one of ``places``, which are folders."""
    parts = (masks.normal(pattern) or "/").strip("/").split("/")
    return any(_reaches(parts, place.strip("/").split("/")) for place in places)


def _reaches(parts: Sequence[str], where: Sequence[str]) -> bool:
    head = parts[: len(where)]
    return len(parts) > len(where) and all(map(fnmatch.fnmatchcase, where, head))
