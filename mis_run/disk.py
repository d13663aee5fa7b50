"""Which disk a folder's reads and writes go to, as limits on them must name it.

The kernel throttles whole disks: a partition's number is ENODEV in ``io.max`` and in v1's
``blkio.throttle.*`` (blkg_conf_open_bdev, block/blk-cgroup.c), and so is that of a file system
without a disk of its own.  Out of scope: setting the limits (the OCI runtime does).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mis_run.errors import SetupError
from mis_run.linux import mountinfo

NUMBERS = Path("/sys/dev/block")
HINT = "a workspace on a disk (--workdir), a profile without io limits, or --allow-missing limits"


def of(folder: Path) -> str:
    """MAJOR:MINOR of the whole disk under ``folder``. Raises SetupError when there is none."""
    device = folder.stat().st_dev
    if not os.major(device):  # btrfs has numbers of its own, and tells its disk in the mount table
        device = _source(device)
    number = _number(device)
    entry = NUMBERS / number
    if not os.major(device) or not entry.exists():
        raise SetupError(
            f"limits io_read and io_write: {folder} lies on {_kind(folder)}, not on a disk, and "
            "what is read and written there cannot be limited",
            hint=HINT,
        )
    if (entry / "partition").exists():
        return (entry.resolve().parent / "dev").read_text().strip()
    return number


def _number(device: int) -> str:
    """As the kernel writes it."""
    return f"{os.major(device)}:{os.minor(device)}"


def _source(device: int) -> int:
    """The block device that the file system with this number was mounted from, 0 for none."""
    sources = [mount.source for mount in mountinfo.read() if mount.device == _number(device)]
    return next((found for source in sources if (found := block_device(source))), 0)


def block_device(name: str) -> int:
    """The number of the block device at a path, 0 if it is none."""
    try:
        facts = Path(name).stat()
    except OSError:
        return 0
    return facts.st_rdev if stat.S_ISBLK(facts.st_mode) else 0


def _kind(folder: Path) -> str:
    number = _number(folder.stat().st_dev)
    kinds = [mount.kind for mount in mountinfo.read() if mount.device == number]
    return kinds[-1] if kinds else "an unknown file system"
