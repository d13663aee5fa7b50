"""The user-notification side of seccomp(2): receive a caught call, answer it, see if it lives.

Facts: seccomp(2), seccomp_unotify(2), include/uapi/linux/seccomp.h of Linux 6.18.  Out of scope:
building filters (the OCI runtime does that) and deciding about calls (`guards.escape`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
from functools import cache

from mis_run.dataclass import dataclass
from mis_run.linux import abi

GET_ACTION_AVAIL = 2  # operations of seccomp(2)
GET_NOTIF_SIZES = 3
RET_USER_NOTIF = 0x7FC00000
FLAG_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE, Linux 5.5
FLAG_NEW_LISTENER = 8  # SECCOMP_FILTER_FLAG_NEW_LISTENER

_NOTIF = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif with its seccomp_data
_RESP = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_ID = struct.Struct("=Q")


def _ioctl(direction: int, number: int, size: int) -> int:
    """The request number that _IOC() of asm-generic/ioctl.h makes with magic ``!``."""
    return direction << 30 | size << 16 | ord("!") << 8 | number


# The size inside the request is that of the structure as first published; the kernel keeps
# accepting it when the structure grows, and GET_NOTIF_SIZES tells how much it then writes.
_RECV = _ioctl(3, 0, _NOTIF.size)
_SEND = _ioctl(3, 1, _RESP.size)
_ID_VALID = _ioctl(1, 2, _ID.size)


@dataclass(frozen=True)
class Notification:
    """One call waiting for its answer.

    ``id`` names it for the answer, ``thread`` is the caller's thread id as *we* see it (0 when it
    is outside our pid namespace), ``args`` the six argument registers, 64 bits each.  Registers
    cannot change while the call waits; whatever they point to can, so nothing here reads it.
    """

    id: int
    thread: int
    number: int
    arch: int
    pointer: int  # instruction pointer
    args: tuple[int, int, int, int, int, int]


def parse(data: bytes) -> Notification | None:
    """The notification in ``data``; None when it is too short or empty (id and pid zero)."""
    if len(data) < _NOTIF.size:
        return None
    ident, thread, _flags, number, arch, pointer, *args = _NOTIF.unpack_from(data)
    if not any(data):
        return None
    first, second, third, fourth, fifth, sixth = args
    return Notification(
        ident, thread, number, arch, pointer, (first, second, third, fourth, fifth, sixth)
    )


@cache
def sizes() -> tuple[int, int]:
    """Bytes that this kernel writes per notification and reads per answer.

    Raises OSError: ENOSYS without seccomp, EINVAL before Linux 5.0, EPERM inside a sandbox that
    forbids seccomp(2).
    """
    found = (ctypes.c_uint16 * 3)()  # notif, notif_resp, data
    _seccomp(GET_NOTIF_SIZES, found)
    return found[0], found[1]


def available(action: int) -> bool:
    """Whether filters may return ``action`` (SECCOMP_GET_ACTION_AVAIL). Raises OSError as above."""
    try:
        _seccomp(GET_ACTION_AVAIL, ctypes.c_uint32(action))
    except OSError as problem:
        if problem.errno == errno.EOPNOTSUPP:
            return False
        raise
    return True


def state(listener: int) -> tuple[bool, bool]:
    """(a receive would find a notification, no process uses the filter any more).

    The second is POLLHUP, Linux 5.8 and later: nothing will ever come again.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    what = sum(bits for _, bits in poll.poll(0))
    return bool(what & select.POLLIN), bool(what & select.POLLHUP)


def receive(listener: int) -> Notification | None:
    """Take the next notification; call only after `state` said yes, because this blocks.

    None when its caller died in between (ENOENT) or a signal came (EINTR).  One reader per
    listener: with two, the slower one would block here.  Raises OSError otherwise.
    """
    buffer = bytearray(max(sizes()[0], _NOTIF.size))  # must be zeroed, else EINVAL
    try:
        fcntl.ioctl(listener, _RECV, buffer)
    except OSError as problem:
        if problem.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    return parse(bytes(buffer))


def deny(listener: int, ident: int, error: int) -> bool:
    """Make call ``ident`` fail with ``error``; False when nobody waits for it any more."""
    return _send(listener, ident, -error, 0)


def proceed(listener: int, ident: int) -> bool:
    """Let the kernel run call ``ident`` as its registers say; False when nobody waits for it.

    Only for decisions made from registers alone: memory may have changed since
    (seccomp_unotify(2), "Caveats regarding the use of SECCOMP_USER_NOTIF_FLAG_CONTINUE").
    """
    return _send(listener, ident, 0, FLAG_CONTINUE)


def alive(listener: int, ident: int) -> bool:
    """Whether call ``ident`` still waits, so that what /proc said of its thread was about it."""
    try:
        fcntl.ioctl(listener, _ID_VALID, _ID.pack(ident))
    except OSError as problem:
        if problem.errno == errno.ENOENT:
            return False
        raise
    return True


def _send(listener: int, ident: int, error: int, flags: int) -> bool:
    try:
        fcntl.ioctl(listener, _SEND, _RESP.pack(ident, 0, error, flags))
    except OSError as problem:
        # ENOENT: the caller died or was interrupted. EINPROGRESS: it was answered already.
        if problem.errno in (errno.ENOENT, errno.EINPROGRESS):
            return False
        raise
    return True


def _seccomp(operation: int, argument: ctypes.c_uint32 | ctypes.Array[ctypes.c_uint16]) -> int:
    """seccomp(operation, 0, &argument); raises OSError named after the call."""
    result: int = _libc().syscall(
        ctypes.c_long(abi.number("seccomp")),
        ctypes.c_uint(operation),
        ctypes.c_uint(0),
        ctypes.byref(argument),
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp(operation {operation}): {os.strerror(number)}")
    return result


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library
