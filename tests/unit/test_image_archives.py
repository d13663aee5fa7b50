"""Members of an archive are read at positions of their own, whoever else reads them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from mis_run.images import blobs

PARTS = {name: os.urandom(size) for name, size in (("a", 700), ("b", 30_000), ("c", 900))}


def test_another_process_moves_nothing(tmp_path: Path) -> None:
    """Each part is read in a forked process, as layers are; the next one reads its own bytes."""
    with tarfile.open(tmp_path / "saved.tar", "w") as tar:
        for name, data in PARTS.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with blobs.archive(tmp_path / "saved.tar") as archive:
        assert archive.open("a").read() == PARTS["a"]  # what follows it may be buffered
        for name in ("c", "b", "a"):
            with archive.open(name) as part:
                pid = os.fork()
                if pid == 0:
                    same = part.read() == PARTS[name] and part.seek(0) == 0
                    os._exit(0 if same and part.read(4) == PARTS[name][:4] else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, name
