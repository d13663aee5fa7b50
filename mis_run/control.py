"""The control socket of a live run: one JSON request, one JSON answer, root only.

``mis top``, ``mis kill``, ``mis inspect`` and ``mis defcon`` talk to the supervisor through it.
A malformed request gets an answer with ``error``; nothing a client sends can end the supervisor.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mis_run.errors import MisError, NotFound
from mis_run.hints import Any
from mis_run.supervise import Loop

LIMIT = 64 << 10  # bytes of one message
MOST = 16  # clients at once; more wait in the listen queue
Handler = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@contextmanager
def serve(loop: Loop, path: Path, handle: Handler) -> Iterator[None]:
    """Answer requests on ``path`` from inside ``loop``; MisErrors become ``error`` answers."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(MOST)
    clients: dict[int, socket.socket] = {}

    def accept() -> None:
        try:
            client, _ = listener.accept()
        except OSError:  # gone again before we came to it
            return
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("3i", credentials)
        if uid not in (0, os.getuid()) or len(clients) >= MOST:
            client.close()
            return
        client.setblocking(False)
        clients[client.fileno()] = client
        loop.add(client.fileno(), lambda: _answer(client))

    def _answer(client: socket.socket) -> None:
        try:
            request = client.recv(LIMIT)
            if request:
                client.send(json.dumps(_reply(handle, request), default=str).encode())
        except OSError:  # the client went away: its loss only
            pass
        finally:
            loop.remove(client.fileno())
            del clients[client.fileno()]
            client.close()

    loop.add(listener.fileno(), accept)
    try:
        yield
    finally:
        loop.remove(listener.fileno())
        for client in clients.values():
            loop.remove(client.fileno())
            client.close()
        listener.close()
        path.unlink(missing_ok=True)


def _reply(handle: Handler, raw: bytes) -> Mapping[str, Any]:
    try:
        request = json.loads(raw)
        if not isinstance(request, dict) or not isinstance(request.get("do"), str):
            return {"error": 'a request is an object with "do"'}
        return handle(request)
    except (ValueError, RecursionError):
        return {"error": "not JSON"}
    except MisError as error:
        return {"error": error.message, "hint": error.hint}


def ask(run: Path, timeout: float = 5.0, **request: Any) -> dict[str, Any]:
    """One request to a run's supervisor. Raises NotFound when it does not answer in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(timeout)
        try:
            client.connect(str(run / "control.sock"))
            client.send(json.dumps(request).encode())
            answer = json.loads(client.recv(LIMIT * 4))
        except (OSError, ValueError) as error:
            raise NotFound(
                f"run {run.name} does not answer: {error}", hint="mis gc; mis ps"
            ) from error
    if not isinstance(answer, dict):
        raise NotFound(f"run {run.name} gave no sensible answer")
    if "error" in answer:
        raise MisError(str(answer["error"]), hint=str(answer.get("hint", "")))
    return answer


def answers(path: Path) -> bool:
    """Whether the run in this directory has a supervisor that listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path / "control.sock"))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            return True  # others wait in line already: somebody listens, if slowly
    return True
