"""A profile's rules as lines for inodes: as the file guard judges, or more is left to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run.file_rules import Effect, Rule, compile_rules
from mis_run.guards import lsm_lines
from mis_run.guards.file_policy import Policy
from mis_run.guards.lsm_abi import Right, RuleFlag
from mis_run.guards.lsm_policy import Entry, effective

PATHS = ["/usr/bin/tool", "/usr/lib/x", "/srv/ws/a/b/file", "/srv/ws/a/k.pem", "/srv/ws/k.pem"]
PATHS += ["/etc/passwd", "/etc/other", "/opt/y"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    top = tmp_path_factory.mktemp("root")
    for path in PATHS:
        (top / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (top / path[1:]).touch()
    return str(top)


def policy(opens: list[Rule], execs: list[Rule]) -> Policy:
    return Policy(compile_rules(opens), compile_rules(execs), places={"/srv/ws": True})


def rights(root: str, made: Policy, path: str) -> Entry:
    """What the kernel would decide at ``path``: each right by the nearest line."""
    entries: dict[str, Entry] = {}
    for line in lsm_lines.make(made, root, "/srv/ws", ["/srv/ws"]):
        old = entries.get(line.path, Entry())
        entries[line.path] = Entry(
            old.allow | line.allow, old.deny | line.deny, 0, old.flags | line.flags
        )
    chain = [path, *map(str, Path(path).parents)]
    return effective(entries[one] for one in chain if one in entries)


EFFECTS = st.sampled_from([effect for effect in Effect if effect is not Effect.TAINT])
PATTERNS = st.sampled_from(
    ["/usr/**", "/usr", "/usr/bin/tool", "/srv/ws/**", "/srv/ws/a", "/srv/ws/a/b/**", "/etc/pass*"]
    + ["/etc/**", "/etc/passwd", "/opt/*", "*.pem", "/srv/ws/*/b", "**/b/**", "/srv/**/k.pem"]
)
RULES = st.lists(st.builds(lambda p, e: Rule(p, e, p), PATTERNS, EFFECTS), max_size=6)


@given(opens=RULES, execs=RULES)
def test_never_less_than_what_denies(root: str, opens: list[Rule], execs: list[Rule]) -> None:
    """What exists and is denied by a rule in a shared place, or by a pattern that can be looked up,
    is denied by the lines; what the file guard allows, the lines allow, but for a pattern at any
    depth inside a denial."""
    made = policy(opens, execs)
    for path in PATHS:
        verdict = made.opens.judge(path)
        here = rights(root, made, path)
        if verdict.rule and verdict.allowed and not _anywhere(verdict.rule):
            assert here.allow & Right.READ, (path, opens)
            assert here.allow & Right.WRITE
        elif (
            verdict.rule
            and not verdict.allowed
            and (path.startswith("/srv/ws") or not _anywhere(verdict.rule))
        ):
            assert not here.allow & (Right.WRITE | Right.READ), (path, opens)
        if not verdict.rule and not any(_wide(rule) for rule in (*opens, *execs)):
            assert not here.allow & Right.WRITE, (path, opens)
        ran = made.execs.judge(path)
        if (
            ran.rule
            and ran.allowed
            and not _anywhere(ran.rule)
            and (verdict.rule is None or (verdict.allowed and not _anywhere(verdict.rule)))
        ):
            assert here.allow & Right.EXEC, (path, opens, execs)


def _anywhere(rule: Rule) -> bool:
    return rule.pattern.startswith("*") or "**/" in rule.pattern


def _wide(rule: Rule) -> bool:
    return rule.effect is Effect.ALLOW and "*" in rule.pattern.removesuffix("/**")


def test_flags(root: str) -> None:
    """The workspace and devices may be written at a raised level; what is named is explicit; a
    fatal rule is fatal; the canary is one."""
    made = policy(
        [
            Rule("/srv/ws/**", Effect.ALLOW, "ws"),
            Rule("/etc/passwd", Effect.ALLOW, "named", explicit=True),
            Rule("/opt/y", Effect.KILL, "kill"),
        ],
        [],
    )
    lines = {line.path: line for line in lsm_lines.make(made, root, "/srv/ws", ["/srv/ws"])}
    assert lines["/srv/ws"].flags == RuleFlag.WORKSPACE
    assert lines["/etc/passwd"].flags == RuleFlag.EXPLICIT
    assert lines["/opt/y"].flags == RuleFlag.FATAL
    assert lines["/opt/y"].deny == Right.ALL
    assert lines[lsm_lines.CANARY].flags == RuleFlag.CANARY
    assert lines["/"].allow == Right.LIST


def test_devices_need_no_rule(root: str) -> None:
    """As on the host plane; but shared memory, a file system of its own, does."""
    data = lsm_lines.DATA
    bare = policy([], [])
    for path in ("/dev/null", "/proc/self/status", "/sys/kernel"):
        assert rights(root, bare, path).allow == data
    assert rights(root, bare, "/dev/shm/x").allow == Right.LIST
    assert rights(root, bare, "/etc/passwd").allow == Right.LIST
    named = policy([Rule("/dev/shm/**", Effect.ALLOW, "shm")], [])
    assert rights(root, named, "/dev/shm/x").allow == data
    denied = policy([Rule("/dev/**", Effect.DENY, "no")], [])
    assert not rights(root, denied, "/dev/null").allow


def test_what_the_file_guard_proves_itself_by(root: str) -> None:
    """It must reach that guard, whatever a rule says, and nothing else must."""
    made = policy([Rule("/etc/**", Effect.KILL, "no")], [])
    shared = ["/srv/ws"]
    lines = lsm_lines.make(made, root, "/srv/ws", shared, left=("/etc/passwd",))
    (line,) = (line for line in lines if line.path == "/etc/passwd")
    assert (line.allow, line.deny) == (Right.ALL, Right(0))
    assert "/etc/passwd" not in {one.path for one in lsm_lines.make(made, root, "/srv/ws", shared)}
