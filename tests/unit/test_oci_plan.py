"""From profile and container to a plan, and to the configuration that the OCI runtime gets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from mis_run import profiles
from mis_run.dataclass import replace
from mis_run.errors import MissingGuarantee, UsageError
from mis_run.events import Guarantee
from mis_run.model import Bind, Finding, Host, NetMode, Network, OnLoss, Plan, Profile
from mis_run.oci import edit, planning
from mis_run.oci.operator import Operator
from mis_run.oci.spec import Spec

WORKS = Finding(True)
MECHANISMS = dict.fromkeys(
    ("root", "cgroup-v2", "runtime", "cgroup-bpf", "seccomp-notify", "fanotify", "watchdog")
    + ("memory", "cpu", "pids", "perf-cgroup"),
    WORKS,
)
HOST = Host(
    mechanisms=MECHANISMS,
    cgroup="v2",
    unified=Path("/sys/fs/cgroup"),
    controllers={},
    runtime=Path("/usr/sbin/runc"),
    addresses=("192.0.2.1",),
    cpus=8,
)
OWN = [{"type": kind} for kind in ("mount", "network", "uts", "pid", "ipc")]
ON_HOST = [space for space in OWN if space["type"] != "network"]
DEFAULT = profiles.load("default", search=[profiles.BUILT_IN])


def spec(folder: Path, *, namespaces: list[dict[str, str]] = OWN, **more: Any) -> Spec:
    (folder / "rootfs").mkdir(exist_ok=True)
    process = {"args": ["agent"], "cwd": "/work", "env": ["HOME=/root"], "user": {"uid": 7}}
    linux = {"namespaces": namespaces}
    return Spec(folder, {"process": process, "root": {"path": "rootfs"}, "linux": linux, **more})


def plan(found: Spec, profile: Profile = DEFAULT, **operator: Any) -> Plan:
    return planning.make(profile, found, Operator(**operator), HOST, "name")


def test_a_plan_of_a_container(tmp_path: Path) -> None:
    """The container's command, user and root; the profile's rules; the engine's resolver closed."""
    made = plan(spec(tmp_path))
    assert (made.command, made.user.uid, made.rootfs) == (("agent",), 7, tmp_path / "rootfs")
    assert made.network.mode is NetMode.GUARDED
    assert made.network.host_addresses == ("192.0.2.1", "127.0.0.11")
    planning.check(made)


def test_sets_mean_the_image(tmp_path: Path) -> None:
    """@system is all of the image, @secrets (the host's) nothing; other entries stay."""
    files = replace(DEFAULT.files, deny=("@secrets", "/etc/own"))
    made = plan(spec(tmp_path), replace(DEFAULT, files=files))
    assert made.profile.files.read[0] == "/**"
    assert "/**" in made.profile.exec.allow
    assert made.masked == ("/etc/own",)
    narrow = replace(DEFAULT, exec=replace(DEFAULT.exec, allow=("git",)))
    assert plan(spec(tmp_path), narrow).profile.exec.allow == ("git",)


@pytest.mark.parametrize(
    ("mode", "namespaces", "wanted"),
    [
        ("guarded", OWN, NetMode.GUARDED),
        ("none", OWN, NetMode.NONE),
        ("host", OWN, NetMode.GUARDED),  # it has a network of its own, so loopback is its own
        ("host", ON_HOST, NetMode.HOST),
        ("guarded", ON_HOST, None),
        ("none", ON_HOST, None),
    ],
)
def test_network_modes(
    tmp_path: Path, mode: str, namespaces: list[dict[str, str]], wanted: NetMode | None
) -> None:
    """The engine gives the network, the profile says whether the host's may be it."""
    profile = replace(DEFAULT, network=Network(mode=NetMode(mode), allow=("192.0.2.9:1",)))
    found = spec(tmp_path, namespaces=namespaces)
    if wanted is None:
        with pytest.raises(UsageError, match="host's network namespace"):
            plan(found, profile)
        return
    made = plan(found, profile)
    assert made.network.mode is wanted
    assert made.network.allow == (() if wanted is NetMode.NONE else ("192.0.2.9:1",))


def test_what_the_operator_decides(tmp_path: Path) -> None:
    """Audit and `open` are refused, minimum adds, allow_missing takes away, minimum wins."""
    found = spec(tmp_path)
    with pytest.raises(UsageError, match="only records"):
        plan(found, replace(DEFAULT, enforce=False))
    plan(found, replace(DEFAULT, enforce=False), allow=frozenset({"audit"}))
    with pytest.raises(UsageError, match="on_loss"):
        plan(found, replace(DEFAULT, liveness=replace(DEFAULT.liveness, on_loss=OnLoss.OPEN)))
    both = frozenset({Guarantee.FILE, Guarantee.COUNTERS})
    made = plan(found, waived=both, minimum=frozenset({Guarantee.FILE}))
    assert Guarantee.FILE in made.profile.require
    assert made.waived == {Guarantee.COUNTERS}


