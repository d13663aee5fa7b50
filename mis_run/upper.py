"""The throw-away layer while it is written, before it is part of an overlay.

What it holds replaces what lies below: emptied folders and files, the agent's own ``/etc``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from mis_run import masks
from mis_run.model import Plan, User

FRESH = {"/run": 0o755, "/tmp": 0o1777, "/var/tmp": 0o1777}
"""Folders that start empty: the host's hold sockets and other people's files."""
# Homes that system users have in passwd(5) and that are no homes.
NO_HOMES = frozenset(
    {"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/nonexistent", "/opt", "/proc", "/run"}
    | {"/sbin", "/srv", "/sys", "/tmp", "/usr", "/usr/bin", "/usr/sbin", "/var", "/var/lib"}
)


class Layers:
    """The upper layers while they are written, before they are part of overlays.

    One lies over ``lower`` itself and one over each of ``points``, its separate file systems;
    ``uppers`` is their folders by mount point (``""`` is the root), outer ones first.
    """

    def __init__(self, lower: Path, folder: Path, points: Sequence[str]) -> None:
        self.lower = "" if lower == Path("/") else os.fspath(lower)
        self.folder = folder
        self._links: masks.Links = {}  # of the layers below, which we do not change
        self._made: set[str] = set()  # folders in the upper layers
        self.uppers: dict[str, Path] = {}
        for point in ("", *sorted(points)):
            self._add(point)

    def _add(self, point: str) -> None:
        upper = self.folder / str(len(self.uppers))
        source = Path(f"{self.lower}{point}" or "/")
        self.uppers[point] = upper
        upper.with_name(f"{upper.name}.work").mkdir()
        upper.mkdir()
        _like(str(source), str(upper))

    def _place(self, path: str) -> str:
        """Where ``path`` lies in the upper layer it belongs to, with the folders above it made
        as they are in the layer below: the upper one's owner and mode are what counts."""
        point = max((p for p in self.uppers if masks.within(path, p)), key=len)
        upper, inside = self.uppers[point], path[len(point) :]
        end = inside.find("/", 1)
        while end > 0:
            above = f"{upper}{inside[:end]}"
            if above not in self._made and not os.path.lexists(above):
                os.mkdir(above)  # noqa: PTH102 - no Path: a launch makes dozens
                _like(f"{self.lower}{point}{inside[:end]}", above)
            self._made.add(above)
            end = inside.find("/", end + 1)
        return f"{upper}{inside}"

    def folder_at(self, path: str, mode: int, uid: int = 0, gid: int = 0) -> None:
        """An empty folder in place of what is at ``path``, whatever that is."""
        path = masks.resolve(self.lower, path, self._links)
        # A separate file system there or below is covered by simply not being mounted.
        for point in [p for p in self.uppers if p and masks.within(p, path)]:
            del self.uppers[point]
        here = self._place(path)
        try:
            os.mkdir(here)  # noqa: PTH102
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(here).st_mode):
                raise
        # Opaque: overlayfs does not merge it with the lower folder (overlayfs.rst).
        os.setxattr(here, "trusted.overlay.opaque", b"y")
        os.chown(here, uid, gid)
        os.chmod(here, mode)  # noqa: PTH101 - the umask took bits from it

    def folder_unless(self, path: str, mode: int, uid: int = 0, gid: int = 0) -> None:
        """An empty folder at ``path`` if nothing is there."""
        if not os.path.lexists(f"{self.lower}{masks.resolve(self.lower, path, self._links)}"):
            self.folder_at(path, mode, uid, gid)

    def file_at(self, path: str, text: str = "") -> None:
        """A file with this text in place of what is at ``path``; a link there is replaced."""
        folder, _, name = path.rpartition("/")
        path = f"{masks.resolve(self.lower, folder, self._links).rstrip('/')}/{name}"
        self.uppers.pop(path, None)
        here = Path(self._place(path))
        here.write_text(text)
        here.chmod(0o444)

    def prepare(self, plan: Plan, etc: Mapping[str, str]) -> dict[str, bool]:
        """Write everything that the agent finds instead of the host's; what was emptied."""
        emptied = masks.find_all(self.lower, plan.masked)
        if plan.image is not None:
            # The agent may own what is in an image: another name for it must find nothing either.
            emptied |= masks.find_floating(self.lower, plan.masked)
        for path, is_folder in emptied.items():
            if is_folder:
                self.folder_at(path, 0o755)
            else:
                self.file_at(path)
        user = plan.user
        if plan.image is None:
            for path, mode in FRESH.items():
                self.folder_at(path, mode)
            if has_home(user):
                self.folder_at(user.home, 0o700, user.uid, user.gid)
        else:  # nothing in an image is the host's: what is there stays
            for path, mode in FRESH.items():
                self.folder_unless(path, mode)
            if has_home(user):
                self.folder_unless(user.home, 0o700, user.uid, user.gid)
            self.folder_unless(str(plan.cwd), 0o755, user.uid, user.gid)
        for name, text in etc.items():
            self.file_at(f"/etc/{name}", text)
        return emptied


def _like(source: str, target: str) -> None:
    """Give the folder ``target`` the owner, mode, times and attributes of ``source``, if that is a
    folder."""
    try:
        facts = os.stat(source)  # noqa: PTH116
    except OSError:
        return
    if not stat.S_ISDIR(facts.st_mode):
        return
    os.chown(target, facts.st_uid, facts.st_gid)
    if os.listxattr(source):
        import shutil  # late: a folder rarely has an access list, and it imports every compression

        shutil.copystat(source, target)
        return
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.chmod(target, stat.S_IMODE(facts.st_mode))  # noqa: PTH101


def has_home(user: User) -> bool:
    """Whether the user's home gets an empty folder: programs expect one, and the real one is not
    the agent's.  Some system users have ``/usr/sbin`` or ``/`` there; those stay as they are."""
    return user.home.startswith("/") and user.home.rstrip("/") not in NO_HOMES | {""}
