"""Every key a profile may have: one table, from which checking, building and the docs are made.

`profile_text` makes docs/profile-reference.md of it; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from mis_run import model, units
from mis_run.dataclass import dataclass
from mis_run.defcon import EFFECTS
from mis_run.errors import ProfileError, UsageError, nearest
from mis_run.events import Guarantee
from mis_run.hints import Any
from mis_run.reaction import ACTIONS
from mis_run.sets import named

LEAST_MEMORY = 6 << 20  # docker's minimum too: below it not even the shim starts
EVENTS = (
    *("cycles", "instructions", "branches", "branch-misses", "cache-references", "cache-misses"),
    *("task-clock", "page-faults", "minor-faults", "major-faults"),
    *("context-switches", "cpu-migrations"),
)


@dataclass(frozen=True)
class Key:
    """One key: how its value is read, what it means."""

    read: Callable[[Any], Any]
    meaning: str
    kind: str
    section: str = ""


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise UsageError("must be a string")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError("must be true or false")
    return value


def _list(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise UsageError("must be a list")
        if len(value) > 4096:
            raise UsageError("has more than 4096 entries")
        return tuple(read(_text(item)) for item in value if item != "...")

    return check


def _choice(names: Sequence[str], make: Callable[[str], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if _text(value) not in names:
            near = nearest(value, names)
            hint = f"did you mean {near!r}?" if near else f"use one of {', '.join(names)}"
            raise UsageError(f"{value!r} is not one of the possible values", hint=hint)
        return make(value)

    return check


def _pattern(value: str) -> str:
    if value.startswith("@"):
        named(value)
    elif not value.startswith(("/", "~", "$", "*")):
        raise UsageError(
            f"{value!r} is no absolute path, glob or set", hint="begin with /, ~, $, ** or @"
        )
    elif ".." in value.split("/"):
        raise UsageError(f"{value!r} has '..' in it")
    return value


def _program(value: str) -> str:
    entry, mark, digest = value.partition("#sha256:")
    if mark and not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise UsageError(f"{value!r}: a sha256 is 64 hexadecimal digits")
    if entry.startswith("@"):
        named(entry)
    elif not entry or (("/" in entry) and not entry.startswith(("/", "~", "$", "*"))):
        raise UsageError(f"{value!r} is no program name, absolute path or set")
    return value


def _destination(value: str) -> str:
    from mis_run import rules

    rules.parse(value)
    return value


def _listening(value: str) -> str:
    from mis_run import rules

    rules.parse_listen(value)
    return value


def _resolver(value: str) -> str:
    from mis_run import resolve

    resolve.upstream([value])
    return value


def _number(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UsageError("must be a string or a number")
        return read(value if isinstance(value, str) else f"{value:.15g}")

    return check


def _memory(text: str) -> int:
    value = units.size(text)
    if value < LEAST_MEMORY:
        raise UsageError(f"{text!r} is too little for any process", hint="use at least 6M")
    return value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError("must be a whole number")
        if not low <= value <= high:
            raise UsageError(f"{value} is not between {low} and {high}")
        return value

    return check


def _thresholds(value: Any) -> tuple[int, ...]:
    read = _whole(1, 1_000_000)
    if not isinstance(value, list) or len(value) != 4:
        raise UsageError("must be four numbers, for levels 4, 3, 2 and 1")
    found = tuple(read(item) for item in value)
    if sorted(set(found)) != list(found):
        raise UsageError("must increase from level 4 to level 1")
    return found


def _delays(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 3:
        raise UsageError("must be three times, for levels 4, 3 and 2")
    found = tuple(_number(units.duration)(item) for item in value)
    if any(item > 1 for item in found):
        raise UsageError("a delay is at most one second")
    return found


def _weights(value: Any) -> dict[str, int]:
    if not isinstance(value, dict):
        raise UsageError("must be a table of event kind = number")
    return {_text(kind): _whole(0, 1000)(weight) for kind, weight in value.items()}


def _effects(value: Any) -> dict[str, int]:
    if not isinstance(value, dict):
        raise UsageError("must be a table of effect = level")
    read_name, read_level = _choice([*EFFECTS], str), _whole(0, 4)
    return {read_name(name): read_level(level) for name, level in value.items()}


def _mark(value: Any) -> int:
    try:
        return _whole(0, 4)(value)
    except UsageError as error:
        hint = "use a level, 4 (warning) to 1 (killed), or 0: only recorded"
        raise UsageError(error.message, hint=hint) from None


def _guarantees(value: Any) -> frozenset[Guarantee]:
    return frozenset(_list(_choice([g.value for g in Guarantee], Guarantee))(value))


_PATHS = _list(_pattern)
_TIME = _number(units.duration)
_SIZE = _number(units.size)
_ACTION = _choice(ACTIONS, str)

# section → key → what it is. "" is the top level.
SECTIONS: Mapping[str, Mapping[str, Key]] = {
    "": {
        "extends": Key(_text, "name or path of a profile whose values are the defaults", "string"),
        "description": Key(_text, "one line for `mis profile list`", "string"),
    },
    "require": {
        "guarantees": Key(
            _guarantees,
            "the launch is refused if this host cannot give one: "
            + ", ".join(f"`{g.value}`" for g in Guarantee),
            "list",
        ),
    },
    "files": {
        "read": Key(_PATHS, "what may be opened", "patterns"),
        "write": Key(
            _PATHS, "what may be opened, and changed where it is mounted writable", "patterns"
        ),
        "deny": Key(_PATHS, "what may not be opened; hidden where it exists at launch", "patterns"),
        "protect": Key(
            _PATHS, "read-only inside a writable place, as `$WORKSPACE/.git/hooks`", "patterns"
        ),
        "kill": Key(_PATHS, "as `deny`, and the agent is killed at once", "patterns"),
        "taint": Key(
            _PATHS,
            "who has opened one, where other keys allow it, is marked for the rest of the run: "
            "`defcon.tainted`",
            "patterns",
        ),
    },
    "exec": {
        "allow": Key(
            _list(_program),
            "programs that may be executed: names, paths, globs, sets; "
            "`PATH#sha256:HEX` only with that content",
            "programs",
        ),
        "deny": Key(_list(_program), "programs that may not be executed", "programs"),
    },
    "network": {
        "mode": Key(
            _choice([m.value for m in model.NetMode], model.NetMode),
            "`none`: loopback only; `guarded`: own namespace, rules at the socket and the wire; "
            "`host`: the host's network, rules at the socket",
            "string",
        ),
        "allow": Key(_list(_destination), "destinations: `HOST[:PORT[-PORT]][/tcp|/udp]`", "rules"),
        "listen": Key(
            _list(_listening), "addresses to listen on: `loopback`, `*:PORT`, `ADDR:PORT`", "rules"
        ),
        "resolvers": Key(
            _list(_resolver), "DNS servers to ask, `ADDR[:PORT]`; default: the host's", "list"
        ),
    },
    "limits": {
        "memory": Key(_number(_memory), "bytes, as `2G`", "size"),
        "swap": Key(_SIZE, "bytes of swap on top of memory", "size"),
        "cpus": Key(_number(units.cores), "CPU cores, as `1.5`", "number"),
        "pids": Key(_number(units.count), "processes and threads", "count"),
        "timeout": Key(_TIME, "the agent is asked to end, then killed", "time"),
        "io_read": Key(_SIZE, "bytes per second read from the workspace's disk", "size"),
        "io_write": Key(_SIZE, "bytes per second written to the workspace's disk", "size"),
        "scratch": Key(_SIZE, "bytes of the throw-away layer over the root", "size"),
        "on_oom": Key(
            _ACTION,
            "when the kernel killed a process at the memory limit: `log`; `defcon`: it counts as a "
            "violation; `freeze`: all of the agent stands still for two seconds; `kill`",
            "string",
        ),
        "on_pids": Key(_ACTION, "the same when `pids` refused a process or thread", "string"),
        "on_throttled": Key(_ACTION, "the same when `cpus` held the agent back", "string"),
        "on_pressure": Key(
            _ACTION,
            "the same when all of the agent waited for memory or disks, with or without a limit",
            "string",
        ),
    },
    "defcon": {
        "thresholds": Key(
            _thresholds, "violations at which levels 4, 3, 2 and 1 begin", "4 numbers"
        ),
        "delays": Key(_delays, "how late denials are answered at levels 4, 3 and 2", "3 times"),
        "decay": Key(_TIME, "the count halves after this long without a violation", "time"),
        "weights": Key(_weights, "violations one event counts as, by kind", "table"),
        "effects": Key(
            _effects,
            "level at which each effect begins, 0 for never: " + ", ".join(EFFECTS),
            "table",
        ),
        "act": Key(_flag, "false: count and report only", "true or false"),
        "tainted": Key(
            _mark,
            "the level of an agent that opened a file of `files.taint` is at most this, 4 to 1; "
            "0: only recorded",
            "level",
        ),
    },
    "liveness": {
        "on_loss": Key(
            _choice([m.value for m in model.OnLoss], model.OnLoss),
            "what happens when the supervisor is lost: `closed` kills the agent; `open` lets it go "
            "on unguarded until `mis attach`",
            "string",
        ),
        "deadline": Key(_TIME, "silence after which the supervisor counts as lost", "time"),
        "beat": Key(_TIME, "how often the supervisor proves that it is alive", "time"),
        "canary": Key(_TIME, "how often a forbidden act is tried inside, to see it denied", "time"),
        "on_starved": Key(
            _ACTION,
            "what to do when the supervisor gets no CPU: as `limits.on_oom`, but `freeze` until it "
            "has CPU again",
            "string",
        ),
    },
    "counters": {
        "events": Key(
            _list(_choice(EVENTS, str)), "performance counters: " + ", ".join(EVENTS), "list"
        ),
    },
    "env": {
        "pass": Key(_list(str), "names of variables the agent inherits from the caller", "list"),
    },
    "mode": {
        "enforce": Key(
            _flag, "false: deny nothing, record what would have been denied", "true or false"
        ),
    },
}


@dataclass(frozen=True)
class Place:
    """A file and its text, to say in which line a key stands."""

    path: str
    text: str

    def line(self, keys: Sequence[str]) -> int:
        """The line of a key, or of its section if the key is written in an unusual way."""
        *sections, last = keys
        wanted = ".".join(sections)
        current, best = "", 1
        for number, line in enumerate(self.text.splitlines(), 1):
            stripped = line.strip()
            if header := re.match(r"\[+\s*([^\]#]+?)\s*\]", stripped):
                current = re.sub(r"[\"'\s]", "", header[1])
                if current == wanted:
                    best = number
                continue
            left = re.sub(r"[\"'\s]", "", stripped.partition("=")[0])
            full = f"{current}.{left}" if current else left
            if full == ".".join(keys) or (left == last and current == wanted):
                return number
        return best

    def error(self, keys: Sequence[str], message: str, hint: str = "") -> ProfileError:
        """``file:line: section.key: message``."""
        return ProfileError(
            f"{self.path}:{self.line(keys)}: {'.'.join(keys)}: {message}", hint=hint
        )


def check(data: Mapping[str, Any], place: Place) -> None:
    """Raise ProfileError for the first key or value that is wrong."""
    for name, value in data.items():
        if name in SECTIONS[""]:
            _check_value((name,), SECTIONS[""][name], value, place)
        elif name not in SECTIONS or not name:
            raise place.error((name,), "unknown key", _nearest(name, [*SECTIONS, *SECTIONS[""]]))
        elif not isinstance(value, dict):
            raise place.error((name,), "must be a section", f"write [{name}]")
        else:
            for key, inner in value.items():
                if key not in SECTIONS[name]:
                    hint = _nearest(key, list(SECTIONS[name]))
                    raise place.error((name, key), "unknown key", hint)
                _check_value((name, key), SECTIONS[name][key], inner, place)
    liveness = data.get("liveness", {})
    if {"deadline", "beat"} <= set(liveness):
        read = SECTIONS["liveness"]["beat"].read
        if read(liveness["deadline"]) < 2 * read(liveness["beat"]):
            raise place.error(
                ("liveness", "deadline"),
                "shorter than two beats: one late beat would end the agent",
            )


def _check_value(keys: tuple[str, ...], key: Key, value: Any, place: Place) -> None:
    try:
        key.read(value)
    except UsageError as error:
        raise place.error(keys, error.message, error.hint) from None
    except (ValueError, OverflowError) as error:
        raise place.error(keys, f"cannot be read: {error}") from None


def _nearest(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else f"known here: {', '.join(filter(None, known))}"


def build(data: Mapping[str, Any], *, name: str, sources: Sequence[str]) -> model.Profile:
    """Checked and merged values → Profile."""
    read = {
        section: {key: SECTIONS[section][key].read(value) for key, value in values.items()}
        for section, values in data.items()
        if isinstance(values, dict)
    }
    return model.Profile(
        name=name,
        source=sources[0],
        sources=tuple(sources),
        description=str(data.get("description", "")),
        require=read.get("require", {}).get("guarantees", frozenset()),
        files=model.Files(**read.get("files", {})),
        exec=model.Exec(**read.get("exec", {})),
        network=model.Network(**read.get("network", {})),
        limits=model.Limits(**read.get("limits", {})),
        defcon=model.Defcon(**read.get("defcon", {})),
        liveness=model.Liveness(**read.get("liveness", {})),
        counters=read.get("counters", {}).get("events", ()),
        env=read.get("env", {}).get("pass", ()),
        enforce=read.get("mode", {}).get("enforce", True),
    )
