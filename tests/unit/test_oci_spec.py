"""The engine's configuration: what is read of it, what is refused, how it is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_run import startup
from mis_run.errors import MisError, UsageError
from mis_run.model import Limits
from mis_run.oci import dangers, edit, spec
from mis_run.oci.spec import Spec

NAMESPACES = [{"type": kind} for kind in ("mount", "network", "uts", "pid", "ipc")]
PLAIN: dict[str, Any] = {
    "process": {"args": ["sleep"], "env": ["A=b", "A=c"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
    "root": {"path": "rootfs"},
    "linux": {"namespaces": NAMESPACES, "resources": {"devices": [{"allow": False}]}},
}


def made(folder: Path, **linux: Any) -> Spec:
    return Spec(folder, {**PLAIN, "linux": {**PLAIN["linux"], **linux}})


def written(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


def test_reading(tmp_path: Path) -> None:
    """Values, annotations, variables (the last one wins) and the root."""
    found = spec.read(written(tmp_path, json.dumps(PLAIN)))
    assert found.environment == {"A": "c"}
    assert found.root == tmp_path / "rootfs"
    assert found.at("linux.resources.memory.limit", 7) == 7
    assert not found.shares("network")
    assert found.shares("user")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"process": []}',
        '{"process": {"args": [1]}}',
        '{"process": {"user": {"uid": "0"}}}',
        '{"linux": {"namespaces": [1]}}',
        '{"linux": {"namespaces": [{"type": []}]}}',
        '{"linux": {"resources": {"devices": [{"major": "1"}]}}}',
        '{"mounts": [{"options": [[]]}]}',
        '{"annotations": {"a": 1}}',
        json.dumps({"annotations": {"mis.profile": "x" * 10_000}}),
    ],
)
def test_malformed_configurations_are_refused(tmp_path: Path, text: str) -> None:
    """A message that names the file, never a traceback."""
    with pytest.raises(UsageError, match=r"config\.json"):
        spec.read(written(tmp_path, text))


def test_strange_files_are_refused(tmp_path: Path) -> None:
    """Missing, a folder, a fifo, too large: refused without waiting."""
    import os

    with pytest.raises(UsageError):
        spec.read(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UsageError):
        spec.read(tmp_path)
    (tmp_path / "config.json").rmdir()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UsageError):
        spec.read(tmp_path)
    (tmp_path / "config.json").unlink()
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(spec.MOST_BYTES + 1)
    with pytest.raises(UsageError, match="larger"):
        spec.read(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "path", "allow", "access", "limit", "args", "options", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.sampled_from([*spec.SHAPE]), JSON)
def test_any_value_anywhere_is_judged_or_refused(key: str, value: object) -> None:
    """A hostile value in any place meets a MisError or none, never another exception."""
    data: dict[str, Any] = json.loads(json.dumps(PLAIN))
    place: Any = data
    *path, last = key.split(".")
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            return
    place[last] = value
    found = Spec(Path("/nonexistent"), data)
    try:
        spec.check(found, Path("config.json"), spec.SHAPE)
        dangers.check(found, ())
        edit.limited(found.at("linux.resources", {}), LIMITS, swap=True)
    except MisError:
        return


# ---- dangers --------------------------------------------------------------------------------

SAFE_DEVICES = [
    {"allow": False, "access": "rwm"},
    {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
    {"allow": True, "type": "c", "access": "m"},
]


def test_an_ordinary_container_is_no_danger(tmp_path: Path) -> None:
    """What docker run gives by default, volumes of data included."""
    found = made(tmp_path, resources={"devices": SAFE_DEVICES})
    found = Spec(tmp_path, {**found.data, "mounts": [bind(tmp_path)]})
    assert list(dangers.found(found)) == []


def bind(source: Path | str) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "destination": "/x", "options": ["rbind"]}


@pytest.mark.parametrize(
    ("linux", "name"),
    [
        ({"resources": {"devices": [{"allow": True, "access": "rwm"}]}}, "privileged"),
        ({"resources": {"devices": [{"allow": True, "type": "c", "access": "rw"}]}}, "privileged"),
        ({"resources": {"devices": [{"allow": True, "type": "b", "major": 8}]}}, "devices"),
        (
            {"resources": {"devices": [{"allow": True, "type": "c", "major": 1, "minor": 1}]}},
            "devices",
        ),
        ({"namespaces": [n for n in NAMESPACES if n["type"] != "pid"]}, "host-pid"),
        ({"namespaces": [n for n in NAMESPACES if n["type"] != "ipc"]}, "host-ipc"),
        (
            {
                "namespaces": [
                    *[n for n in NAMESPACES if n["type"] != "pid"],
                    {"type": "pid", "path": "/proc/self/ns/pid"},
                ]
            },
            "host-pid",
        ),
    ],
)
def test_dangers_are_refused_unless_allowed(
    tmp_path: Path, linux: dict[str, Any], name: str
) -> None:
    """Each has a name under which the operator can allow it, and no other name does."""
    found = made(tmp_path, **linux)
    with pytest.raises(UsageError) as caught:
        dangers.check(found, {*dangers.LOOSENINGS} - {name})
    assert name in caught.value.hint
    dangers.check(found, {name})


@pytest.mark.parametrize(
    "source", ["/", "/proc", "/proc/1", "/etc", "/var/../run", "/sys/fs/cgroup", "/run/mis/x"]
)
def test_system_folders_are_no_volumes(tmp_path: Path, source: str) -> None:
    """Whatever the spelling."""
    found = Spec(tmp_path, {**PLAIN, "mounts": [bind(source)]})
    assert [name for name, _ in dangers.found(found)] == ["host-paths"]


def test_a_link_to_a_system_folder_is_no_volume_either(tmp_path: Path) -> None:
    """Engines follow links in a volume's source, so we do."""
    (tmp_path / "link").symlink_to("/")
    found = Spec(tmp_path, {**PLAIN, "mounts": [bind(tmp_path / "link")]})
    assert [name for name, _ in dangers.found(found)] == ["host-paths"]


