"""What marks an agent: its rules, its words, and how it outlives a supervisor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mis_run import briefing, explain, host, learn, plan, profiles, show, taint
from mis_run.dataclass import replace
from mis_run.defcon import Tracker
from mis_run.events import Event, Verdict
from mis_run.guards import file_policy
from mis_run.model import Bind, Defcon, Files, Host, Image, Options, Plan, Profile
from mis_run.rootfs import Root

HOST = Host(mechanisms={}, cgroup="v2", unified=None, controllers={}, runtime=None)
DEFAULT = profiles.load("default")
NAMED = "$WORKSPACE/customers"
EVENT = Event(
    kind=taint.KIND, verdict=Verdict.ALLOW, comm="cat", subject={"path": "/x"}, rule="taint /x"
)


def profile(*patterns: str, enforce: bool = True, **defcon: Any) -> Profile:
    files = replace(DEFAULT.files, taint=patterns)
    return replace(DEFAULT, files=files, defcon=Defcon(**defcon), enforce=enforce)


def planned(workspace: Path, made: Profile, **options: Any) -> Plan:
    words = Options(command=("true",), workdir=workspace, **options)
    return plan.make(words, made, HOST, host.caller("0:0", {}))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A root, a workspace and a bind, with files in them."""
    for name in (
        *("root/etc/app/key", "root/srv/k.pem", "ws/customers/deep/a", "ws/real/b", "ws/k.pem"),
        *("ws/other", "data/c", "data/sub/d", "data/k.pem"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ws/led").symlink_to("real")
    (tmp_path / "ws/out").symlink_to("/data/sub")  # as the agent sees it
    (tmp_path / "ws/up").symlink_to("../data")  # which it does not see
    (tmp_path / "ws/all").symlink_to("/")
    (tmp_path / "ws/round").symlink_to("round")
    (tmp_path / "root/etc/led").symlink_to("app")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (NAMED, {"ws/customers/deep/a"}),
        (f"{NAMED}/**", {"ws/customers/deep/a"}),
        ("$WORKSPACE/cust*", {"ws/customers/deep/a"}),
        ("$WORKSPACE/led", {"ws/real/b"}),
        ("$WORKSPACE/out", {"data/sub/d"}),
        ("$WORKSPACE/out/d", {"data/sub/d"}),
        ("$WORKSPACE/ou*", set()),
        ("$WORKSPACE/up", set()),
        ("$WORKSPACE/all", set()),
        ("$WORKSPACE/round", set()),
        ("/data", {"data/c", "data/sub/d", "data/k.pem"}),
        ("/data/**", {"data/c", "data/sub/d", "data/k.pem"}),
        ("/data/sub", {"data/sub/d"}),
        ("/*ta/sub", {"data/sub/d"}),
        ("/etc/app", {"root/etc/app/key"}),
        ("/etc/led", {"root/etc/app/key"}),
        ("/etc/l*", {"root/etc/app/key"}),
        ("*.pem", {"ws/k.pem", "data/k.pem"}),  # in the host's root by its name alone
        ("/**/k.pem", {"ws/k.pem", "data/k.pem"}),
        ("/nothing", set()),
    ],
)
def test_what_exists_is_known_as_an_object(
    pattern: str, found: set[str], folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the workspace, in binds and in the root, through links inside each of them."""
    binds = (Bind(folders / "data", Path("/data"), readonly=True),)
    made = planned(folders / "ws", profile(pattern), binds=binds)
    policy = file_policy.build(made, Root(folders / "root", {}))
    infos = {path: (folders / path).stat() for path in found}
    assert set(policy.tainted) == {(info.st_dev, info.st_ino) for info in infos.values()}
    assert {outlaw.rule.text for outlaw in policy.tainted.values()} <= {f"taint {pattern}"}
    for path in found:  # and where it lies it is named
        inside = path.removeprefix("root")
        inside = f"{folders}/{path}" if path.startswith("ws/") else f"/{inside.lstrip('/')}"
        assert policy.taints.judge(inside).text == f"taint {pattern}"
    assert policy.taints.judge(f"{folders}/ws/other").rule is None


def test_all_of_an_image_is_looked_at(folders: Path) -> None:
    """What any depth names in an image's root is known, since its files may be the agent's."""
    made = planned(folders / "ws", profile("*.pem"))
    image = Image(name="x", digest="sha256:0", layers=())
    policy = file_policy.build(replace(made, image=image), Root(folders / "root", {}))
    info = (folders / "root/srv/k.pem").stat()
    assert policy.tainted[(info.st_dev, info.st_ino)].birth is None  # it changes when written to
    bare = file_policy.build(made, Root(folders / "root", {}))
    assert (info.st_dev, info.st_ino) not in bare.tainted
    engines = file_policy.with_image(bare, str(folders / "root"))
    assert (info.st_dev, info.st_ino) in engines.tainted


def test_it_neither_allows_nor_denies(folders: Path) -> None:
    """A pattern under taint changes no verdict of the other keys, hides nothing, masks nothing."""
    root = Root(folders / "root", {})
    with_, without = (
        planned(folders / "ws", made) for made in (profile(NAMED, "/nowhere"), profile())
    )
    path = f"{folders}/ws/customers/deep/a"
    for made in (file_policy.build(with_, root), file_policy.build(without, root)):
        assert made.opens.judge(path).allowed
        assert not made.opens.judge("/nowhere/x").allowed
        assert not made.objects
    assert (with_.masked, with_.protected) == (without.masked, without.protected)


def test_an_image_has_no_system_of_the_hosts() -> None:
    """@system means all of an image, here as under the other keys."""
    files = Files(taint=("@system", "/x"))
    assert profiles.for_an_image(replace(DEFAULT, files=files)).files.taint == ("/**", "/x")


@pytest.mark.parametrize(
    ("made", "level", "acts"),
    [
        (profile("/x"), 3, True),
        (profile("/x", tainted=2), 2, True),
        (profile("/x", tainted=0), 0, True),
        (profile("/x", act=False), 3, False),
        (profile("/x", enforce=False), 0, False),
    ],
)
def test_the_event_says_what_follows(made: Profile, level: int, acts: bool) -> None:
    """The level, and whether anything follows at all; it is never a violation."""
    found = taint.told(EVENT, made)
    assert taint.level(made) == level
    assert found.subject.get("acts", True) is acts
    assert found.subject["level"] == made.defcon.tainted
    advice = explain.advise(found.json())
    assert "cat opened /x" in advice.what and "taint /x" in advice.why
    assert ("DEFCON" in advice.why) is (acts and level > 0)
    assert "marks the agent" in explain.text([found.json()])
    assert not found.violation


def test_a_mark_is_not_learned() -> None:
    """What `mis learn` writes names what was needed, and a mark needs no rule."""
    facts = {"HOME": "/h", "WORKSPACE": "/w"}
    assert learn.render([EVENT.json()], facts, "x") == learn.render([], facts, "x")
    opened = replace(EVENT, kind="file.open", verdict=Verdict.AUDIT, rule="default")
    assert '"/x"' in learn.render([opened.json()], facts, "x")


def test_people_and_the_agent_are_told(folders: Path) -> None:
    """--dry-run names the patterns and the level; the agent's README what follows for it."""
    made = planned(folders / "ws", profile(NAMED))
    assert f"taint        {NAMED} (marks: DEFCON 3)" in show.plan(made)
    text, data = briefing.text(made), briefing.rules(made)
    assert f"Once you open any of {NAMED}" in text
    assert "you reach nobody whom you have not talked to before" in text
    assert "only what a rule names" not in text
    assert data["files"]["taint"] == [NAMED] and data["level_once_tainted"] == 3
    strict = briefing.text(planned(folders / "ws", profile(NAMED, tainted=2)))
    assert "only what a rule names" in strict
    for quiet in (profile(NAMED, tainted=0), profile(NAMED, act=False)):
        assert "nothing else follows" in briefing.text(planned(folders / "ws", quiet))
    recorded = planned(folders / "ws", profile(NAMED, enforce=False))
    assert "is recorded only" in show.plan(recorded)
    bare = planned(folders / "ws", profile())
    assert "marked" not in briefing.text(bare) and "taint  " not in show.plan(bare)


def change(to: int, cause: str) -> dict[str, Any]:
    return {"kind": "defcon.change", "subject": {"to": to, "cause": cause}}


MARK: dict[str, Any] = {"kind": taint.KIND}
BY_MARK = change(3, "taint")


@pytest.mark.parametrize(
    ("events", "level", "count", "later"),
    [
        ([], 5, 0, 5),
        ([change(4, "file.open")], 4, 3, 5),
        ([MARK, BY_MARK], 3, 0, 3),
        ([change(4, "file.open"), MARK, BY_MARK], 3, 3, 3),
        ([change(3, "file.open"), MARK], 3, 6, 3),
        ([MARK, BY_MARK, change(2, "file.open")], 2, 10, 3),
        ([MARK, BY_MARK, change(2, "operator"), change(3, "decay")], 3, 6, 3),
        ([MARK, BY_MARK, change(5, "operator")], 5, 0, 5),
        ([MARK, BY_MARK, change(4, "operator")], 4, 3, 5),
        ([change(5, "operator"), MARK, BY_MARK], 3, 0, 3),
        (None, 3, 0, 3),
    ],
)
def test_a_new_supervisor_knows_the_mark(
    events: list[dict[str, Any]] | None, level: int, count: int, later: int
) -> None:
    """Level, count and mark as the record has them; what an operator lifted stays lifted; where
    there is no record the agent counts as marked."""
    now = [0.0]
    found = Tracker(Defcon(), lambda: now[0])
    taint.restore(found, events, profile(NAMED))
    assert (found.level, found.count) == (level, count)
    assert found.marked is (events is None or MARK in events)
    now[0] = 3600.0
    found.tick()
    assert found.level == later


def test_without_rules_nobody_is_marked() -> None:
    """A run whose profile taints nothing needs no record to be unmarked."""
    found = Tracker(Defcon())
    taint.restore(found, None, profile())
    assert not found.marked and found.level == 5


def test_the_mark_fits_into_a_full_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent cannot hide it by filling the record first; another event is only counted then."""
    from mis_run import report

    monkeypatch.setattr(report, "MAX_BYTES", 10)
    with report.open_record("0", tmp_path / "log") as record:
        record.write(Event(kind="file.open", verdict=Verdict.DENY))
        record.write(EVENT)
    assert [event["kind"] for event in report.read(tmp_path / "log")] == [taint.KIND]
    assert os.path.getsize(tmp_path / "log") > 10 and record.violations == 1
