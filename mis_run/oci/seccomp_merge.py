"""The engine's seccomp filter with the escape guard's rules in it; never wider than either. Pure.

For the calls that the escape guard governs (`escape_rules.NAMES`) its rules replace the engine's,
where the engine allows at least as much.  Where the engine denies such a call it stays denied, and
is handed over only if our answer can be nothing but a denial, for the sake of the count.  Argument
conditions that cannot be compared refuse the container: a guess here would be a hole.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Collection, Mapping, Sequence

from mis_run import seccomp
from mis_run.errors import UsageError
from mis_run.guards import escape_rules
from mis_run.guards.escape_rules import NAMES, PER_HARMLESS
from mis_run.hints import Any

PERMISSIVE = frozenset({"SCMP_ACT_ALLOW", "SCMP_ACT_LOG"})
DENYING = frozenset(
    {"SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD"}
    | {"SCMP_ACT_TRAP"}
)
SURE = frozenset({*escape_rules.DENIED, *escape_rules.ABSENT, "clone", "unshare", "clone3"})
"""Calls that `escape_rules.judge` never lets through once the filter has handed them over."""

CLONE_MASK = 0x7E020000  # moby's: every CLONE_NEW* flag of clone(2)
# Values of the first argument that our rules let pass: an engine that has conditions must let all
# of them pass too, else ours would be wider. Of netlink they let one protocol pass, see `_points`.
WITNESSES: Mapping[str, Sequence[int]] = {
    "socket": (escape_rules.AF_UNIX, escape_rules.AF_INET)
    + (escape_rules.AF_INET6, escape_rules.AF_NETLINK),
    "socketpair": (escape_rules.AF_UNIX,),
    "personality": tuple(PER_HARMLESS),
}
Rule = Mapping[str, Any]


def merge(engine: Mapping[str, Any] | None, *, enforce: bool, sealed: bool) -> dict[str, Any]:
    """The OCI ``linux.seccomp`` object to use; ``engine`` is None for ``seccomp=unconfined``.

    ``sealed``: memory files cannot be executed (`linux.memfd`).  Raises UsageError for a filter
    that cannot be merged.
    """
    ours: list[dict[str, Any]] = escape_rules.notify_rules(sealed_memfds=sealed)
    if not engine:
        return seccomp.profile(ours, left_out=NAMES)
    rules = _rules(engine)
    default = str(engine.get("defaultAction"))
    if default in PERMISSIVE:
        return _over_ours(rules, ours, enforce=enforce)
    if default not in DENYING:
        raise UsageError(f"seccomp: default action {default!r} is not known")
    merged: dict[str, Any] = {
        key: value for key, value in engine.items() if not key.startswith("listener")
    }
    governed = NAMES
    if not enforce:
        # What is handed over in audit runs: the engine's own conditions must stay in force.
        governed -= {name for rule in rules if rule.get("args") for name in rule["names"]}
    kept = [{**rule, "names": [n for n in rule["names"] if n not in governed]} for rule in rules]
    merged["syscalls"] = [rule for rule in kept if rule["names"]]
    merged["syscalls"] += _governed(rules, ours, governed, enforce=enforce)
    # Only for this architecture are the guard's rules proven complete (docs/decisions).
    if native := seccomp.ARCHITECTURES.get(os.uname().machine):
        merged["architectures"] = [native]
    return merged


def _rules(engine: Mapping[str, Any]) -> list[Rule]:
    """The engine's rules, each with the old single ``name`` turned into ``names``."""
    if engine.get("listenerPath"):
        raise UsageError(
            "seccomp: the container has a notification listener of its own",
            hint="the kernel allows one listener only: remove listenerPath from that profile",
        )
    found: list[Rule] = []
    for rule in engine.get("syscalls") or []:
        names = rule.get("names") if isinstance(rule, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError("seccomp: a rule without a list of names")
        action, arguments = str(rule.get("action")), rule.get("args") or []
        if not isinstance(arguments, list) or not all(map(_is_condition, arguments)):
            raise UsageError(f"seccomp: the conditions of {names[:1]} are malformed")
        if action not in PERMISSIVE | DENYING and set(names) & NAMES:
            raise UsageError(f"seccomp: action {action!r} for {names[0]} cannot be merged")
        if action == "SCMP_ACT_NOTIFY":
            raise UsageError("seccomp: SCMP_ACT_NOTIFY without a listener")
        found.append({**rule, "action": action})
    return found


def _is_condition(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("op"), str)
        and all(isinstance(value.get(key, 0), int) for key in ("index", "value", "valueTwo"))
    )


