"""Frames that must not get through: made by hand, sent inside an agent's network namespace."""

from __future__ import annotations

import socket
import struct
import threading

from mis_run import rules
from mis_run.errors import VerifyError
from mis_run.linux import libc


def canaries(sources: tuple[str, str]) -> list[bytes]:
    """A UDP frame to each canary, as the agent would send it."""
    payload = struct.pack("!4H", 9, 9, 8, 0)
    four = struct.pack(
        "!BBHHHBBH4s4s",
        *(0x45, 0, 20 + len(payload), 0, 0, 64, 17, 0),
        *(socket.inet_aton(sources[0]), socket.inet_aton(rules.CANARY4)),
    )
    six = struct.pack(
        "!IHBB16s16s",
        *(0x60000000, len(payload), 17, 64),
        *(
            socket.inet_pton(socket.AF_INET6, sources[1]),
            socket.inet_pton(socket.AF_INET6, rules.CANARY6),
        ),
    )
    ethernet = b"\x02" * 12
    return [ethernet + b"\x08\x00" + four + payload, ethernet + b"\x86\xdd" + six + payload]


def inject(netns: int, frames: list[bytes]) -> None:
    """Send raw frames on ``eth0`` of a network namespace, around every socket hook.

    From a thread of its own: setns(2) moves only the calling thread.  It goes on alone to close the
    socket, for which the kernel waits 10 ms (packet_release, synchronize_net).  Raises VerifyError.
    """
    failed: list[OSError] = []
    sent = threading.Event()

    def body() -> None:
        try:
            libc.setns(netns, libc.CLONE_NEWNET)
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
                out.bind(("eth0", 0))
                for frame in frames:
                    out.send(frame)
                sent.set()
        except OSError as error:
            failed.append(error)
        finally:
            sent.set()

    threading.Thread(target=body).start()
    sent.wait()
    if failed:
        raise VerifyError(f"cannot send a test frame: {failed[0]}")
