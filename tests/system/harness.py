"""What system tests share: start mis-run as a person would, and a test host to talk to."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIS_RUN = (sys.executable, "-I", "-m", "mis_run")
MIS = (sys.executable, "-I", "-c", "from mis_run.__main__ import mis; mis()")

HOST4, HOST6 = "198.18.77.2", "2001:db8:77::2"
"""The test host: RFC 2544 and RFC 3849 addresses, in a namespace of our own."""
PACE = 5 if os.environ.get("MIS_VM") else 1
"""How much more time everything gets: an emulated machine is late without being lost."""
PORT, OTHER_PORT = 7001, 7002


@dataclass(frozen=True)
class Done:
    """A finished mis-run: its exit code, its output, and its record's events."""

    code: int
    out: str
    err: str
    events: list[dict[str, Any]]

    def denied(self, kind: str = "") -> list[dict[str, Any]]:
        """Violations whose kind starts with ``kind``."""
        return [
            event
            for event in self.events
            if event.get("verdict") in ("deny", "audit", "kill") and event["kind"].startswith(kind)
        ]


def run(
    *words: str | Path,
    cwd: Path,
    options: tuple[str, ...] = (),
    timeout: float = 60,
    input: str | None = None,
    env: dict[str, str] | None = None,
) -> Done:
    """``mis-run OPTIONS -- WORDS`` in ``cwd``, waited for, with its record read."""
    log = cwd.parent / f"record-{secrets.token_hex(4)}.jsonl"
    argv = [*MIS_RUN, "--log", str(log), *_paced(options, cwd), "--", *map(str, words)]
    done = subprocess.run(
        argv,
        cwd=cwd,
        input=input if input is not None else "",
        capture_output=True,
        text=True,
        timeout=timeout * PACE,
        check=False,
        env={**os.environ, **(env or {})},
    )
    events = []
    if log.exists():
        events = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
    return Done(done.returncode, done.stdout, done.stderr, events)


def start(*words: str, cwd: Path, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """mis-run in the background, its output captured."""
    argv = [*MIS_RUN, *_paced(options, cwd), "--", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _paced(options: tuple[str, ...], cwd: Path) -> tuple[str, ...]:
    """The options; in an emulated machine with a profile that waits longer for our own beats,
    unless theirs says itself how long."""
    if PACE == 1:
        return options
    words = list(options)
    at = words.index("--profile") if "--profile" in words else len(words)
    given = words[at + 1] if at < len(words) else "default"
    if "/" in given and "deadline" in Path(given).read_text():
        return options
    path = cwd.parent / f"paced-{secrets.token_hex(4)}.toml"
    path.write_text(f'extends = "{given}"\n[liveness]\ndeadline = "{PACE}s"\nbeat = "250ms"\n')
    return (*words[:at], "--profile", str(path), *words[at + 2 :])


def mis(*words: str) -> subprocess.CompletedProcess[str]:
    """``mis WORDS``."""
    return subprocess.run([*MIS, *words], capture_output=True, text=True, timeout=60, check=False)


def wait_for(condition: Any, timeout: float = 10) -> Any:
    """The first true value of ``condition()``; an AssertionError when none came in time."""
    end = time.monotonic() + timeout * PACE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"nothing came true within {timeout} s")


SERVER = """
import selectors, socket, sys
chosen = selectors.DefaultSelector()
for port in (7001, 7002, 53):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        chosen.register(sock, selectors.EVENT_READ, kind)
print("ready", flush=True)
while True:
    for key, _ in chosen.select():
        if key.data == socket.SOCK_DGRAM:
            data, peer = key.fileobj.recvfrom(2048)
            print("got", data[:40].decode("latin-1"), flush=True)
            key.fileobj.sendto(b"echo " + data, peer)
        else:
            client, peer = key.fileobj.accept()
            client.settimeout(2)
            try:
                data = client.recv(2048)
                print("got", data[:40].decode("latin-1"), flush=True)
                client.sendall(b"echo " + data)
            except OSError:
                pass
            client.close()
"""


@dataclass(frozen=True)
class TestHost:
    """A namespace with echo servers (TCP and UDP, ports 7001, 7002, 53) and what they got."""

    __test__ = False
    name: str
    log: Path

    def got(self) -> list[str]:
        """Every message that arrived at any of its servers."""
        return [line[4:] for line in self.log.read_text().splitlines() if line.startswith("got")]


def ip(*words: str) -> None:
    """One ``ip`` command that must succeed."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def host_elsewhere(folder: Path) -> Iterator[TestHost]:
    """A second host on its own link: HOST4/HOST6, reached through this machine's routing."""
    name = f"tst{secrets.token_hex(3)}"
    log = folder / f"{name}.log"
    ip("netns", "add", name)
    server = None
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", "198.18.77.1/24", "dev", name)
        ip("-6", "addr", "add", "2001:db8:77::1/64", "dev", name, "nodad")
        ip("link", "set", name, "up")
        inside = ("-n", name)
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "addr", "add", f"{HOST4}/24", "dev", "eth0")
        ip(*inside, "-6", "addr", "add", f"{HOST6}/64", "dev", "eth0", "nodad")
        ip(*inside, "link", "set", "eth0", "up")
        ip(*inside, "route", "add", "default", "via", "198.18.77.1")
        ip(*inside, "-6", "route", "add", "default", "via", "2001:db8:77::1")
        with log.open("w") as out:
            server = subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-I", "-u", "-c", SERVER], stdout=out
            )
        wait_for(lambda: "ready" in log.read_text())
        yield TestHost(name, log)
    finally:
        if server is not None:
            server.kill()
            server.wait()
        ip("netns", "del", name)
        subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
