"""An agent's words (paths, names) where a person reads or pastes them: no control character reaches
a terminal; quotes, wildcards and line ends do not become part of a rule.  Pure."""

from __future__ import annotations

import re

PATTERN_SIGNS = re.compile(r"[*?[#$@~]")
UNDECODABLE = re.compile("[\ud800-\udfff]")  # a byte that is no UTF-8, as os.fsdecode shows it


def printable(text: object) -> str:
    """One line without control characters: each is shown by its number, as in Python."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in str(text)
    )


def toml(text: str) -> str:
    """A basic string of TOML 1.0, quotes included, that reads back as ``text``.

    What is no Unicode becomes the replacement character: TOML cannot say it.
    """
    return '"' + "".join(map(_escaped, UNDECODABLE.sub("\ufffd", text))) + '"'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def pattern(path: str) -> str:
    """The pattern of a profile that names this path and no other.

    A byte that no pattern can name becomes ``?``, any one character.
    """
    return UNDECODABLE.sub("?", PATTERN_SIGNS.sub(r"[\g<0>]", path))
