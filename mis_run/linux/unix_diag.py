"""The UNIX sockets of this network namespace that have a place in a file system (sock_diag(7))."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
NLMSG_ERROR, NLMSG_DONE, NLM_F_REQUEST, NLM_F_DUMP = 2, 3, 0x1, 0x300
SHOW_NAME, SHOW_VFS = 0x1, 0x2
UNIX_DIAG_NAME, UNIX_DIAG_VFS = 0, 1
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
REQUEST = struct.Struct("=BBHIIIII")  # struct unix_diag_req
MESSAGE = struct.Struct("=BBBBIII")  # struct unix_diag_msg
ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
VFS = struct.Struct("=II")  # struct unix_diag_vfs: the lower half of the inode number, device
MINOR = 20  # bits, in the kernel's own dev_t (linux/kdev_t.h)

Place = tuple[int, int]  # device as in os.stat, the lower 32 bits of the inode number


def bound() -> dict[Place, str]:
    """Each bound socket's place and the name it was bound to, which may be relative, or another
    mount namespace's. Raises OSError where the kernel has no unix_diag."""
    found = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        ask = REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, SHOW_NAME | SHOW_VFS, 0, 0)
        size = HEADER.size + len(ask)
        head = HEADER.pack(size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
        netlink.send(head + ask)
        for body in _messages(netlink):
            words = dict(_attributes(body[MESSAGE.size :]))
            if (vfs := words.get(UNIX_DIAG_VFS)) and (name := words.get(UNIX_DIAG_NAME)):
                inode, device = VFS.unpack(vfs)
                number = os.makedev(device >> MINOR, device & (1 << MINOR) - 1)
                found[number, inode] = os.fsdecode(name.rstrip(b"\0"))
    return found


def _messages(netlink: socket.socket) -> Iterator[bytes]:
    """The bodies of all messages of a dump."""
    while True:
        data = netlink.recv(1 << 16)
        while data:
            size, kind, *_ = HEADER.unpack_from(data)
            body = data[HEADER.size : size]
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, f"unix_diag: {os.strerror(number)}")
            yield body
            data = data[(size + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= ATTRIBUTE.size:
        size, kind = ATTRIBUTE.unpack_from(data)
        if size < ATTRIBUTE.size:  # padding
            return
        yield kind, data[ATTRIBUTE.size : size]
        data = data[(size + 3) & ~3 :]
