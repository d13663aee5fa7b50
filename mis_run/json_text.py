"""Small edits of a JSON text that leave every other byte as it is. Pure.

Only objects and their members: find them, put one in front, cut one out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]

from mis_run.dataclass import dataclass
from mis_run.errors import UsageError
from mis_run.hints import Any

SPACE = " \t\r\n"


@dataclass(frozen=True)
class Member:
    """One ``"name": value`` of a JSON object, and where it is in the text."""

    name: str
    value: Any
    start: int  # of the name's quote
    value_start: int
    end: int


def top(text: str) -> dict[str, Member]:
    """The members of the one object that the text is. Raises UsageError for other texts."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError("not a JSON object")
    return members(text, text.index("{"))


def members(text: str, at: int) -> dict[str, Member]:
    """The members of the object whose brace is at ``at``, in a text that is known to be JSON.

    Raises UsageError for a key that is there twice: which one counts would be a guess.
    """
    found: dict[str, Member] = {}
    for member in _scan(text, at):
        if member.name in found:
            raise UsageError(f"the key {member.name!r} is there twice", hint="remove one")
        found[member.name] = member
    return found


def _scan(text: str, at: int) -> Iterator[Member]:
    decoder = json.JSONDecoder()
    at = _skip(text, at + 1)
    while text[at] != "}":
        start = at
        name, at = scanstring(text, at + 1, True)
        value_start = _skip(text, _skip(text, at) + 1)
        value, at = decoder.raw_decode(text, value_start)
        yield Member(name, value, start, value_start, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while text[at] in SPACE:
        at += 1
    return at


def indent_of(text: str) -> str:
    """What the text indents its members with; four spaces where it does not say."""
    first = min((member.start for member in top(text).values()), default=None)
    line = text[:first].rpartition("\n")[2] if first is not None else ""
    return line if line and not line.strip() and "\n" in text[:first] else "    "


def put_first(text: str, at: int, new: Mapping[str, Any], depth: int) -> str:
    """The text with ``new`` as the first members of the object whose brace is at ``at``."""
    indent = indent_of(text)
    deep = indent * depth
    shown = (f'\n{deep}"{name}": {_dump(value, indent, deep)}' for name, value in new.items())
    end = "," if members(text, at) else f"\n{indent * (depth - 1)}"
    return text[: at + 1] + ",".join(shown) + end + text[at + 1 :]


def _dump(value: Any, indent: str, deep: str) -> str:
    return json.dumps(value, indent=indent).replace("\n", f"\n{deep}")


def cut(text: str, member: Member) -> str:
    """The text without one member, the space before it, and one comma."""
    start = member.start
    while text[start - 1] in SPACE:
        start -= 1
    end = _skip(text, member.end)
    if text[end] == ",":
        return text[:start] + text[end + 1 :]
    if text[start - 1] == ",":
        start -= 1
    return text[:start] + text[member.end :]
