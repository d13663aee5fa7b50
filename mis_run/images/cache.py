"""Unpacked layers, each once, by the digest of its tar: ``/var/cache/mis``, root's only.

    layers/HEX/tree        a layer that is complete and has the digest HEX
    layers/HEX/facts.json  how much it is
    images/HEX.json        a chain of layers: its users, what it was called, when it was last used
    partial/               what is being made or removed; anything there without the lock is rubbish

A layer appears by rename(2), after its digest was seen and its data is on the disk; so what an
interrupted launch left is never taken for one.  Two locks: ``fill`` is held while something is
made or removed, ``use`` while a launch takes layers (shared) or some are taken away (exclusive).
What a run uses it says by links in its state directory, which is there as long as anything of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mis_run import locks, state
from mis_run.errors import MissingGuarantee, SetupError
from mis_run.hints import Any
from mis_run.images import layer, layout, merged
from mis_run.images.accounts import Accounts
from mis_run.linux import libc
from mis_run.model import Image

DEFAULT = Path("/var/cache/mis")
LINKS = "layers"  # folder of a run's state directory: N → layers/HEX/tree

_syncfs = libc.function("syncfs", ctypes.c_int)


def place() -> Path:
    """The cache's folder: ``$MIS_CACHE``, else the default."""
    return Path(os.environ.get("MIS_CACHE") or DEFAULT).absolute()


def tree(digest: str) -> Path:
    """Where a layer is unpacked, if it is."""
    return place() / "layers" / _hex(digest) / "tree"


def _hex(digest: str) -> str:
    return digest.partition(":")[2]


def _record(image: Image) -> Path:
    """Named by the chain of layers: images that differ in their words only share it."""
    chain = hashlib.sha256("\n".join(image.layers).encode()).hexdigest()
    return place() / "images" / f"{chain}.json"


def accounts(image: Image) -> Accounts | None:
    """The image's users, None unless the whole image is here."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads(_record(image).read_text())
        if all(tree(digest).is_dir() for digest in image.layers):
            return Accounts(str(facts["passwd"]), str(facts["group"]))
    return None


def touch(image: Image) -> None:
    """Note that the image was used now, and under which name."""
    path = _record(image)
    with using():
        if facts := _facts(path):
            _write(path, facts | {"name": image.name, "digest": image.digest})


def _write(path: Path, facts: dict[str, Any]) -> None:
    part = path.with_name(f".{path.stem}.{os.getpid()}")
    part.write_text(json.dumps(facts))
    part.replace(path)


def _facts(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def prepare() -> None:
    """Make the cache's folders. Raises SetupError where others could write there, MissingGuarantee
    for others than root."""
    if os.geteuid():
        raise MissingGuarantee("the cache of images is root's", hint="sudo …")
    top = place()
    try:
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = top.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise SetupError(
                f"{top}: the cache of images must be a folder of root's alone (mode 0700)",
                hint=f"look who made it, then: rm -r {top}",
            )
        for name in ("layers", "images", "partial"):
            (top / name).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"{top}: {error.strerror}", hint="run as root; MIS_CACHE=FOLDER names another cache"
        ) from error


@contextmanager
def filling() -> Iterator[Path]:
    """Hold the lock for making or removing; an empty folder to do it in."""
    prepare()
    partial = place() / "partial"
    with locks.Exclusive(place() / "fill.lock", os.O_CREAT | os.O_RDWR):
        _empty(partial)
        _try_whiteout(partial)
        try:
            yield partial
        finally:
            _empty(partial)


def _try_whiteout(folder: Path) -> None:
    """See that what a layer removes can be said here. Raises SetupError."""
    probe = folder / "whiteout"
    try:
        os.mknod(probe, stat.S_IFCHR, os.makedev(0, 0))
    except OSError as error:  # an overlay does not lend out its own signs (ovl_mknod)
        raise SetupError(
            f"{place()}: layers cannot be kept on this file system: {error.strerror}",
            hint="MIS_CACHE=FOLDER on ext4, xfs, btrfs or a tmpfs; inside a container, on a volume",
        ) from error
    probe.unlink()


def _empty(folder: Path) -> None:
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink(missing_ok=True)


@contextmanager
def using(*, exclusive: bool = False) -> Iterator[None]:
    """Hold the lock of layers in use; short."""
    with (place() / "use.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


def fill(found: layout.Found, partial: Path) -> Accounts:
    """Unpack what is missing of an image, and read its users. Needs the lock of `filling`.

    Raises SetupError; layers that were complete by then stay.
    """
    for one in found.layers:
        target = tree(one.diff).parent
        if target.is_dir():
            continue
        new = partial / "layer"
        (new / "tree").mkdir(parents=True)
        try:
            facts = layer.unpack(found.blobs, one, new / "tree")
        except SetupError as error:
            raise SetupError(error.message, hint=_hint(error.message)) from error
        (new / "facts.json").write_text(json.dumps(facts))
        _sync(new)
        new.rename(target)
    image = found.image
    users = merged.accounts(image.name, stack(image, partial / "stack"), partial / "view")
    whole = {"layers": image.layers, "passwd": users.passwd, "group": users.group}
    _write(_record(image), {**whole, "name": image.name, "digest": image.digest})
    return users


def _hint(message: str) -> str:
    if "Operation not permitted" in message or "not supported" in message:
        # Whiteouts and trusted.* attributes: not on overlayfs, nor on network file systems.
        return "the cache must be on ext4, xfs, btrfs or tmpfs: MIS_CACHE=FOLDER"
    if "stay free" in message or "No space" in message:
        return "mis image prune; or MIS_CACHE=FOLDER on a larger disk"
    return "the image is damaged or was made to deceive: get it again"


def _sync(folder: Path) -> None:
    """Data before name: a power failure must not leave a complete name with empty files."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _syncfs(fd)
    finally:
        os.close(fd)


