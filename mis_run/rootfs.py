"""The agent's root: the host's (or ``--rootfs``) read-only, under a layer that is thrown away.

What the agent must not see is covered in the upper layer before the overlay exists: an opaque
folder or an empty file there replaces the host's own, with no mount that could be missed.  Nor can
the host's sockets be reached through it: an overlay's inodes are its own, so connecting to a path
that a service bound below is refused (unix(7); net/unix/af_unix.c, unix_find_bsd).
All mounts are made in a mount namespace of the supervisor's own (`isolate`), so they are invisible
to the host and end with the last process that uses them, even after a SIGKILL.
Out of scope: what is mounted inside the container (`bundle`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mis_run import host_sockets, masks
from mis_run.errors import SetupError
from mis_run.linux import libc
from mis_run.model import Finding, Host, Plan, User

# File systems that hold programs and data; the rest (proc, sysfs, bpf …) is the container's own.
REAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "squashfs"})
REAL |= {"erofs", "virtiofs", "9p", "nfs", "nfs4", "bcachefs", "fuseblk"}
# Trees an agent needs when they are file systems of their own. Never homes, /boot or /mnt; of
# /var only itself, since below it container engines keep other people's roots mounted.
WHOLE_TREES = ("/usr", "/opt", "/nix", "/gnu", "/bin", "/sbin", "/lib", "/lib64", "/lib32")
ALONE = ("/var", "/etc")
FRESH = {"/run": 0o755, "/tmp": 0o1777, "/var/tmp": 0o1777}
"""Folders that start empty: the host's hold sockets and other people's files."""
# Homes that system users have in passwd(5) and that are no homes.
NO_HOMES = frozenset(
    {"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/nonexistent", "/opt", "/proc", "/run"}
    | {"/sbin", "/srv", "/sys", "/tmp", "/usr", "/usr/bin", "/usr/sbin", "/var", "/var/lib"}
)
QUIET = libc.MS_NOSUID | libc.MS_NODEV
DEFAULT_LAYER = 1 << 30  # bytes of the throw-away layer when the profile gives no size


def supported() -> Finding:
    """Whether this kernel has overlayfs; whether a mount works is seen by the mount itself."""
    if "\toverlay\n" in Path("/proc/filesystems").read_text():
        return Finding(True, "overlay file system")
    # A module that is not loaded yet is listed nowhere; mount(2) loads it.
    module = Path(f"/lib/modules/{os.uname().release}/kernel/fs/overlayfs")
    if any(module.glob("overlay.ko*")):
        return Finding(True, "overlay file system (as a module)")
    return Finding(False, "this kernel has no overlay file system", "modprobe overlay")


def isolate() -> None:
    """Leave the host's mount namespace. Its mounts still arrive here; ours never go there.

    Raises SetupError where that is refused, as in a container without privileges.
    """
    try:
        libc.unshare(libc.CLONE_NEWNS)
        libc.mount("none", "/", "", libc.MS_REC | libc.MS_SLAVE)
    except OSError as error:
        raise SetupError(
            f"cannot make a mount namespace: {error.strerror}",
            hint="run as root; inside a container that takes --privileged (CAP_SYS_ADMIN)",
        ) from error


@dataclass(frozen=True, slots=True)
class Root:
    """The merged root at ``path``; ``emptied`` is what stands there empty in place of the host's
    own: path → whether it is a folder."""

    path: Path
    emptied: Mapping[str, bool]


@contextmanager
def mount(plan: Plan, folder: Path, etc: Mapping[str, str]) -> Iterator[Root]:
    """The merged root, made below ``folder``; unmounted on the way out.

    ``etc`` are files of the agent's own ``/etc`` (``resolv.conf``, ``hosts``, ``hostname``).
    The layer holds at most ``limits.scratch`` bytes.  Raises SetupError.
    """
    lower = plan.rootfs or Path("/")
    if not lower.is_dir():
        raise SetupError(
            f"--rootfs {lower}: no such folder",
            hint="name a folder with a root file system, as debootstrap makes one",
        )
    layer, merged = folder / "layer", folder / "root"
    layer.mkdir()
    merged.mkdir()
    with ExitStack() as stack:
        size = f"size={plan.limits.scratch or DEFAULT_LAYER},mode=700"
        _mount("the throw-away layer", "tmpfs", layer, QUIET, size, kind="tmpfs")
        stack.callback(libc.umount, str(layer), libc.MNT_DETACH)
        try:
            layers = Layers(lower, layer, separate(plan.host) if plan.rootfs is None else [])
            emptied = layers.prepare(plan, etc)
        except OSError as error:
            raise SetupError(f"cannot prepare the throw-away layer: {error}") from error
        for point, upper in layers.uppers.items():
            source, target = Path(f"{layers.lower}{point}" or "/"), Path(f"{merged}{point}")
            if source.is_dir():
                work = upper.with_name(f"{upper.name}.work")
                data = f"lowerdir={_escape(source)},upperdir={upper},workdir={work}"
                if plan.uses("bpf-lsm"):  # its rules are on inodes: no two with one number
                    data += ",xino=on"
                _mount(str(source), "overlay", target, QUIET, data, kind="overlay")
            else:  # one file bound from elsewhere, as container engines do for drivers
                _mount(str(source), str(source), target, libc.MS_BIND)
                flags = libc.MS_BIND | libc.MS_REMOUNT | libc.MS_RDONLY | QUIET
                _mount(str(source), "none", target, flags)
            stack.callback(libc.umount, str(target), libc.MNT_DETACH)
        yield Root(merged, emptied)


def _mount(
    what: str, source: str, target: Path, flags: int, data: str = "", *, kind: str = ""
) -> None:
    try:
        libc.mount(source, str(target), kind, flags, data)
    except OSError as error:
        words = f"an overlay over {what}" if kind == "overlay" else what
        raise SetupError(
            f"cannot mount {words}: {error.strerror}",
            hint="see `dmesg | tail`; an overlay may lie on at most one other overlay, and some "
            "file systems cannot lie below one: try --rootfs DIR on ext4, xfs or btrfs",
        ) from error


def _escape(path: Path) -> str:
    r"""Overlay's options split at ``,`` and ``:``; a backslash keeps them (overlayfs.rst)."""
    text = os.fspath(path)
    for character in ("\\", ",", ":"):
        text = text.replace(character, f"\\{character}")
    return text


