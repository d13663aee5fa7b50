"""Which hierarchies there are, read from made-up /proc files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mis_run.cgroup_detect import detect, supported


def line(point: Path | str, kind: str, options: str) -> str:
    return f"31 22 0:28 / {point} rw,relatime shared:9 - {kind} {kind} {options}"


def proc(folder: Path, mounts: list[str], cgroups: list[str]) -> Path:
    (folder / "mountinfo").write_text("\n".join(mounts) + "\n")
    (folder / "cgroup").write_text("\n".join(cgroups) + "\n")
    return folder


@pytest.fixture
def unified(tmp_path: Path) -> Path:
    point = tmp_path / "unified"
    point.mkdir()
    (point / "cgroup.controllers").write_text("cpu io memory pids\n")
    (point / "cgroup.subtree_control").write_text("\n")
    return point


def test_v2(tmp_path: Path, unified: Path) -> None:
    """One cgroup2 mount and no v1 controller is v2; every controller lives in the one mount."""
    kind, found, controllers = detect(
        proc(tmp_path, [line(unified, "cgroup2", "rw,nsdelegate")], ["0::/user.slice"])
    )
    assert (kind, found) == ("v2", unified)
    assert controllers == dict.fromkeys(("cpu", "io", "memory", "pids"), unified)


def test_hybrid(tmp_path: Path, unified: Path) -> None:
    """With both, v1 wins for the controllers it holds, and named hierarchies are listed."""
    kind, found, controllers = detect(
        proc(
            tmp_path,
            [
                line("/c/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
                line("/c/systemd", "cgroup", "rw,xattr,name=systemd"),
                line(unified, "cgroup2", "rw"),
            ],
            ["2:cpu,cpuacct:/", "1:name=systemd:/", "0::/"],
        )
    )
    assert (kind, found) == ("hybrid", unified)
    assert controllers["cpu"] == controllers["cpuacct"] == Path("/c/cpu,cpuacct")
    assert controllers["name=systemd"] == Path("/c/systemd")
    assert controllers["memory"] == unified


def test_named_hierarchy_alone_is_not_hybrid(tmp_path: Path, unified: Path) -> None:
    """A named v1 hierarchy has no controllers, so v2 stays v2."""
    mounts = [line("/c/systemd", "cgroup", "rw,name=systemd"), line(unified, "cgroup2", "rw")]
    assert detect(proc(tmp_path, mounts, ["1:name=systemd:/", "0::/"]))[0] == "v2"


def test_v1(tmp_path: Path) -> None:
    """Without cgroup2 there is no unified path, and the finding says how to mount one."""
    kind, unified, controllers = detect(
        proc(tmp_path, [line("/c/memory", "cgroup", "rw,memory")], ["4:memory:/x", "0::/"])
    )
    assert (kind, unified, controllers) == ("v1", None, {"memory": Path("/c/memory")})
    finding = supported(kind, unified, {})["cgroup-v2"]
    assert not finding.ok
    assert "mount -t cgroup2" in finding.fix


def test_hidden_mount_and_blanks(tmp_path: Path) -> None:
    """A mount under another one is not used, and escaped characters in a path are."""
    point = tmp_path / "a b é"
    point.mkdir()
    (point / "cgroup.controllers").write_text("pids\n")
    escaped = str(point).replace(" ", "\\040")
    mounts = [
        line("/c/memory", "cgroup", "rw,memory"),
        line("/c/memory", "tmpfs", "rw"),
        line(escaped, "cgroup2", "rw"),
    ]
    kind, unified, controllers = detect(proc(tmp_path, mounts, ["4:memory:/", "0::/"]))
    assert (kind, unified, controllers) == ("v2", point, {"pids": point})


def test_missing_controller(tmp_path: Path, unified: Path) -> None:
    """A limit without a controller is a finding with the controller's name."""
    finding = supported("v2", unified, {"cpu": unified})["memory"]
    assert not finding.ok
    assert "memory" in finding.detail


def test_processes_in_the_root(tmp_path: Path, unified: Path) -> None:
    """In a container whose root cgroup holds processes, limits cannot be passed down."""
    (unified / "cgroup.subtree_control").write_text("pids\n")
    (unified / "cgroup.type").write_text("domain\n")
    (unified / "cgroup.procs").write_text("1\n")
    found = supported("v2", unified, {"memory": unified, "pids": unified})
    assert not found["memory"].ok
    assert "processes live in" in found["memory"].detail
    assert found["pids"].ok
