"""The agent's root: the host's (or ``--rootfs``) read-only, under a layer that is thrown away.

All mounts are made in a mount namespace of the supervisor's own (`isolate`), so they are invisible
to the host and end with the last process that uses them, even after a SIGKILL.
Out of scope: what is mounted inside the container (`bundle`).
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mis_run.errors import SetupError
from mis_run.linux import libc
from mis_run.model import Finding, Host, Plan

# File systems that hold programs and data; the rest (proc, sysfs, bpf …) is the container's own.
REAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "squashfs"})
REAL |= {"erofs", "virtiofs", "9p", "nfs4", "bcachefs"}
USABLE = ("/usr", "/opt", "/nix", "/gnu", "/snap", "/bin", "/sbin", "/lib", "/lib64", "/var/lib")
DEFAULT_LAYER = 1 << 30  # bytes of the throw-away layer when the profile gives no size


def supported() -> Finding:
    """Whether this kernel has overlayfs; whether a mount works is seen by the mount itself."""
    if "\toverlay\n" in Path("/proc/filesystems").read_text():
        return Finding(True, "overlay file system")
    # A module that is not loaded yet is listed nowhere; mount(2) loads it.
    if glob.glob(f"/lib/modules/{os.uname().release}/kernel/fs/overlayfs/overlay.ko*"):
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
            hint="inside a container, mis-run needs --privileged or CAP_SYS_ADMIN",
        ) from error


@contextmanager
def mount(plan: Plan, folder: Path) -> Iterator[Path]:
    """The merged root in ``folder``; unmounted on the way out. Raises SetupError."""
    layer, merged = folder / "layer", folder / "root"
    layer.mkdir()
    merged.mkdir()
    lower = plan.rootfs or Path("/")
    size = plan.limits.scratch or DEFAULT_LAYER
    try:
        libc.mount("tmpfs", str(layer), "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, f"size={size}")
    except OSError as error:
        raise SetupError(f"cannot mount the throw-away layer: {error.strerror}") from error
    try:
        (layer / "upper").mkdir(mode=0o755)
        (layer / "work").mkdir()
        data = f"lowerdir={_escape(lower)},upperdir={layer}/upper,workdir={layer}/work"
        try:
            libc.mount("overlay", str(merged), "overlay", libc.MS_NODEV, data)
        except OSError as error:
            raise SetupError(
                f"cannot lay an overlay over {lower}: {error.strerror}",
                hint="some file systems cannot be a lower layer: try --rootfs DIR on another one",
            ) from error
        try:
            yield merged
        finally:
            libc.umount(str(merged), libc.MNT_DETACH)
    finally:
        libc.umount(str(layer), libc.MNT_DETACH)


def _escape(path: Path) -> str:
    r"""Overlay's options split at ``,`` and ``:``; a backslash keeps them (overlayfs.rst)."""
    text = str(path)
    for character in ("\\", ",", ":"):
        text = text.replace(character, f"\\{character}")
    return text


def separate(host: Host) -> list[str]:
    """Host file systems that an overlay of ``/`` does not show, and that agents need."""
    return [
        point
        for point, kind in host.mounts
        if kind in REAL and any(Path(point).is_relative_to(usable) for usable in USABLE)
    ]


def hidden(root: Path, patterns: Sequence[str]) -> list[tuple[str, bool]]:
    """(path inside, is a folder) of everything under ``root`` that the patterns name.

    A symlink is not followed: what it points to has its own name, and is hidden by that.
    Entries below an already hidden folder are left out.
    """
    found: dict[str, bool] = {}
    for pattern in patterns:
        # `dir/**` hides the folder itself.
        pattern = pattern.removesuffix("/**").removesuffix("/*").rstrip("/")
        if not pattern.startswith("/"):
            continue
        for match in glob.iglob(f"{root}{pattern}", recursive=False, include_hidden=True):
            mode = os.lstat(match).st_mode
            inside = match[len(str(root)) :]
            if stat.S_ISDIR(mode):
                found[inside] = True
            elif stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
                found[inside] = False
    return [
        (path, is_folder)
        for path, is_folder in sorted(found.items())
        if not any(found.get(str(parent)) for parent in Path(path).parents)
    ]
