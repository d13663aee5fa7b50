"""The agent's root: the host's (or ``--rootfs``) read-only, under a layer that is thrown away.

What the agent must not see is covered in the upper layer before the overlay exists: an opaque
folder or an empty file there replaces the host's own, with no mount that could be missed.
All mounts are made in a mount namespace of the supervisor's own (`isolate`), so they are invisible
to the host and end with the last process that uses them, even after a SIGKILL.
Out of scope: what is mounted inside the container (`bundle`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mis_run import masks
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


@contextmanager
def mount(plan: Plan, folder: Path, etc: Mapping[str, str]) -> Iterator[Path]:
    """The merged root, made below ``folder``; unmounted on the way out.

    ``etc`` are files of the agent's own ``/etc`` (``resolv.conf``, ``hosts``, ``hostname``).
    The layer holds at most ``limits.scratch`` bytes.  Raises SetupError.
    """
    layer, merged = folder / "layer", folder / "root"
    lower = plan.rootfs or Path("/")
    if not lower.is_dir():
        raise SetupError(
            f"--rootfs {lower}: no such folder",
            hint="name a folder with a root file system, as debootstrap makes one",
        )
    layer.mkdir()
    merged.mkdir()
    size = f"size={plan.limits.scratch or DEFAULT_LAYER},mode=700"
    try:
        libc.mount("tmpfs", str(layer), "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, size)
    except OSError as error:
        raise SetupError(f"cannot mount the throw-away layer: {error.strerror}") from error
    try:
        (layer / "work").mkdir()
        try:
            prepare(Layer(lower, layer / "upper"), plan, etc)
        except OSError as error:
            raise SetupError(f"cannot prepare the throw-away layer: {error}") from error
        data = f"lowerdir={_escape(lower)},upperdir={layer}/upper,workdir={layer}/work"
        try:
            libc.mount("overlay", str(merged), "overlay", libc.MS_NODEV | libc.MS_NOSUID, data)
        except OSError as error:
            raise SetupError(
                f"cannot lay an overlay over {lower}: {error.strerror}",
                hint="see `dmesg | tail`; an overlay may lie on at most one other overlay, and "
                "some file systems cannot lie below one: try --rootfs DIR on ext4, xfs or btrfs",
            ) from error
        try:
            yield merged
        finally:
            libc.umount(str(merged), libc.MNT_DETACH)
    finally:
        libc.umount(str(layer), libc.MNT_DETACH)


def _escape(path: Path) -> str:
    r"""Overlay's options split at ``,`` and ``:``; a backslash keeps them (overlayfs.rst)."""
    text = os.fspath(path)
    for character in ("\\", ",", ":"):
        text = text.replace(character, f"\\{character}")
    return text


class Layer:
    """The upper layer while it is being written, before it is part of an overlay."""

    def __init__(self, lower: Path, upper: Path) -> None:
        self.lower = "" if lower == Path("/") else os.fspath(lower)
        self.upper = os.fspath(upper)
        Path(upper).mkdir()
        shutil.copystat(lower, upper)

    def _parents(self, path: str) -> None:
        """The folders above ``path`` with the owner and mode of those they lie over."""
        for parent in list(Path(path).parents)[-2::-1]:
            above, below = f"{self.upper}{parent}", f"{self.lower}{parent}"
            if os.path.lexists(above):
                continue
            Path(above).mkdir()
            if Path(below).is_dir():
                facts = Path(below).stat()
                os.chown(above, facts.st_uid, facts.st_gid)
                shutil.copystat(below, above)

    def folder(self, path: str, mode: int, uid: int = 0, gid: int = 0) -> None:
        """An empty folder in place of what is at ``path``, whatever that is."""
        path = masks.resolve(self.lower, path)
        self._parents(path)
        here = Path(f"{self.upper}{path}")
        here.mkdir(exist_ok=True)
        # Opaque: overlayfs does not merge it with the lower folder (overlayfs.rst).
        os.setxattr(here, "trusted.overlay.opaque", b"y")
        os.chown(here, uid, gid)
        here.chmod(mode)

    def file(self, path: str, text: str = "") -> None:
        """A file with this text in place of what is at ``path``; links there are replaced."""
        folder, _, name = path.rpartition("/")
        path = f"{masks.resolve(self.lower, folder).rstrip('/')}/{name}"
        self._parents(path)
        here = Path(f"{self.upper}{path}")
        here.write_text(text)
        here.chmod(0o444)


def prepare(layer: Layer, plan: Plan, etc: Mapping[str, str]) -> None:
    """Write everything into the upper layer that the agent finds instead of the host's."""
    for path, is_folder in masks.find_all(layer.lower, plan.masked).items():
        if is_folder:
            layer.folder(path, 0o755)
        else:
            layer.file(path)
    for path, mode in FRESH.items():
        layer.folder(path, mode)
    if has_home(plan.user):
        layer.folder(plan.user.home, 0o700, plan.user.uid, plan.user.gid)
    for name, text in etc.items():
        layer.file(f"/etc/{name}", text)


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
        whole = any(Path(point).is_relative_to(tree) for tree in WHOLE_TREES)
        if kind in REAL and (whole or point in ALONE):
            found[point] = None  # mounted over twice: shown once
    return list(found)


def hidden(plan: Plan) -> list[tuple[str, bool]]:
    """(path, is a folder) of what must be covered by mounts: masked paths inside binds.

    The throw-away layer covers everything else (`prepare`).  In the host's own file systems that
    includes the sockets of its services, which a bind would leave within reach.
    """
    binds = {str(plan.cwd): str(plan.cwd)} | {str(b.target): str(b.source) for b in plan.binds}
    shared = separate(plan.host) if plan.rootfs is None else []
    found: dict[str, bool] = {}
    for target, source in binds.items():
        if Path(source).is_dir():
            found |= masks.inside(source, target, plan.masked)
    if shared:
        patterns = (*plan.masked, *masks.sockets())
        for point in shared:
            found |= masks.inside(point, point, patterns)
    named = {*binds, *shared}
    return sorted((path, folder) for path, folder in found.items() if path not in named)


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
