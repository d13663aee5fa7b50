"""What an agent calls its files and names cannot change what a person reads, pastes or allows."""

from __future__ import annotations

import json
import os
import shlex
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run import explain, learn, quoting
from mis_run.file_rules import Effect, Rule, compile_rules, expand

NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(NAMES | st.sampled_from(["**", "*", "[a]", "$HOME", "@system", "x#sha256:0"]))
EVIL = 'x"]\n[network]\nmode = "host"\n\x1b[31m'


@given(st.text())
def test_printable(text: str) -> None:
    """One line of what is printable, which is kept."""
    shown = quoting.printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@given(st.text())
def test_toml(text: str) -> None:
    """It reads back as it was; what is no Unicode is replaced."""
    again = tomllib.loads(f"key = {quoting.toml(text)}")["key"]
    assert again == text.encode("utf-8", "replace").decode() or "\ufffd" in again


@given(PATHS, PATHS)
def test_a_pattern_names_one_path(parts: list[str], other: list[str]) -> None:
    """The pattern of a path allows that path and no other, whatever signs are in it."""
    path, foreign = (f"/{'/'.join(names)}" for names in (parts or ["x"], other or ["y"]))
    rules = compile_rules(
        expand([quoting.pattern(path)], Effect.ALLOW, sets=lambda text: (text,), resolve=str)
    )
    assert rules.judge(path).allowed
    below = foreign == path or foreign.startswith(f"{path}/")
    assert rules.judge(foreign).allowed == below


def test_bytes_that_are_no_text() -> None:
    """They are matched by one of any character."""
    path = os.fsdecode(b"/tmp/a\xffb")
    assert quoting.pattern(path) == "/tmp/a?b"
    assert compile_rules([Rule("/tmp/a?b", Effect.ALLOW, "")]).judge(path).allowed


def event(kind: str, **subject: str) -> dict[str, Any]:
    return {"kind": kind, "verdict": "deny", "comm": EVIL, "subject": subject}


@pytest.mark.parametrize("path", [f"/tmp/{EVIL}", "/**", "/tmp/*"])
def test_advice_is_one_line_about_one_path(path: str) -> None:
    """The profile line has one entry beside the inherited ones, and no escape sequence."""
    text = explain.text([event("file.open", path=path)])
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text.splitlines()) == 2
    line = explain.advise(event("file.open", path=path)).line
    read = tomllib.loads(line.replace("[files] ", ""))["read"]
    assert read == ["...", quoting.pattern(path)]


def test_a_flag_is_one_word() -> None:
    """A name with signs of the shell stays one argument."""
    name = "`reboot`.$(id);x.example"
    flag = explain.advise(event("net.resolve", name=name)).flag
    assert shlex.split(flag) == ["--allow-net", f"{name}:443"]


def test_learned_profiles_say_what_was_learned() -> None:
    """Nothing that the command called its files becomes another line or a wider pattern."""
    events = [
        event("file.open", path=f"/srv/{EVIL}") | {"rule": "default"},
        event("file.open", path="/srv/**") | {"rule": "default"},
        event("file.open", path=f"/etc/{EVIL}") | {"rule": "@secrets"},
    ]
    found = tomllib.loads(learn.render(events, {"HOME": "/h", "WORKSPACE": "/w"}, EVIL))
    assert found["files"]["read"][1:] == ["/srv/[*][*]", f"/srv/{EVIL.replace('[', '[[]')}"]
    assert found["network"] == {"allow": []}, json.dumps(found)
