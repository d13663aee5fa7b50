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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mis_run import host_sockets, masks
from mis_run.dataclass import dataclass
from mis_run.errors import SetupError, UsageError
from mis_run.linux import libc
from mis_run.model import Finding, Host, Plan
from mis_run.upper import FRESH as FRESH
from mis_run.upper import Layers
from mis_run.upper import has_home as has_home

# File systems that hold programs and data; the rest (proc, sysfs, bpf …) is the container's own.
REAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "squashfs"})
REAL |= {"erofs", "virtiofs", "9p", "nfs", "nfs4", "bcachefs", "fuseblk"}
# Trees an agent needs when they are file systems of their own. Never homes, /boot or /mnt; of
# /var only itself, since below it container engines keep other people's roots mounted.
WHOLE_TREES = ("/usr", "/opt", "/nix", "/gnu", "/bin", "/sbin", "/lib", "/lib64", "/lib32")
ALONE = ("/var", "/etc")
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


@dataclass(frozen=True)
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
    layer, merged = folder / "layer", folder / "root"
    layer.mkdir()
    merged.mkdir()
    with ExitStack() as stack:
        lower = _lower(plan, folder)
        size = f"size={plan.limits.scratch or DEFAULT_LAYER},mode=700"
        _mount("the throw-away layer", "tmpfs", layer, QUIET, size, kind="tmpfs")
        stack.callback(libc.umount, str(layer), libc.MNT_DETACH)
        own = plan.rootfs is None and plan.image is None
        with _seen(lower, folder) as seen:
            try:
                layers = Layers(seen, layer, separate(plan.host) if own else [])
                emptied = layers.prepare(plan, etc)
            except OSError as error:
                raise SetupError(f"cannot prepare the throw-away layer: {error}") from error
        for point, upper in layers.uppers.items():
            source, target = Path(f"{layers.lower}{point}" or "/"), Path(f"{merged}{point}")
            below = lower if not point else [source]
            if not point or source.is_dir():
                work = upper.with_name(f"{upper.name}.work")
                data = f"{_lowerdir(below)},upperdir={upper},workdir={work}"
                if plan.uses("bpf-lsm"):  # its rules are on inodes: no two with one number
                    data += ",xino=on"
                _mount(
                    plan.image.name if plan.image else str(source),
                    "overlay",
                    target,
                    QUIET,
                    data,
                    kind="overlay",
                )
            else:  # one file bound from elsewhere, as container engines do for drivers
                _mount(str(source), str(source), target, libc.MS_BIND)
                flags = libc.MS_BIND | libc.MS_REMOUNT | libc.MS_RDONLY | QUIET
                _mount(str(source), "none", target, flags)
            stack.callback(libc.umount, str(target), libc.MNT_DETACH)
        yield Root(merged, emptied)


def _lower(plan: Plan, folder: Path) -> list[Path]:
    """The folders under the throw-away layer, uppermost first; only images have several."""
    if plan.image is not None:
        from mis_run.images import cache  # late: most launches use none

        return cache.take(plan.image, folder)
    lower = plan.rootfs or Path("/")
    if not lower.is_dir():
        raise SetupError(
            f"--rootfs {lower}: no such folder",
            hint="name a folder with a root file system, as debootstrap makes one",
        )
    return [lower]


@contextmanager
def _seen(lower: Sequence[Path], folder: Path) -> Iterator[Path]:
    """Those folders as one, to look things up in.

    Only for as long as that takes: an overlay may not lie on an overlay on an overlay.
    """
    if len(lower) == 1:
        yield lower[0]
        return
    view = folder / "image"
    view.mkdir()
    _mount("the image's layers", "overlay", view, QUIET, _lowerdir(lower), kind="overlay")
    try:
        yield view
    finally:
        libc.umount(str(view), libc.MNT_DETACH)
        view.rmdir()


def _lowerdir(folders: Sequence[Path]) -> str:
    return f"lowerdir={':'.join(map(_escape, folders))}"


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


def hidden(plan: Plan) -> dict[str, bool]:
    """path → is it a folder, of what must be covered by mounts: masked paths, and sockets of the
    host's services, in what is shared. What is itself bound was meant.

    The throw-away layer covers everything else (`Layers.prepare`).
    """
    binds = {target: str(bind.source) for target, bind in plan.shared().items()}
    found: dict[str, bool] = {}
    for target, source in binds.items():
        if Path(source).is_dir():
            found |= masks.inside(source, target, plan.masked)
    for path in host_sockets.inside(binds):
        if not any(folder and masks.within(path, above) for above, folder in found.items()):
            found[path] = False
    return {
        path: folder
        for path, folder in sorted(found.items())
        if path not in binds and _shown(path, binds)
    }


def _shown(path: str, binds: Mapping[str, str]) -> bool:
    """Whether it is there to be covered: not below another bind, which would get an empty file."""
    return os.path.lexists(_on_host(path, binds))


def _on_host(path: str, binds: Mapping[str, str]) -> str:
    """Where a path that lies in a bind is outside."""
    target = max((target for target in binds if masks.within(path, target)), key=len)
    return f"{binds[target]}{path[len(target) :]}"


def single(plan: Plan, protected: Iterable[str]) -> set[str]:
    """Of what is mounted for the agent to see or not to change: what is a file, as it sees it."""
    binds = {target: str(bind.source) for target, bind in plan.shared().items()}
    return {path for path in (*binds, *protected) if not Path(_on_host(path, binds)).is_dir()}


def protected(plan: Plan) -> list[str]:
    """Those of ``plan.protected`` that exist and lie inside a writable bind.

    What does not exist cannot be mounted over without making it in the user's workspace; a link
    is left out because a mount would land on what it points to.  Raises UsageError for a link that
    leads to what the launch itself reads or writes: the agent could lead it elsewhere.
    """
    found = []
    for target, bind in plan.writable().items():
        for path in plan.protected:
            if not Path(path).is_relative_to(target) or path == target:
                continue
            inside = f"{str(bind.source).rstrip('/')}/{Path(path).relative_to(target)}"
            if masks.resolve("", inside) == inside and os.path.lexists(inside):
                found.append(path)
    for path in plan.own:
        if path not in found:
            raise UsageError(
                f"{path}: a symbolic link leads there, where the agent can change it",
                hint="name the file itself, or one outside of what the agent may write",
            )
    return sorted(set(found))
