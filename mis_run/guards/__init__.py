"""The guards. Each is attached by a context manager and then served by `follow`'s loop."""

from __future__ import annotations

from collections.abc import Callable

from mis_run.events import Event
from mis_run.hints import Protocol


class Guard(Protocol):
    """What the loop needs of a guard."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when there is something to answer or report."""

    def read(self) -> list[Event]:
        """Answer and report what is pending, a bounded part of it, without blocking."""

    def answers_late(self, delay: float) -> bool:
        """Whether its denials take ``delay`` seconds by themselves; else the agent is held."""

    def verify(self, probe: Callable[[str], int]) -> None:
        """Have a forbidden act tried and see it denied and counted. Raises VerifyError."""

    def beat(self, probe: Callable[[str], int]) -> None:
        """`verify` with one cheap act, again and again while the agent runs."""
