"""Small pure parts: explanations, the record, the summary, plans, JSON, control requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run import control, explain, plan, profiles, report, rules, show, state
from mis_run.errors import MissingGuarantee, NotFound, UsageError
from mis_run.events import Event, Guarantee, Verdict
from mis_run.host import Caller, caller
from mis_run.jsonable import plain
from mis_run.model import Finding, Host, NetMode, Options, Plan, User

KIM = Caller(
    User(1000, 1000, (), "kim", "/home/kim"),
    {"PATH": "/home/kim/bin:/usr/bin:relative", "LANG": "C.UTF-8", "TOKEN": "secret"},
)
ALL = (
    *(
        "root",
        "cgroup-v2",
        "runtime",
        "overlay",
        "netns",
        "veth",
        "nftables",
        "cgroup-bpf",
        "xdp",
        "ipv6",
    ),
    *("memory", "cpu", "pids", "io", "perf-cgroup", "seccomp-notify", "watchdog"),
    *("fanotify", "landlock-scope"),
)


def machine(*missing: str) -> Host:
    """A host on which everything works but ``missing``."""
    return Host(
        mechanisms={name: Finding(name not in missing, "because", "do something") for name in ALL},
        cgroup="hybrid",
        unified=Path("/sys/fs/cgroup/unified"),
        controllers={},
        runtime=Path("/usr/sbin/runc"),
        addresses=("192.0.2.7",),
        cpus=2,
    )


def make(host: Host | None = None, profile: str = "default", **words: Any) -> Plan:
    options = Options(command=("true",), workdir=Path("/srv/work"), **words)
    return plan.make(options, profiles.load(profile), host or machine(), KIM)


def test_the_plan_is_pure_and_printable() -> None:
    """Equal words give equal plans; it prints as text, and as JSON that survives a round trip."""
    assert make() == make()
    text = show.plan(make(allow_net=("198.51.100.1:443",)))
    for words in ("guarded", "198.51.100.1:443", "kim", "/srv/work", "memory 2.0 GiB"):
        assert words in text
    assert json.loads(json.dumps(make().json()))["command"] == ["true"]


def test_the_environment_is_a_clean_slate() -> None:
    """Hidden folders leave PATH, secrets stay behind, --env is last."""
    env = dict(make(env=(("A", "b"),)).env)
    assert env["PATH"].startswith("/usr/bin:")
    assert "/home/kim" not in env["PATH"]
    assert "relative" not in env["PATH"]
    assert "TOKEN" not in env
    assert (env["A"], env["LANG"], env["HOME"]) == ("b", "C.UTF-8", "/home/kim")


def test_what_is_better_than_promised_refuses_nothing() -> None:
    """Without Landlock's scopes the host's network is as before, and the plan says so."""
    assert "landlock-scope" not in show.plan(make())
    assert "landlock-scope  ok" in show.plan(make(net=NetMode.HOST))
    without = make(machine("landlock-scope"), net=NetMode.HOST)
    plan.check(without)
    assert "landlock-scope  absent" in show.plan(without)
    with pytest.raises(MissingGuarantee):  # the control: what is promised does refuse
        plan.check(make(machine("cgroup-bpf"), net=NetMode.HOST))


def test_options_go_over_the_profile() -> None:
    """The command line's limits and destinations are added to the profile's."""
    found = make(memory=1 << 28, pids=7, net=NetMode.HOST, allow_net=("198.51.100.1:443",))
    assert (found.limits.memory, found.limits.pids) == (1 << 28, 7)
    assert found.network.mode is NetMode.HOST
    assert found.network.allow == ("198.51.100.1:443",)


@pytest.mark.parametrize("missing", ["root", "cgroup-v2", "runtime", "overlay"])
def test_basics_cannot_be_waived(missing: str) -> None:
    """Without one of these there is no agent, whatever is waived."""
    with pytest.raises(MissingGuarantee) as raised:
        plan.check(make(machine(missing), allow_missing=frozenset(Guarantee)))
    assert raised.value.hint == "do something"


@pytest.mark.parametrize(
    ("missing", "guarantee"),
    [
        ("memory", Guarantee.LIMITS),
        ("seccomp-notify", Guarantee.ESCAPE),
        ("watchdog", Guarantee.LIVENESS),
        ("fanotify", Guarantee.FILE),
    ],
)
def test_required_guarantees_refuse_unless_waived(missing: str, guarantee: Guarantee) -> None:
    """A missing mechanism of a required guarantee refuses and names its waiver, which works."""
    with pytest.raises(MissingGuarantee, match=missing) as raised:
        plan.check(make(machine(missing)))
    assert f"--allow-missing {guarantee}" in raised.value.hint
    waived = {guarantee} | ({Guarantee.EXEC} if guarantee is Guarantee.FILE else set())
    plan.check(make(machine(missing), allow_missing=frozenset(waived)))


@pytest.mark.parametrize("missing", ["cgroup-bpf", "xdp", "veth", "nftables", "netns"])
def test_a_network_without_its_guard_is_never_given(missing: str) -> None:
    """The network guard cannot be waived; going without a network is the way."""
    allow = ("198.51.100.1:443",)
    with pytest.raises(MissingGuarantee) as raised:
        plan.check(make(machine(missing), allow_missing=frozenset(Guarantee), allow_net=allow))
    assert "--net none" in raised.value.hint


def test_forwarding_only_where_a_packet_may_leave() -> None:
    """Without a destination the machine's forwarding is not needed, nor is nftables."""
    assert not make().network.forwards
    plan.check(make(machine("nftables")))
    assert "are not touched" in show.plan(make())
    assert make(allow_net=("198.51.100.1:443",)).network.forwards
    assert "are not touched" not in show.plan(make(allow_net=("api.example:1",)))
    assert not make(net=NetMode.NONE).network.forwards


