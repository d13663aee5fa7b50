"""What touches hostile bytes runs aside: in a process of its own, with bounded memory, that ends
with us.  It may change its root directory and namespaces; only JSON comes back."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from mis_run.errors import SetupError
from mis_run.hints import Any
from mis_run.images.blobs import UNREADABLE
from mis_run.images.unpack import Refused
from mis_run.linux import libc

MEMORY = 1 << 30  # bytes of address space beyond what the process has when it starts


def run(what: str, body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``body`` returned in the other process. Raises SetupError, beginning with ``what``."""
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            answer = _guarded(parent, body)
            with os.fdopen(writer, "w") as out:
                json.dump(answer, out)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as results:
            text = results.read()
    except BaseException:  # Ctrl-C: it must not go on alone
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise SetupError(f"{what}: its process ended with {code}", hint="dmesg | tail")
    found: dict[str, Any] = json.loads(text)
    if "error" in found:
        raise SetupError(f"{what}: {found['error']}")
    return found


def _guarded(parent: int, body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that was set
        os._exit(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        return body()
    except Refused as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error.strerror or error}{_where(error)}"}
    except UNREADABLE as error:
        return {"error": f"cannot be read ({type(error).__name__}: {error!s:.200})"}


def _where(error: OSError) -> str:
    return f": {error.filename!s:.200}" if error.filename else ""