def test_where_we_lie_is_no_volume_to_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what is above or below it: its root would be root of the host at the next start."""
    ours = tmp_path / "checkout" / "mis_run"
    monkeypatch.setattr(startup, "ours", lambda: (ours,))
    for source in (tmp_path, ours.parent, ours, ours / "data"):
        mount = bind(source)
        found = Spec(tmp_path, {**PLAIN, "mounts": [mount]})
        assert [name for name, _ in dangers.found(found)] == ["host-paths"]
        mount["options"] = ["rbind", "ro"]
        assert list(dangers.found(found)) == []
    for source in (tmp_path / "check", ours.with_name("mis_runner")):
        found = Spec(tmp_path, {**PLAIN, "mounts": [bind(source)]})
        assert list(dangers.found(found)) == []


# ---- limits ---------------------------------------------------------------------------------

LIMITS = Limits(memory=1000, swap=0, cpus=1.5, pids=10)


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        ({}, (1000, 1000, 10, 150_000)),
        ({"memory": {"limit": 0, "swap": -1}, "pids": {"limit": -1}}, (1000, 1000, 10, 150_000)),
        ({"memory": {"limit": 400}, "pids": {"limit": 3}}, (400, 1000, 3, 150_000)),
        ({"memory": {"limit": 400, "swap": 500}}, (400, 500, 10, 150_000)),
        ({"memory": {"limit": 9000, "swap": 9000, "reservation": 5000}}, (1000, 1000, 10, 150_000)),
        ({"cpu": {"quota": 50_000, "period": 100_000}}, (1000, 1000, 10, 50_000)),
        ({"cpu": {"quota": 50_000, "period": 10_000}}, (1000, 1000, 10, 15_000)),
    ],
)
def test_the_lower_limit_wins(given_: dict[str, Any], wanted: tuple[int, ...]) -> None:
    """Engine and profile: the stricter of the two, each for itself."""
    found = edit.limited(given_, LIMITS, swap=True)
    memory = found["memory"]
    assert (
        memory["limit"],
        memory["swap"],
        found["pids"]["limit"],
        found["cpu"]["quota"],
    ) == wanted
    assert memory.get("reservation", 0) <= memory["limit"]


def test_writing_replaces_in_one_step(tmp_path: Path) -> None:
    """The mode stays, and nothing is left beside the file."""
    path = written(tmp_path, "{}") / "config.json"
    path.chmod(0o640)
    spec.write(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
