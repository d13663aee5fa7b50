"""Which objects lie under a rule: files known by device, inode and birth, not by what they are
called.  Reads the file system; decides nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from mis_run.dataclass import dataclass
from mis_run.errors import SetupError
from mis_run.file_rules import Effect, Rule, Rules
from mis_run.linux import statx

MOST_WALKED = 1_000_000  # files looked at for floating rules; a workspace of more is refused
Identity = tuple[int, int]


@dataclass(frozen=True)
class Outlaw:
    """An object that is denied, or taints. ``birth`` as in `statx.birth`: who deletes it frees its
    number, and the next file to get that is another one."""

    rule: Rule
    birth: int | None

    def is_at(self, fd: int) -> bool:
        """Whether what is open at ``fd``, with the same device and number, is this very object."""
        return self.birth is None or statx.birth(fd) in (None, self.birth)


def below(
    source: str, target: str, rules: Rules, *, births: bool = True
) -> Iterator[tuple[Identity, Outlaw]]:
    """Every file at or below ``source``, which the agent sees as ``target``, that a rule other than
    an allowing one names.

    ``births`` False: on an overlay, where a file that the agent changes keeps its number and gets
    the birth of the copy above.  Raises SetupError for too many files.
    """
    left = MOST_WALKED
    for path in _files(source):
        left -= 1
        if left < 0:
            raise SetupError(
                f"{source} has more than {MOST_WALKED} files to look at for what is denied",
                hint="name the denied places from the root, without wildcards: $WORKSPACE/NAME",
            )
        rule = rules.judge(f"{target}{path[len(source) :]}").rule
        if rule is not None and rule.effect is not Effect.ALLOW:
            try:
                info = os.lstat(path)
            except FileNotFoundError:  # gone since
                continue
            yield (info.st_dev, info.st_ino), Outlaw(rule, birth(path) if births else None)


def birth(path: str) -> int | None:
    """None, which is never taken for another object, where it cannot be told."""
    with suppress(OSError):
        return statx.birth(path)
    return None


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):  # noqa: PTH112 - as cheap as it can be
        yield path
    for folder, _, names in os.walk(path):
        for name in names:
            yield f"{folder}/{name}"
