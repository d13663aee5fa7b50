"""Which plane a plan takes, and what of a profile the kernel can decide without names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mis_run import host, plan, planes, profiles
from mis_run.dataclass import replace
from mis_run.errors import MissingGuarantee
from mis_run.model import Bind, Exec, Files, Finding, Host, Liveness, OnLoss, Options, PlaneChoice

HOST = Host(mechanisms={}, cgroup="v2", unified=None, controllers={}, runtime=None)
CAN = replace(HOST, mechanisms={"bpf-lsm": Finding(True)})
OPTIONS = Options(command=("true",), workdir=Path("/srv/ws"))
DEFAULT = profiles.load("default")


def chosen(host: Host, profile: object = DEFAULT, **options: object) -> set[str]:
    found = planes.choose(replace(OPTIONS, **options), profile, host)  # type: ignore[arg-type]
    return {name for _, name in found}


@pytest.mark.parametrize(
    ("host", "plane", "expected"),
    [
        (HOST, PlaneChoice.AUTO, {"fanotify"}),
        (HOST, PlaneChoice.HOST, {"fanotify"}),
        (HOST, PlaneChoice.KERNEL, {"bpf-lsm"}),  # `plan.check` refuses it
        (CAN, PlaneChoice.AUTO, {"bpf-lsm"}),
        (CAN, PlaneChoice.HOST, {"fanotify"}),
        (CAN, PlaneChoice.KERNEL, {"bpf-lsm"}),
    ],
)
def test_the_kernel_plane_where_it_works(host: Host, plane: str, expected: set[str]) -> None:
    """By itself where the LSM works, and by a word."""
    assert chosen(host, plane=plane) == expected


def test_names_take_the_file_guard_along() -> None:
    """What only a name tells is judged by both, what taints too; without enforcement then by the
    host plane alone, or each act would count twice."""
    profile = replace(DEFAULT, files=replace(DEFAULT.files, deny=("**/*.key",)))
    tainting = replace(DEFAULT, files=replace(DEFAULT.files, taint=("/etc/x",)))
    assert chosen(CAN, profile) == chosen(CAN, tainting) == {"bpf-lsm", "fanotify"}
    assert chosen(CAN, replace(profile, enforce=False)) == {"fanotify"}
    assert chosen(CAN, replace(DEFAULT, enforce=False)) == {"bpf-lsm"}


def test_what_outlives_its_supervisor_is_judged_as_others_are() -> None:
    """A new supervisor takes over either plane, and both."""
    profile = replace(DEFAULT, liveness=Liveness(on_loss=OnLoss.OPEN))
    assert chosen(CAN, profile) == {"bpf-lsm"}
    assert chosen(CAN, profile, plane=PlaneChoice.KERNEL) == {"bpf-lsm"}
    assert chosen(CAN, profile, plane=PlaneChoice.HOST) == {"fanotify"}
    named = replace(profile, files=replace(DEFAULT.files, deny=("**/*.key",)))
    assert chosen(CAN, named) == {"bpf-lsm", "fanotify"}


@pytest.mark.parametrize(
    ("files", "programs", "named"),
    [
        (DEFAULT.files, DEFAULT.exec, ""),
        (replace(DEFAULT.files, taint=("/etc/x",)), DEFAULT.exec, "/etc/x"),
        (Files(read=("/usr/**",)), Exec(allow=("/usr/**",)), ""),
        (Files(read=("/usr/**",)), Exec(allow=("/usr/**", "/opt/tool")), "/opt/tool"),
        (Files(read=("/usr/**",)), Exec(allow=("/usr/bin/**",)), "/usr/**"),
        (Files(read=("/usr/lib/x*",)), Exec(allow=("/usr/lib/x*",)), ""),
        (Files(read=("*.txt",)), Exec(allow=("*.txt",)), "*.txt"),
        (Files(read=("/usr/**/doc",)), Exec(allow=("/usr/**/doc",)), "/usr/**/doc"),
        (
            Files(read=("$WORKSPACE/*.txt",)),
            Exec(allow=("$WORKSPACE/*.txt",)),
            "/srv/ws/*.txt",
        ),
        (Files(read=("/tmp/a*",)), Exec(allow=("/tmp/a*",)), "/tmp/a*"),
        (Files(deny=("/etc/ssh/*_key", "/srv", "/home/*")), Exec(), ""),
        (Files(deny=("/*/ws/secret",)), Exec(), "/*/ws/secret"),
        (Files(deny=("$WORKSPACE/secret",)), Exec(), "/srv/ws/secret"),
        (Files(kill=("/data/inside",)), Exec(), "/data/inside"),
        (Files(), Exec(allow=("git",)), "git"),
        (Files(), Exec(allow=("/bin/sh#sha256:" + "0" * 64,)), "/bin/sh#sha256:" + "0" * 64),
        (Files(), Exec(deny=("/bin/nc",)), "/bin/nc"),
    ],
)
def test_what_only_a_name_tells(files: Files, programs: Exec, named: str) -> None:
    """Patterns at any depth or in writable places, denials in what the host shares, contents."""
    options = replace(OPTIONS, binds=(Bind(Path("/data"), Path("/data")),))
    profile = replace(DEFAULT, files=files, exec=programs)
    assert planes.needs_names(options, profile) == named


@pytest.mark.parametrize(
    ("active", "why", "fix"),
    [
        (None, "No such file", "mount -t securityfs"),
        ("lockdown,yama", "not active", "lsm=…,bpf"),
        ("", "not active", "lsm=…,bpf"),
    ],
)
def test_why_there_is_none(
    active: str | None, why: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's list of LSMs decides before anything slow is tried; each no says what to do."""
    path = tmp_path / "lsm"
    if active is not None:
        path.write_text(active)
    monkeypatch.setattr(host, "ACTIVE_LSMS", path)
    finding = host._kernel_plane()["bpf-lsm"]
    assert not finding.ok
    assert why in finding.detail
    assert fix in finding.fix


def test_a_wish_that_cannot_be_had_is_refused() -> None:
    """``--plane kernel`` where there is none is no launch on the other plane."""
    made = plan.make(
        replace(OPTIONS, plane=PlaneChoice.KERNEL), DEFAULT, HOST, host.caller("0:0", {})
    )
    basics = {name: Finding(True) for name in plan.BASICS}
    refused = replace(
        made,
        host=replace(HOST, mechanisms=basics),
        mechanisms=tuple(one for one in made.mechanisms if one.name == "bpf-lsm"),
    )
    with pytest.raises(MissingGuarantee, match="kernel plane") as error:
        plan.check(refused)
    assert error.value.hint == "--plane host"