def stack(image: Image, folder: Path) -> list[Path]:
    """Links to the image's layers in ``folder``, uppermost first, as overlayfs wants them.

    Short names: all of them have to fit into the one page of mount(2)'s options.
    """
    folder.mkdir(mode=0o700)
    found = []
    for number, digest in enumerate(reversed(image.layers)):
        link = folder / str(number)
        link.symlink_to(tree(digest))
        found.append(link)
    return found


def take(image: Image, run_dir: Path) -> list[Path]:
    """`stack` for a run: what it names is not removed while the run's directory is there.

    Raises SetupError when the image was removed since it was looked up.
    """
    with using():
        found = stack(image, run_dir / LINKS)
        if not all(link.is_dir() for link in found):
            raise SetupError(
                f"image {image.name} was removed from the cache meanwhile", hint="start again"
            )
    return found


def in_use() -> set[str]:
    """Digests (hex) of layers that a run names, live or not yet collected."""
    found = set()
    for path in state.run_dirs():
        with suppress(OSError):  # it has none, or ended meanwhile
            found |= {link.readlink().parent.name for link in (path / LINKS).iterdir()}
    return found


def listing() -> list[dict[str, Any]]:
    """Images that are here: name, digest, bytes, seconds since their last use, layers."""
    found = []
    for path in sorted((place() / "images").glob("*.json")):
        facts = _facts(path)
        layers = [str(one) for one in facts.get("layers", ())]
        sizes = [_facts(tree(one).with_name("facts.json")).get("size", 0) for one in layers]
        found.append(
            {
                "name": facts.get("name", ""),
                "digest": facts.get("digest", ""),
                "bytes": sum(sizes),
                "idle": round(time.time() - path.stat().st_mtime, 1),
                "layers": layers,
                "in_use": bool({_hex(one) for one in layers} & in_use()),
            }
        )
    return found


def prune(idle: float = 0.0) -> dict[str, list[str]]:
    """Remove images not used for ``idle`` seconds, and layers that no image has; what was removed.

    Layers of runs that live stay.
    """
    removed: dict[str, list[str]] = {"images": [], "layers": []}
    if not place().is_dir():
        return removed
    with filling() as partial, using(exclusive=True):
        kept = in_use()
        for path in list((place() / "images").iterdir()):
            facts = _facts(path) if path.suffix == ".json" else {}  # or a launch was interrupted
            layers = {_hex(str(one)) for one in facts.get("layers", ())}
            busy = bool(layers) and layers <= kept
            if busy or (facts and time.time() - path.stat().st_mtime < idle):
                kept |= layers
                continue
            path.unlink()
            if facts:
                removed["images"].append(str(facts.get("name") or path.stem))
        for path in list((place() / "layers").iterdir()):
            if path.name not in kept:
                path.rename(partial / path.name)
                removed["layers"].append(path.name)
    return removed
