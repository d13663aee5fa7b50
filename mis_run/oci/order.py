"""What passes between the call that makes a container and the supervisor that guards it."""

from __future__ import annotations

import socket
from pathlib import Path

from mis_run.dataclass import dataclass
from mis_run.hints import Any, Protocol
from mis_run.model import Profile
from mis_run.oci.operator import Operator
from mis_run.oci.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be guarded, and by which rules."""

    profile: Profile
    spec: Spec
    operator: Operator
    container: str  # the engine's id
    name: str | None  # of the run, for people
    root: str  # the OCI runtime's state directory, within which the container's id is unique
    runtime: Path  # which makes the container, and will be asked again
    sealed: bool  # whether its pid namespace is new, so that memory files can be sealed in it
    by_hook: bool = False  # the engine's own runtime makes it: only a hook's guards are possible

    @property
    def capabilities(self) -> list[str]:
        """More than these nobody executes in the container later."""
        return list(self.spec.at("process.capabilities.bounding", ()))


class Caller(Protocol):
    """The call of the runtime that is waiting for the supervisor."""

    def say(self, **words: Any) -> None:
        """Tell it something."""

    def pid(self) -> int:
        """Wait for the container's init, held before its first instruction."""


@dataclass(frozen=True)
class Place:
    """What is there before the container is made: its configuration names both."""

    listener: socket.socket  # where the OCI runtime sends seccomp-notify descriptors
    resolv_conf: Path  # empty until the supervisor knows what to write
    info: Path  # what the container is told about itself; has the canary


SOCKET = "seccomp.sock"
RESOLV_CONF = "resolv.conf"
INFO = "info"
CANARY = "canary"
