"""What follows from a limit that was hit: decided from event and plan, without an agent."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mis_run import pauses, reaction
from mis_run.defcon import Tracker
from mis_run.events import Event, Guarantee
from mis_run.explain import advise
from mis_run.mailbox import Mailbox
from mis_run.model import Defcon, Host, Limits, NetMode, NetPlan, Plan, Profile, User

SET: dict[str, Any] = {"memory": 64 << 20, "pids": 9, "cpus": 0.5}


def plan(enforce: bool = True, act: bool = True, **limits: Any) -> Plan:
    return Plan(
        name=None,
        command=("agent",),
        cwd=Path("/work"),
        env=(),
        user=User(1000, 1000, (), "u", "/home/u"),
        tty=False,
        rootfs=None,
        binds=(),
        masked=(),
        protected=(),
        mechanisms=(),
        profile=Profile(name="test", enforce=enforce, defcon=Defcon(act=act)),
        network=NetPlan(
            mode=NetMode.NONE, ipv6=False, allow=(), listen=(), resolvers=(), host_addresses=()
        ),
        limits=Limits(**limits),
        host=Host(mechanisms={}, cgroup="v2", unified=None, controllers={}, runtime=None),
    )


def event(kind: str) -> Event:
    return Event(kind=kind, guard=Guarantee.LIMITS, subject={"count": 2})


@pytest.mark.parametrize(
    ("kind", "action"), [*itertools.product(reaction.HITS, ("log", *reaction.ACTIONS))]
)
def test_each_limit_does_what_its_own_key_says(kind: str, action: str) -> None:
    """Its own and no other's: the other keys stay ``log``."""
    hit = reaction.HITS[kind]
    made = plan(**SET, **{hit.key: action})
    told, now = reaction.judge(event(kind), made)
    assert now == (action if action in ("freeze", "kill") else "")
    assert told.violation == (action == "defcon")
    assert told.subject["count"] == 2
    if action == "log":
        assert told.subject == {"count": 2}
    else:
        assert (told.subject["action"], told.rule) == (action, f"limits.{hit.key}")
    for other in reaction.HITS.keys() - {kind}:
        found, nothing = reaction.judge(event(other), made)
        assert (found.subject, found.verdict, nothing) == ({"count": 2}, None, "")


@pytest.mark.parametrize("action", reaction.ACTIONS)
def test_a_limit_that_is_not_set_has_no_consequences(action: str) -> None:
    """Somebody else's limit was hit, as the engine's; pressure needs no limit."""
    every = {hit.key: action for hit in reaction.HITS.values()}
    for kind, hit in reaction.HITS.items():
        told, now = reaction.judge(event(kind), plan(**every))
        if hit.limit:
            assert (told.subject, told.verdict, now) == ({"count": 2}, None, "")
        else:
            assert now == (action if action in ("freeze", "kill") else "")


@pytest.mark.parametrize("how", [{"enforce": False}, {"act": False}])
def test_a_profile_that_only_records_neither_freezes_nor_kills(how: dict[str, bool]) -> None:
    """The event says what would have followed; a violation still counts, for the level shown."""
    for action in ("freeze", "kill"):
        told, now = reaction.judge(event("limits.pids"), plan(pids=9, on_pids=action, **how))
        assert now == ""
        assert told.subject == {"count": 2, "action": action, "acts": False}
    told, now = reaction.judge(event("limits.pids"), plan(pids=9, on_pids="defcon", **how))
    assert (told.violation, now) == (True, "")


def test_violations_of_limits_weigh_as_others_do() -> None:
    """One each, or what the profile's weights say; never merged, since they are told apart."""
    told, _ = reaction.judge(event("limits.oom"), plan(memory=1 << 30, on_oom="defcon"))
    once, thrice = Tracker(Defcon()), Tracker(Defcon(weights={"limits.*": 3}))
    for _ in range(3):
        once.violation(told)
        thrice.violation(told)
    assert (once.count, thrice.count) == (3, 9)


def test_a_violation_of_a_limit_is_explained() -> None:
    """With what to change; no destination or path can be allowed."""
    told, _ = reaction.judge(event("limits.pids"), plan(pids=9, on_pids="defcon"))
    advice = advise(told.json())
    assert "limits.pids" in advice.what
    assert "limits.on_pids" in advice.why
    assert (advice.line, advice.flag) == ("", "")


def test_an_agent_goes_on_when_the_last_reason_is_gone() -> None:
    """Frozen once for two reasons, thawed once; what is no news changes nothing."""
    done: list[bool] = []
    stops = pauses.Pauses(done.append, lambda when, then: None)
    assert stops.set("limits", on=True)
    assert not stops.set("limits", on=True)
    assert stops.set("starved", on=True)
    assert stops.set("limits", on=False)
    assert done == [True]
    assert not stops.set("limits", on=False)
    assert stops.set("starved", on=False)
    assert done == [True, False]
    stops.end()
    assert done == [True, False]
    stops.set("limits", on=True)
    stops.set("starved", on=True)
    stops.end()
    assert done == [True, False, True, False]


def test_mail_is_taken_in_order() -> None:
    """Everything that was put, however often the bell rang; more than it can hold rings of."""
    box = Mailbox[int]()
    for number in range(3000):
        box.put(number)
    assert box.take() == [*range(3000)]
    box.put(1)
    assert box.take() == [1]
