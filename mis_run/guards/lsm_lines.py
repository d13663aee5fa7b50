"""The file guard's policy as lines for inodes: what of it the kernel can decide without names.

The kernel has no patterns, so a pattern becomes the paths that it names now, each with the verdict
of `file_rules` on what lies there.  What only a name can tell (a file that will be made and then
match ``*.pem``, a program's content) is left to the file guard, which judges after the plane:
here such a pattern allows all of the folder that it begins in, and never denies less.

A rule that lets something be opened gives every right but execution: what may be changed is decided
by the mounts, on both planes.  Out of scope: inodes (`lsm_policy`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence

from mis_run import masks
from mis_run.bundle import INFO
from mis_run.file_rules import Effect, Rule, Rules, Verdict, floats
from mis_run.guards.file_policy import ANY, Policy
from mis_run.guards.lsm_abi import Right, RuleFlag
from mis_run.guards.lsm_policy import NOTHING, PLAIN, Line

CANARY = f"{INFO}/kernel-canary"
DATA = Right.ALL & ~Right.EXEC
NO_STORE = ("/dev", "/proc")  # writing there stores nothing, so no level takes it away
UNJUDGED = ("/dev", "/proc", "/sys")
"""The file guard does not judge opens there (`marks.judged`), so neither plane needs a rule that
allows them; masks, mount options and what a denial names are in force as everywhere."""
SHARED_MEMORY = "/dev/shm"  # an ordinary file system of its own


def make(
    policy: Policy, root: str, workspace: str, shared: Sequence[str], left: Collection[str] = ()
) -> list[Line]:
    """The lines of a container whose tree is at ``root`` (``/proc/PID/root``).

    ``shared`` are the folders of the host that it sees, in which denied files may lie anywhere;
    ``left`` files that are left to the file guard, which proves itself by them.
    """
    opens, execs = policy.opens, policy.execs
    places = _named(root, opens) | _denied_below(root, shared, opens)
    programs = _named(root, execs) | places  # what is allowed inside a denial may be executed
    lines = [
        # Folders may be listed, as on the host plane; the mounts hide names.
        Line("/", Right.LIST, NOTHING, "default", RuleFlag.EXPLICIT),
        *(
            Line(path, DATA, NOTHING, "default", RuleFlag.EXPLICIT | RuleFlag.WORKSPACE)
            for path in UNJUDGED
        ),
        *_default(SHARED_MEMORY, _judge(opens, root, SHARED_MEMORY)),
        *(_opening(path, _judge(opens, root, path), workspace) for path in sorted(places)),
        *(
            _executing(path, _judge(opens, root, path), _judge(execs, root, path))
            for path in sorted(programs)
        ),
        *_widened(opens, policy, DATA),
        *_widened(execs, policy, Right.EXEC | Right.READ),
        Line(CANARY, NOTHING, Right.ALL, "canary", RuleFlag.CANARY),
    ]
    lines = [line for line in lines if line.path not in left and (line.allow or line.deny)]
    return lines + [Line(path, Right.ALL, NOTHING, "default", RuleFlag.EXPLICIT) for path in left]


def _default(path: str, verdict: Verdict) -> Iterator[Line]:
    """Denied unless a rule says otherwise, in the middle of what is allowed."""
    if verdict.rule is None:
        yield Line(path, NOTHING, DATA & ~Right.LIST, "default")


def _named(root: str, rules: Rules) -> set[str]:
    """Every path that the rules name, and the folders that wildcards are matched in."""
    found = {*rules.under, *rules.wild}
    for entries in rules.wild.values():
        for _, rule in entries:
            if pattern := masks.normal(rule.pattern):
                found |= masks.find(root, pattern)
    return found


def _denied_below(root: str, shared: Iterable[str], rules: Rules) -> set[str]:
    """What exists under a denial that may match at any depth."""
    if not any(_anywhere(rule) for _, rule in _wild(rules) if rule.effect is not Effect.ALLOW):
        return set()
    found = set()
    for place in shared:
        for folder, _, names in os.walk(f"{root}{place}"):
            inside = folder[len(root) :]
            for path in (f"{inside}/{name}" for name in names):
                verdict = rules.judge(path)
                if verdict.rule is not None and not verdict.allowed:
                    found.add(path)
    return found


def _wild(rules: Rules) -> Iterator[tuple[str, Rule]]:
    """(folder that the pattern begins in, rule) of every rule with wildcards."""
    yield from (("/", rule) for _, rule in rules.floating)
    for folder, entries in rules.wild.items():
        yield from ((folder, rule) for _, rule in entries)


def _anywhere(rule: Rule) -> bool:
    return floats(rule.pattern) or masks.normal(rule.pattern) is None


def _judge(rules: Rules, root: str, path: str) -> Verdict:
    """The verdict on a file, or on what lies in a folder."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(f"{root}{path}").st_mode)
    except OSError:  # nothing there: `lsm_policy.compile` tells
        is_folder = False
    return rules.judge(f"{path.rstrip('/')}/{ANY}" if is_folder else path)


def _opening(path: str, verdict: Verdict, workspace: str) -> Line:
    rule = verdict.rule
    if rule is None:
        return Line(path, NOTHING, NOTHING, "")
    if not verdict.allowed:
        fatal = RuleFlag.FATAL if verdict.kills else PLAIN
        return Line(path, NOTHING, Right.ALL, rule.text, fatal)
    flags = RuleFlag.EXPLICIT if rule.explicit else PLAIN
    if any(f"{path}/".startswith(f"{place}/") for place in (workspace, *NO_STORE)):
        flags |= RuleFlag.WORKSPACE
    return Line(path, DATA, NOTHING, rule.text, flags)


def _executing(path: str, opening: Verdict, verdict: Verdict) -> Line:
    rule = verdict.rule
    if rule is None or (opening.rule is not None and not opening.allowed):
        return Line(path, NOTHING, NOTHING, "")
    if not verdict.allowed:
        return Line(path, NOTHING, Right.EXEC, rule.text)
    # What may be executed may be read: its interpreter does.
    flags = RuleFlag.EXPLICIT if rule.explicit else PLAIN
    return Line(path, Right.EXEC | Right.READ, NOTHING, rule.text, flags)


def _widened(rules: Rules, policy: Policy, rights: Right) -> Iterator[Line]:
    """Folders in which a file that does not exist yet may come to match an allowing pattern."""
    for folder, rule in _wild(rules):
        writable = policy.is_writable(f"{folder.rstrip('/')}/{ANY}")
        if rule.effect is Effect.ALLOW and (writable or _anywhere(rule)):
            yield Line(folder, rights, NOTHING, rule.text)
