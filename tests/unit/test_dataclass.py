"""Our dataclasses behave as the standard ones of the same source do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from mis_run import dataclass as ours
from mis_run import model

MODULES = (dataclasses, ours)


def classes(module: Any) -> tuple[Any, Any, Any]:
    """The same three classes by either module."""

    @module.dataclass(frozen=True)
    class Point:
        x: int
        y: int = 2
        seen: list[int] = module.field(default_factory=list, compare=False)

    @module.dataclass(frozen=True, kw_only=True)
    class Named:
        name: str = "n"
        size: int

    @module.dataclass
    class Open:
        value: int = 0

    return Point, Named, Open


def outcome(act: Callable[[], Any]) -> Any:
    """What an act gives: a value's text, or the kind of its error."""
    try:
        return repr(act())
    except (TypeError, AttributeError) as error:
        return AttributeError if isinstance(error, AttributeError) else type(error)


ACTS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "positional": lambda m, p, n, o: p(1),
    "mixed": lambda m, p, n, o: p(1, y=3),
    "all": lambda m, p, n, o: p(1, 2, [3]),
    "too many": lambda m, p, n, o: p(1, 2, [3], 4),
    "twice": lambda m, p, n, o: p(1, x=1),
    "missing": lambda m, p, n, o: p(y=1),
    "unknown": lambda m, p, n, o: p(1, z=1),
    "none at all": lambda m, p, n, o: p(),
    "keywords": lambda m, p, n, o: n(size=1),
    "keywords only": lambda m, p, n, o: n("a", 1),
    "default": lambda m, p, n, o: o(),
    "equal": lambda m, p, n, o: p(1, 2) == p(1),
    "unequal": lambda m, p, n, o: p(1, 2) == p(2),
    "not compared": lambda m, p, n, o: p(1, 2, [1]) == p(1, 2, [2]),
    "other class": lambda m, p, n, o: o(1) == p(1),
    "hash": lambda m, p, n, o: hash(p(1, 2, [1])) == hash(p(1)),
    "no hash": lambda m, p, n, o: hash(o()),
    "frozen": lambda m, p, n, o: setattr(p(1), "x", 2),
    "frozen delete": lambda m, p, n, o: delattr(p(1), "x"),
    "set": lambda m, p, n, o: setattr(o(), "value", 2),
    "replace": lambda m, p, n, o: m.replace(p(1, 2, [3]), y=9),
    "replace unknown": lambda m, p, n, o: m.replace(p(1), z=9),
    "own list": lambda m, p, n, o: p(1).seen is p(1).seen,
    "fields": lambda m, p, n, o: [f.name for f in m.fields(p)],
    "defaults": lambda m, p, n, o: [f.default is m.MISSING for f in m.fields(p(1))],
    "is": lambda m, p, n, o: (m.is_dataclass(p), m.is_dataclass(p(1)), m.is_dataclass(1)),
    "class attribute": lambda m, p, n, o: p.y,
    "no class attribute": lambda m, p, n, o: p.seen,
}


@pytest.mark.parametrize("name", ACTS)
def test_as_the_standard_library(name: str) -> None:
    """Every act gives what it gives there, the same kind of error included."""
    real, light = (outcome(lambda m=m: ACTS[name](m, *classes(m))) for m in MODULES)  # type: ignore[misc]
    assert light == real


def test_ours_are_light() -> None:
    """The control: what the package uses is not the standard library's."""
    assert not dataclasses.is_dataclass(model.Options)
    assert ours.is_dataclass(model.Options)
