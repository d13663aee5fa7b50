"""The operator's file, and that nothing a container says loosens it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run.errors import ProfileError, UsageError
from mis_run.events import Guarantee
from mis_run.oci import operator
from mis_run.oci.operator import Operator, build, choose

OPERATOR = Operator(profile="default", allowed=("open", "wide"))
ASKS = {"mis.profile": "open"}


def test_the_whole_file() -> None:
    """Every key, with its meaning."""
    found = build(
        {
            "runtime": "/usr/bin/crun",
            "profile": "strict",
            "profiles": "/srv/profiles",
            "allowed": ["open"],
            "minimum": ["net", "liveness"],
            "from_environment": True,
            "allow": ["audit"],
        }
    )
    assert found == Operator(
        runtime=Path("/usr/bin/crun"),
        profile="strict",
        profiles=Path("/srv/profiles"),
        allowed=("open",),
        minimum=frozenset({Guarantee.NET, Guarantee.LIVENESS}),
        from_environment=True,
        allow=frozenset({"audit"}),
    )
    assert build({"allow_missing": []}).waived == frozenset()
    assert build({}) == Operator()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"profil": "x"}, "did you mean profile"),
        ({"runtime": "runc"}, "absolute"),
        ({"allowed": "open"}, "must be a list"),
        ({"allowed": ["../x"]}, "no profile name"),
        ({"profile": 7}, "no profile name"),
        ({"minimum": ["nett"]}, "did you mean net"),
        ({"allow": ["everything"]}, "not known"),
        ({"from_environment": "yes"}, "true or false"),
    ],
)
def test_mistakes_are_named(data: dict[str, object], words: str) -> None:
    """The message or its hint says what is wrong with which key."""
    with pytest.raises(UsageError) as caught:
        build(data)
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """Who can write the file decides for root."""
    path = tmp_path / "oci.toml"
    path.write_text('profile = "strict"\n')
    path.chmod(0o644)
    if os.geteuid() == 0:
        assert operator.load(str(path)).profile == "strict"
    path.chmod(0o666)
    with pytest.raises(ProfileError, match="can write"):
        operator.load(str(path))
    with pytest.raises(ProfileError):
        operator.load(str(tmp_path / "missing.toml"))
    with pytest.raises(ProfileError):
        operator.load(str(tmp_path))


def test_precedence() -> None:
    """The runtime's definition, the annotation, the environment if allowed, the default."""
    variable = {"MIS_PROFILE": "wide"}
    believing = Operator(allowed=("open", "wide"), from_environment=True)
    assert choose(OPERATOR, "pinned", {}, {}) == "pinned"
    assert choose(OPERATOR, "open", ASKS, {}) == "open"
    assert choose(OPERATOR, None, ASKS, variable) == "open"
    assert choose(OPERATOR, None, {}, variable) == "default"
    assert choose(believing, None, {}, variable) == "wide"
    assert choose(OPERATOR, None, {"other": "x"}, {}) == "default"


@pytest.mark.parametrize(
    ("pinned", "annotations"),
    [
        ("strict", ASKS),  # contradicts the operator
        (None, {"mis.profile": "learn"}),  # exists, but is not allowed
        (None, {"mis.profile": "../../etc/passwd"}),
        (None, {"mis.profile": "open.toml"}),
        (None, {"mis.profile": "/etc/mis/profiles/open"}),
        (None, {"mis.profile": ""}),
        (None, {"mis.profile": "open\n"}),
        (None, {"mis.profile": "x" * 100_000}),
        (None, {"mis.profiles": "open"}),  # a typing error must not mean "default"
        (None, {"mis." + "x" * 100_000: "open"}),
    ],
)
def test_hostile_requests_are_refused(pinned: str | None, annotations: dict[str, str]) -> None:
    """Refused with a message of bounded length, whatever was asked."""
    with pytest.raises(UsageError) as caught:
        choose(OPERATOR, pinned, annotations, {})
    assert len(caught.value.message) < 300


@given(st.dictionaries(st.sampled_from(["mis.profile", "x"]), st.text()), st.text())
def test_the_result_is_always_allowed(annotations: dict[str, str], variable: str) -> None:
    """Whatever a container says, it runs under a profile that the operator allows."""
    believing = Operator(profile="default", allowed=("open",), from_environment=True)
    try:
        chosen = choose(believing, None, annotations, {"MIS_PROFILE": variable})
    except UsageError:
        return
    assert chosen in ("default", "open")