def _over_ours(
    rules: Sequence[Rule], ours: Sequence[dict[str, Any]], *, enforce: bool
) -> dict[str, Any]:
    """For an engine that allows by default: our allow-list without what its rules deny."""
    denied = {name for rule in rules if rule["action"] not in PERMISSIVE for name in rule["names"]}
    made = seccomp.profile(ours, left_out=NAMES)
    trimmed = [_narrowed(rule, denied, enforce=enforce) for rule in made["syscalls"]]
    # As the engine denies them: which error a program meets is the engine's to say.
    trimmed += [
        {**rule, "names": [name for name in rule["names"] if name not in NAMES]}
        for rule in rules
        if rule["action"] not in PERMISSIVE and not rule.get("args")
    ]
    return {**made, "syscalls": [rule for rule in trimmed if rule["names"]]}


def _narrowed(rule: Rule, denied: Collection[str], *, enforce: bool) -> dict[str, Any]:
    """One of our rules without calls that the engine denies, unless it can only deny them too."""
    counts = enforce and rule["action"] != "SCMP_ACT_ALLOW"
    names = [name for name in rule["names"] if name not in denied or (counts and name in SURE)]
    return {**rule, "names": names}


def _governed(
    rules: Sequence[Rule], ours: Sequence[Rule], governed: Collection[str], *, enforce: bool
) -> list[dict[str, Any]]:
    """Our rules for these calls, narrowed to what the engine allows."""
    denied = {name for name in NAMES if name not in governed or not _allows(name, rules)}
    found = [_narrowed(rule, denied, enforce=enforce) for rule in ours]
    return [rule for rule in found if rule["names"]]


def _allows(name: str, rules: Sequence[Rule]) -> bool:
    """Whether the engine lets this call pass wherever ours would. Raises UsageError if unclear."""
    mine = [rule for rule in rules if name in rule["names"]]
    allowing = [rule for rule in mine if rule["action"] in PERMISSIVE]
    if not allowing or any(not rule.get("args") for rule in mine if rule not in allowing):
        return False  # denied outright, or by the default action
    conditions = [rule.get("args") or [] for rule in allowing]
    if len(allowing) == len(mine) and (
        [] in conditions or (name == "clone" and any(map(_no_namespace, conditions)))
    ):
        return True
    refusals = [rule.get("args") or [] for rule in mine if rule not in allowing]
    points = _points(name, [*conditions, *refusals])
    if points and all(
        any(_holds(condition, point) for condition in conditions)
        and not any(_may_hold(refusal, point) for refusal in refusals)
        for point in points
    ):
        return True
    raise UsageError(
        f"seccomp: the profile's conditions on {name} cannot be merged with the escape guard's",
        hint=f"allow {name} without conditions there, since the guard has its own; or deny it",
    )


def _no_namespace(condition: Sequence[Rule]) -> bool:
    """Whether this is the one condition on clone(2) that engines have: no new namespace."""
    wanted = {"index": 0, "value": CLONE_MASK, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    return [{"valueTwo": 0, **part} for part in condition] == [wanted]


def _points(name: str, conditions: Sequence[Sequence[Rule]]) -> list[Mapping[int, int]]:
    """Arguments (index → value) that stand for all that our rules let pass, as far as comparisons
    of the first and the third argument with constants can tell them apart."""
    if name != "socket":
        return [{0: value} for value in WITNESSES.get(name, ())]
    parts = [part for condition in conditions for part in condition if part.get("index") == 2]
    values = {part.get("value", 0) + step for part in parts for step in (-1, 0, 1)}
    edges = sorted(value for value in {*values, 0} if value >= 0)
    return [
        {0: family, 2: protocol}
        for family in WITNESSES[name]
        for protocol in (
            edges if family != escape_rules.AF_NETLINK else [escape_rules.NETLINK_ROUTE]
        )
    ]


COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "SCMP_CMP_EQ": operator.eq,
    "SCMP_CMP_NE": operator.ne,
    "SCMP_CMP_LT": operator.lt,
    "SCMP_CMP_LE": operator.le,
    "SCMP_CMP_GT": operator.gt,
    "SCMP_CMP_GE": operator.ge,
}


def _part(part: Rule, point: Mapping[int, int]) -> bool | None:
    """Whether one comparison is true at ``point``; None where that cannot be said."""
    compare, value = COMPARE.get(part["op"]), point.get(part.get("index", 0))
    return None if compare is None or value is None else compare(value, part.get("value", 0))


def _holds(condition: Sequence[Rule], point: Mapping[int, int]) -> bool:
    """Whether ``condition`` is certainly true at ``point``."""
    return all(_part(part, point) for part in condition)


def _may_hold(condition: Sequence[Rule], point: Mapping[int, int]) -> bool:
    """Whether ``condition`` is not certainly false at ``point``."""
    return all(_part(part, point) is not False for part in condition)
