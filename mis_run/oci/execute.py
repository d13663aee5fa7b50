"""``exec``: one more process in a guarded container, guarded as the first one is.

The OCI runtime puts it into the container's cgroup (the network guard) and under the container's
own filter, whose listener it sends to the supervisor before the process's first instruction (the
escape guard).  What is left to us: it gains no rights, and has none that the container lacks.
"""

from __future__ import annotations

from pathlib import Path

from mis_run import state
from mis_run.errors import UsageError
from mis_run.hints import Any
from mis_run.oci import operator, spec
from mis_run.oci.words import FILE, Call

SHAPE = {"capabilities": dict, "args": list, "env": list, "cwd": str}
SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")


def words(call: Call, run_dir: str) -> list[str]:
    """The words for the OCI runtime's ``exec``. Raises MisError when the process may not run."""
    facts = state.facts(Path(run_dir))
    decided = operator.load(call.config)
    wide = "privileged" in decided.allow
    process = call.options.get("process") or call.options.get("p")
    if process is None:
        if not wide:
            _check_rights([cap for name, cap in call.pairs if name in ("cap", "c")], facts)
        return ["--no-new-privs", *call.arguments]
    path = Path(process)
    data = spec.load(path, SHAPE)
    if not wide:
        _check_rights(_rights(data, path), facts)
    # The file is the engine's, made for this one call.
    spec.write(path, {**data, "noNewPrivileges": True})
    return list(call.arguments)


def _rights(process: dict[str, Any], path: Path) -> list[str]:
    found: list[str] = []
    for name in SETS:
        listed = (process.get("capabilities") or {}).get(name) or []
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise UsageError(f"{path}: capabilities.{name} is no list of strings")
        found += listed
    return found


def _check_rights(wanted: list[str], facts: dict[str, Any]) -> None:
    more = sorted({*wanted} - {*facts.get("capabilities", ())})
    if more:
        shown = ", ".join(more[:3]) + (" …" if len(more) > 3 else "")
        raise UsageError(
            f"refused: exec with capabilities that the container does not have: {shown}",
            hint=f"leave out --privileged; or the operator allows it in {FILE}: "
            'allow = ["privileged"]',
        )
