"""Whether a file is a program that the dynamic loader would run: ``ld.so FILE``."""

from __future__ import annotations

import os
import struct

MAGIC = b"\x7fELF"
_ET_EXEC, _PT_INTERP = 2, 3
_MOST_HEADERS = 64


def is_program(fd: int) -> bool:
    """True for an ELF executable: of fixed address, or naming an interpreter (elf(5)).

    Libraries are not: code that an allowed program maps is that program's.  Doubt is True.
    """
    head = os.pread(fd, 64, 0)
    if not head.startswith(MAGIC):
        return False
    if len(head) < 52 or head[4] not in (1, 2) or head[5] not in (1, 2):
        return True
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    if struct.unpack_from(f"{order}H", head, 16)[0] == _ET_EXEC:
        return True
    offset = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", head, 32 if wide else 28)[0]
    if len(head) < 64 and wide:
        return True
    size, count = struct.unpack_from(f"{order}HH", head, 54 if wide else 42)
    if size < 4 or count > _MOST_HEADERS or offset > 1 << 40:
        return True
    table = os.pread(fd, size * count, offset)
    kinds = [
        struct.unpack_from(f"{order}I", table, at)[0]
        for at in range(0, len(table) - len(table) % size, size)
    ]
    return _PT_INTERP in kinds