def test_what_the_host_cannot_give_is_refused(tmp_path: Path) -> None:
    """A basic mechanism always; a guarantee if the profile requires it and nobody waived it."""
    broken = Finding(False, "no such thing", "get it")
    for name in (*planning.BASICS, "fanotify", "watchdog", "memory"):
        host = replace(HOST, mechanisms={**MECHANISMS, name: broken})
        made = planning.make(DEFAULT, spec(tmp_path), Operator(), host, None)
        with pytest.raises(MissingGuarantee, match="no such thing"):
            planning.check(made)
    host = replace(HOST, mechanisms={**MECHANISMS, "fanotify": broken})
    waiving = Operator(waived=frozenset({Guarantee.FILE, Guarantee.EXEC}))
    planning.check(planning.make(DEFAULT, spec(tmp_path), waiving, host, None))


def test_where_volumes_and_the_working_directory_lie(tmp_path: Path) -> None:
    """For the file guard: which path of the host is meant by a path of the container."""
    volume = {"type": "bind", "source": "/srv/x", "destination": "/work", "options": ["rbind"]}
    made = plan(spec(tmp_path, mounts=[volume]))
    assert made.binds == (Bind(Path("/srv/x"), Path("/work")),)
    made = plan(spec(tmp_path))
    assert made.binds == (Bind(tmp_path / "rootfs/work", Path("/work")),)


def edited(found: Spec, made: Plan) -> dict[str, Any]:
    inside = edit.Inside(
        listener=Path("/run/mis/id/seccomp.sock"),
        resolv_conf=Path("/run/mis/id/resolv.conf"),
        info=Path("/run/mis/id/info"),
        sealed=True,
        swap=True,
    )
    return edit.apply(found, made, inside)


def test_the_edited_configuration(tmp_path: Path) -> None:
    """Stricter in each part, the original untouched, and what we do not know is still there."""
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/resolv.conf", "type": "bind", "source": "/engine/resolv.conf"},
    ]
    found = spec(tmp_path, mounts=mounts, hooks={"poststop": [{"path": "/x"}]}, unknown=[1])
    before = copy.deepcopy(found.data)
    data = edited(found, plan(found))
    assert found.data == before
    assert data["hooks"] == before["hooks"]
    assert data["unknown"] == [1]
    assert data["process"]["noNewPrivileges"] is True
    assert data["linux"]["seccomp"]["listenerPath"] == "/run/mis/id/seccomp.sock"
    assert data["linux"]["resources"]["pids"] == {"limit": DEFAULT.limits.pids}
    assert {"/proc/kcore", "/proc/sysrq-trigger"} <= {*data["linux"]["maskedPaths"]}
    places = {mount["destination"]: mount for mount in data["mounts"]}
    assert places["/etc/resolv.conf"]["source"] == "/run/mis/id/resolv.conf"
    assert "ro" in places["/run/mis"]["options"]
    assert "/proc" in places


def test_protected_paths_in_volumes_are_pinned(tmp_path: Path) -> None:
    """Each folder on the way is a mount of its own, so that none can be moved away."""
    (tmp_path / "volume/.git/hooks").mkdir(parents=True)
    volume = {"type": "bind", "source": f"{tmp_path}/volume", "destination": "/work"}
    found = spec(tmp_path, mounts=[volume])
    data = edited(found, plan(found))
    pins = [(m["destination"], "ro" in m.get("options", ())) for m in data["mounts"][-2:]]
    assert pins == [("/work/.git", False), ("/work/.git/hooks", True)]
    assert "/work/.git/hooks" in data["linux"]["readonlyPaths"]


def test_a_link_in_a_volume_moves_no_mount(tmp_path: Path) -> None:
    """A protected path that a link leads out of its volume is not mounted by us."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "elsewhere/hooks").mkdir(parents=True)
    (tmp_path / "volume/.git").symlink_to(tmp_path / "elsewhere")
    volume = {"type": "bind", "source": f"{tmp_path}/volume", "destination": "/work"}
    found = spec(tmp_path, mounts=[volume])
    assert not [m for m in edited(found, plan(found))["mounts"] if "/work/" in m["destination"]]
