"""Every way mis-run itself can fail: one class, one exit code each.

The agent's own exit code passes through unchanged (128 + n for a signal), as ``docker run``
and ``bwrap`` do.  Our codes sit where shells and ``docker run`` put theirs (2 for usage,
120-127 for the launcher); docs/exit-codes.md is checked against this table by a test.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's: a container runtime imports this on every call
if TYPE_CHECKING:
    from collections.abc import Iterable


class MisError(Exception):
    """A failure with a message for a person and, where one exists, the next command to try."""

    exit_code = 125

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MisError):
    """The words on the command line or in a profile are wrong."""

    exit_code = 2


class ProfileError(UsageError):
    """A profile cannot be used; the message names file, line and key."""


class MissingGuarantee(MisError):
    """The profile requires a guarantee that this host cannot give; nothing was created."""

    exit_code = 120


class SetupError(MisError):
    """A step of the launch failed; everything made so far was undone."""

    exit_code = 121


class VerifyError(MisError):
    """A guard was attached but its denial was not seen; the agent was not started."""

    exit_code = 122


class GuardLost(MisError):
    """A guard or the watchdog failed while the agent ran, and the run was closed."""

    exit_code = 123


class TimedOut(MisError):
    """The agent ran longer than --timeout and was ended (the code that timeout(1) uses)."""

    exit_code = 124


class NotExecutable(MisError):
    """The command was found in the container but could not be executed."""

    exit_code = 126


class NotFound(MisError):
    """The command, run, profile or image does not exist."""

    exit_code = 127


class Emergency(MisError):
    """DEFCON 1: the agent was killed because its violations added up."""

    exit_code = 119


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    import difflib  # late: most words are right

    return next(iter(difflib.get_close_matches(word, [one for one in known if one], 1)), None)
