"""``[files]`` and ``[exec]`` as rules over paths, and the verdict on one path. Pure.

The most specific rule decides, wherever it was written (docs/profile-reference.md):

1. a pattern without wildcards that is this very path,
2. a floating one (it begins with ``**/``, ``/**/`` or without ``/``: ``**/.env``, ``*.pem``),
3. any other, by the number of characters before its first wildcard;

of equals a denial decides, and what no rule names is denied.  A pattern names what lies below it
as well.  Out of scope: which object a path is (`guards.file`), creation and removal (the mounts).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import IntEnum

from mis_run.dataclass import dataclass, field

WILD = re.compile(r"[*?[]")
EXACT, FLOATING, ANCHORED = 2, 1, 0


class Effect(IntEnum):
    """What a rule does; of equally specific ones the higher decides."""

    TAINT = 0  # in a set of rules of its own: it neither allows nor denies
    ALLOW = 1
    DENY = 2
    KILL = 3


@dataclass(frozen=True)
class Rule:
    """One pattern of a profile. ``text`` is what the user wrote, ``explicit`` whether that was
    this path itself (no set, no wildcard), ``sha256`` the content it is bound to."""

    pattern: str
    effect: Effect
    text: str
    explicit: bool = False
    sha256: str = ""


@dataclass(frozen=True)
class Verdict:
    """The rule that decided, None when no rule names the path (which denies it)."""

    rule: Rule | None

    @property
    def allowed(self) -> bool:
        """Whether the act may go on."""
        return self.rule is not None and self.rule.effect is Effect.ALLOW

    @property
    def kills(self) -> bool:
        """Whether the rule asks for the end of the agent."""
        return self.rule is not None and self.rule.effect is Effect.KILL

    @property
    def text(self) -> str:
        """The rule as the user wrote it, ``default`` without one."""
        return self.rule.text if self.rule else "default"


@dataclass
class Rules:
    """Rules of one right, ready to judge. Immutable after `compile_rules`.

    Regular expressions are texts: `re` compiles one, and keeps it, when a path first meets it.
    """

    under: dict[str, list[Rule]] = field(default_factory=dict)  # path without wildcards → rules
    wild: dict[str, list[tuple[str, Rule]]] = field(default_factory=dict)  # by folder
    floating: list[tuple[str, Rule]] = field(default_factory=list)
    _any_floating: str = ""

    def patterns(self) -> list[str]:
        """The patterns of all rules."""
        rules = [rule for found in self.under.values() for rule in found]
        rules += [rule for found in self.wild.values() for _, rule in found]
        return [rule.pattern for rule in (*rules, *(rule for _, rule in self.floating))]

    def judge(self, path: str) -> Verdict:
        """The verdict on an absolute, normalized path."""
        best: tuple[int, int, int] = (-1, 0, 0)
        decided: Rule | None = None

        def consider(tier: int, length: int, rule: Rule) -> None:
            nonlocal best, decided
            if (key := (tier, length, rule.effect)) > best:
                best, decided = key, rule

        place, exact = path, True
        while True:
            for rule in self.under.get(place, ()):
                consider(
                    EXACT if exact and _is_path(rule) else ANCHORED, _literal(rule.pattern), rule
                )
            for regex, rule in self.wild.get(place, ()):
                if re.fullmatch(regex, path):
                    consider(ANCHORED, _literal(rule.pattern), rule)
            if place == "/":
                break
            place, exact = place.rpartition("/")[0] or "/", False
        if self._any_floating and re.fullmatch(self._any_floating, path):
            for regex, rule in self.floating:
                if re.fullmatch(regex, path):
                    consider(FLOATING, len(rule.pattern), rule)
        return Verdict(decided)


def compile_rules(rules: Iterable[Rule]) -> Rules:
    """Rules ready to judge. Patterns are absolute, or floating; names are resolved before."""
    made = Rules()
    for rule in rules:
        if floats(rule.pattern):
            made.floating.append((anywhere(rule.pattern), rule))
        elif WILD.search(rule.pattern.removesuffix("/**")):
            folder = rule.pattern[: _literal(rule.pattern)].rpartition("/")[0] or "/"
            made.wild.setdefault(folder, []).append((translate(rule.pattern), rule))
        else:
            # "/usr" and "/usr/**" differ only in that the first also names the folder itself
            # exactly; the trailing slash of the second makes it the more specific one below.
            made.under.setdefault(rule.pattern.removesuffix("/**") or "/", []).append(rule)
    if made.floating:
        made._any_floating = "|".join(f"(?:{regex})" for regex, _ in made.floating)
    return made


def _is_path(rule: Rule) -> bool:
    return not rule.pattern.endswith("/**")


def floats(pattern: str) -> bool:
    """Whether a pattern may match at any depth."""
    return not pattern.startswith("/") or pattern.startswith("/**/")


def anywhere(pattern: str) -> str:
    """The regular expression of a pattern that `floats`."""
    return translate("/**/" + pattern.removeprefix("/").removeprefix("**/"))


def _literal(pattern: str) -> int:
    """How many characters stand before the first wildcard."""
    found = WILD.search(pattern)
    return found.start() if found else len(pattern)


def translate(pattern: str) -> str:
    """A regular expression: ``*`` and ``?`` within one component, ``**`` across, ``[…]`` as in
    fnmatch; what lies below a match matches."""
    out, at = "", 0
    pattern = pattern.rstrip("/") or "/"
    while at < len(pattern):
        if pattern.startswith("/**/", at):
            out, at = f"{out}/(?:.*/)?", at + 4
        elif pattern.startswith("**", at):
            out, at = f"{out}.*", at + 2
        elif pattern[at] == "*":
            out, at = f"{out}[^/]*", at + 1
        elif pattern[at] == "?":
            out, at = f"{out}[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = re.sub(r"[\\[&|~]", r"\\\g<0>", pattern[at + 1 : end])
            inside = f"^{inside[1:]}" if inside[0] == "!" else inside
            out, at = f"{out}(?!/)[{inside}]", end + 1
        else:
            out, at = out + re.escape(pattern[at]), at + 1
    return f"(?s:{out}(?:/.*)?)"


def expand(
    written: Iterable[str],
    effect: Effect,
    *,
    sets: Callable[[str], tuple[str, ...]],
    resolve: Callable[[str], str],
) -> list[Rule]:
    """The rules of one profile key.

    ``sets`` gives the patterns of one entry with sets and variables filled in; ``resolve`` follows
    the links of a path in the agent's root.
    """
    found = []
    word = {Effect.ALLOW: "", Effect.TAINT: "taint "}.get(effect, "deny ")
    for entry in written:
        text, _, digest = entry.partition("#sha256:")
        for pattern in sets(text):
            explicit = not text.startswith("@") and not WILD.search(pattern)
            found.append(
                Rule(
                    pattern=resolved(pattern, resolve),
                    effect=effect,
                    text=f"{word}{entry}",
                    explicit=explicit,
                    sha256=digest.lower(),
                )
            )
    return found


def resolved(pattern: str, resolve: Callable[[str], str]) -> str:
    """The pattern with links followed in its part before the first wildcard (``/bin/**``)."""
    if floats(pattern):
        return pattern
    cut = pattern[: _literal(pattern)].rpartition("/")[0]
    if not WILD.search(pattern):
        return resolve(pattern)
    return (resolve(cut).rstrip("/") if cut else "") + pattern[len(cut) :]