class Layers:
    """The upper layers while they are written, before they are part of overlays.

    One lies over ``lower`` itself and one over each of ``points``, its separate file systems;
    ``uppers`` is their folders by mount point (``""`` is the root), outer ones first.
    """

    def __init__(self, lower: Path, folder: Path, points: Sequence[str]) -> None:
        self.lower = "" if lower == Path("/") else os.fspath(lower)
        self.folder = folder
        self.uppers: dict[str, Path] = {}
        for point in ("", *sorted(points)):
            self._add(point)

    def _add(self, point: str) -> None:
        upper = self.folder / str(len(self.uppers))
        source = Path(f"{self.lower}{point}" or "/")
        self.uppers[point] = upper
        upper.with_name(f"{upper.name}.work").mkdir()
        upper.mkdir()
        if source.is_dir():
            _like(source, upper)

    def _place(self, path: str) -> str:
        """Where ``path`` lies in the upper layer it belongs to, with the folders above it made
        as they are in the layer below: the upper one's owner and mode are what counts."""
        point = max((p for p in self.uppers if _within(path, p)), key=len)
        upper, inside = self.uppers[point], path[len(point) :]
        for parent in list(Path(inside).parents)[-2::-1]:
            above, below = Path(f"{upper}{parent}"), Path(f"{self.lower}{point}{parent}")
            if not os.path.lexists(above):
                above.mkdir()
                if below.is_dir():
                    _like(below, above)
        return f"{upper}{inside}"

    def folder_at(self, path: str, mode: int, uid: int = 0, gid: int = 0) -> None:
        """An empty folder in place of what is at ``path``, whatever that is."""
        path = masks.resolve(self.lower, path)
        # A separate file system there or below is covered by simply not being mounted.
        for point in [p for p in self.uppers if p and _within(p, path)]:
            del self.uppers[point]
        here = Path(self._place(path))
        here.mkdir(exist_ok=True)
        # Opaque: overlayfs does not merge it with the lower folder (overlayfs.rst).
        os.setxattr(here, "trusted.overlay.opaque", b"y")
        os.chown(here, uid, gid)
        here.chmod(mode)

    def file_at(self, path: str, text: str = "") -> None:
        """A file with this text in place of what is at ``path``; a link there is replaced."""
        folder, _, name = path.rpartition("/")
        path = f"{masks.resolve(self.lower, folder).rstrip('/')}/{name}"
        self.uppers.pop(path, None)
        here = Path(self._place(path))
        here.write_text(text)
        here.chmod(0o444)

    def prepare(self, plan: Plan, etc: Mapping[str, str]) -> dict[str, bool]:
        """Write everything that the agent finds instead of the host's; what was emptied."""
        emptied = masks.find_all(self.lower, plan.masked)
        for path, is_folder in emptied.items():
            if is_folder:
                self.folder_at(path, 0o755)
            else:
                self.file_at(path)
        for path, mode in FRESH.items():
            self.folder_at(path, mode)
        if has_home(plan.user):
            self.folder_at(plan.user.home, 0o700, plan.user.uid, plan.user.gid)
        for name, text in etc.items():
            self.file_at(f"/etc/{name}", text)
        return emptied


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _like(source: Path, target: Path) -> None:
    """Give ``target`` the owner, mode, times and attributes of ``source``."""
    facts = source.stat()
    os.chown(target, facts.st_uid, facts.st_gid)
    shutil.copystat(source, target)