def test_ipv6_only_where_a_rule_needs_it() -> None:
    """Without a rule for IPv6, or without IPv6 on the host, the agent has none."""
    assert not make().network.ipv6
    assert not make(allow_net=("198.51.100.1:1",)).network.ipv6
    assert make(allow_net=("[2001:db8::1]:1",)).network.ipv6
    assert make(allow_net=("api.example:1",)).network.ipv6
    assert not make(machine("ipv6"), allow_net=("[2001:db8::1]:1",)).network.ipv6


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("0", (0, 0)), ("root", (0, 0)), ("12345:77", (12345, 77)), ("12345", (12345, 12345))],
)
def test_users(spec: str, expected: tuple[int, int]) -> None:
    """A name, a number, a number with a group; no supplementary groups ever."""
    user = caller(spec, {}).user
    assert (user.uid, user.gid, user.groups) == (*expected, ())


EVENTS = {
    "net.connect": ({"destination": "192.0.2.66:443", "protocol": "tcp"}, "--allow-net"),
    "net.resolve": ({"name": "x.example"}, "--allow-net x.example:443"),
    "net.bind": ({"destination": "0.0.0.0:80", "protocol": "tcp"}, ""),
    "net.socket": ({"family": "inet", "type": "raw", "protocol": "udp"}, ""),
    "escape.mount": ({"flags": 0}, ""),
    "file.open": ({"path": "/etc/shadow"}, ""),
}


@pytest.mark.parametrize("kind", EVENTS)
def test_every_denial_is_explained(kind: str) -> None:
    """What, why, and the flag where one exists; and that flag is accepted as a rule."""
    subject, flag = EVENTS[kind]
    event = Event(kind=kind, verdict=Verdict.DENY, comm="python3", subject=subject)
    advice = explain.advise(event.json())
    assert advice.what.startswith("python3")
    assert advice.why
    assert flag in advice.flag
    if advice.flag:
        rules.parse(advice.flag.removeprefix("--allow-net "))


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.none())))
def test_explaining_never_fails(event: dict[str, Any]) -> None:
    """A damaged event is explained as well as it can be."""
    explain.text([{**event, "subject": {}, "verdict": "deny"}])


def test_the_record_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its size violations are only counted; the end of the run is still written."""
    monkeypatch.setattr(report, "MAX_BYTES", 2000)
    path = tmp_path / "record"
    with report.open_record("0badcafe", path) as record:
        for _ in range(100):
            record.write(Event(kind="net.connect", verdict=Verdict.DENY))
        record.write(Event(kind="run.exit"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1]["kind"] == "run.exit"
    assert record.dropped + len(lines) == 101
    assert record.violations == 100


def test_damaged_records_are_readable(tmp_path: Path) -> None:
    """Lines that are no events are skipped and counted."""
    path = tmp_path / "record"
    path.write_text('{"kind": "a"}\nnonsense\n[1]\n{"kind": "b"}\n')
    assert [event["kind"] for event in report.read(path)] == ["a", "b", "record.damaged"]


def test_summary_says_what_matters() -> None:
    """One line when all is well; limits and denials when they happened."""
    facts = {"ending": "exited with code 0", "seconds": 1.0, "usage": {}}
    record = report.Record("0badcafe", None, None)
    lines = report.summary(facts, record)
    assert len(lines) == 1
    assert "CPU unavailable" in lines[0]
    record.write(Event(kind="net.connect", verdict=Verdict.DENY, subject={"destination": "x"}))
    facts["usage"] = {"oom_kills": 2, "pids_denied": 3}
    text = "\n".join(report.summary(facts, record))
    for words in ("memory limit: 2", "process limit: 3", "net.connect x", "1 violation"):
        assert words in text


@given(st.binary(max_size=300))
def test_any_control_request_gets_an_answer(raw: bytes) -> None:
    """Whatever a client sends is answered, never raised."""

    def handle(request: Any) -> dict[str, Any]:
        raise UsageError(f"request {request['do']!r}")

    assert "error" in control._reply(handle, raw)


def test_runs_are_found_by_id_prefix_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live run is found by id, unique prefix or name; a dead or ambiguous one is not."""
    monkeypatch.setattr(state, "STATE", tmp_path)
    with state.create("kim") as one:
        assert state.find(one.id)[0] == one.path
        assert state.find(one.id[:5])[0] == one.path
        assert state.find("kim")[1]["name"] == "kim"
        with pytest.raises(UsageError, match="has this name"), state.create("kim"):
            pass
        for wrong in ("", "nobody", "zz"):
            with pytest.raises(NotFound):
                state.find(wrong)
    assert state.run_dirs() == []


def test_plain_turns_everything_into_json() -> None:
    """Dataclasses, enums, paths, sets and tuples become JSON's own types."""
    value = {"a": (Path("/x"), frozenset(["b"]), Verdict.DENY, Finding(True))}
    assert plain(value) == {"a": ["/x", ["b"], "deny", {"ok": True, "detail": "", "fix": ""}]}


def test_sizes_for_people() -> None:
    """Bytes are shown in the largest fitting unit."""
    assert [report.size(n) for n in (0, 1536, 3 << 20, 5 << 30, None)] == [
        *("0 B", "1.5 KiB", "3.0 MiB", "5.0 GiB", "unavailable")
    ]
