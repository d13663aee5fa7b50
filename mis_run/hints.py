"""Names for annotations, which nobody evaluates: importing `typing` would take 3 ms of a launch.

Type checkers see typing's own (docs/decisions/start-up.md).
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import IO, Any, Generic, NoReturn, Protocol, TextIO, TypeVar
else:

    class Any:
        """Stands for each of them."""

        def __class_getitem__(cls, _: object) -> type:
            return cls

    IO = Generic = NoReturn = Protocol = TextIO = Any

    def TypeVar(name: str, *_: type) -> str:
        """A type variable's name."""
        return name


__all__ = [
    "IO",
    "TYPE_CHECKING",
    "Any",
    "Generic",
    "NoReturn",
    "Protocol",
    "TextIO",
    "TypeVar",
]