def has_home(user: User) -> bool:
    """Whether the user's home gets an empty folder: programs expect one, and the real one is not
    the agent's.  Some system users have ``/usr/sbin`` or ``/`` there; those stay as they are."""
    return user.home.startswith("/") and user.home.rstrip("/") not in NO_HOMES | {""}


def etc_files(resolvers: Sequence[str], hosts: Mapping[str, str] | None = None) -> dict[str, str]:
    """The agent's ``resolv.conf`` (``resolvers``: addresses), ``hosts`` (name → address; localhost
    is always there) and ``hostname``, for `mount`."""
    names = {"localhost": "127.0.0.1", "agent": "127.0.1.1", **(hosts or {})}
    lines = [f"{address}\t{name}" for name, address in names.items()]
    lines.append("::1\tlocalhost ip6-localhost ip6-loopback")
    return {
        "resolv.conf": "".join(f"nameserver {address}\n" for address in resolvers),
        "hosts": "\n".join(lines) + "\n",
        "hostname": "agent\n",
    }


def separate(host: Host) -> list[str]:
    """Host file systems that an overlay of ``/`` does not show, and that agents need."""
    found: dict[str, None] = {}
    for point, kind in host.mounts:
        whole = any(f"{point}/".startswith(f"{tree}/") for tree in WHOLE_TREES)
        if kind in REAL and (whole or point in ALONE):
            found[point] = None  # mounted over twice: shown once
    return list(found)


def shared(plan: Plan) -> dict[str, str]:
    """What the agent shares with the host: where it sees it → where it is."""
    return {str(plan.cwd): str(plan.cwd)} | {str(b.target): str(b.source) for b in plan.binds}


def hidden(plan: Plan) -> dict[str, bool]:
    """path → is it a folder, of what must be covered by mounts: masked paths, and sockets of the
    host's services, in what is shared. What is itself bound was meant.

    The throw-away layer covers everything else (`Layers.prepare`).
    """
    binds = shared(plan)
    found: dict[str, bool] = {}
    for target, source in binds.items():
        if Path(source).is_dir():
            found |= masks.inside(source, target, plan.masked)
    for path in host_sockets.inside(binds):
        if not any(folder and _within(path, above) for above, folder in found.items()):
            found[path] = False
    return {
        path: folder
        for path, folder in sorted(found.items())
        if path not in binds and _shown(path, binds)
    }


def _shown(path: str, binds: Mapping[str, str]) -> bool:
    """Whether it is there to be covered: not below another bind, which would get an empty file."""
    target = max((target for target in binds if _within(path, target)), key=len)
    return os.path.lexists(f"{binds[target]}{path[len(target) :]}")


def protected(plan: Plan) -> list[str]:
    """Those of ``plan.protected`` that exist and lie inside a writable bind.

    What does not exist cannot be mounted over without making it in the user's workspace; a link
    is left out because a mount would land on what it points to.
    """
    writable = {str(plan.cwd): str(plan.cwd)}
    writable |= {str(b.target): str(b.source) for b in plan.binds if not b.readonly}
    found = []
    for target, source in writable.items():
        for path in plan.protected:
            if not Path(path).is_relative_to(target) or path == target:
                continue
            inside = f"{source.rstrip('/')}/{Path(path).relative_to(target)}"
            if masks.resolve("", inside) == inside and os.path.lexists(inside):
                found.append(path)
    return sorted(set(found))
