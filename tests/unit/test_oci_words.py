"""The runtime's command line: read as runc reads it, or refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mis_run.errors import UsageError
from mis_run.oci import words

CREATE = (
    *("--root", "/r", "--log", "/l", "--log-format", "json", "create"),
    *("--bundle", "/b", "--pid-file", "/p", "id"),
)


def test_what_containerd_says() -> None:
    """The words of containerd's shim: global options, command, options, id."""
    call = words.parse(CREATE)
    assert call.command == "create"
    assert call.container == "id"
    assert call.options == {"bundle": "/b", "pid-file": "/p"}
    assert call.base == ("--root", "/r", "--log", "/l", "--log-format", "json")
    assert call.globals["log"] == "/l"


def test_our_options_are_not_passed_on() -> None:
    """--mis-profile and --mis-config are the operator's, in daemon.json; runc never sees them."""
    call = words.parse(["--mis-profile", "x", "--mis-config=/c", "--debug", "state", "id"])
    assert (call.profile, call.config) == ("x", "/c")
    assert call.base == ("--debug",)
    assert (call.command, call.arguments) == ("state", ("id",))


@pytest.mark.parametrize("form", [["--bundle=/b"], ["-bundle", "/b"], ["-b", "/b"], ["--b=/b"]])
def test_every_spelling_of_an_option(form: list[str]) -> None:
    """Go's flag package takes one dash or two, with '=' or a word of its own."""
    call = words.parse(["create", *form, "id"])
    assert {*call.options.values()} == {"/b"}
    assert call.container == "id"


@pytest.mark.parametrize(
    "argv",
    [
        ["create"],
        ["create", "--bundle"],
        ["create", "id", "--bundle", "/other"],  # runc would read this option too
        ["create", "--unknown", "id"],
        ["--unknown", "create", "id"],
        ["restore", "id"],
        ["checkpoint", "id"],
        ["init"],
        ["exec", "--nonsense", "id"],
        ["delete", "a", "b"],
    ],
)
def test_doubt_is_refused(argv: list[str]) -> None:
    """A word that we might read differently from runc never reaches it."""
    with pytest.raises(UsageError):
        words.parse(argv)


def test_exec_keeps_the_commands_words() -> None:
    """What is executed may look like options."""
    call = words.parse(["exec", "-e", "A=b", "--cap", "X", "--cap", "Y", "id", "ls", "--help"])
    assert call.container == "id"
    assert [value for name, value in call.pairs if name == "cap"] == ["X", "Y"]
    assert call.arguments[-2:] == ("ls", "--help")


@example(["create", ""])
@given(st.lists(st.text(max_size=8) | st.sampled_from([*CREATE, "-", "--", "exec", "run", "-b"])))
def test_any_words_are_read_or_refused(argv: list[str]) -> None:
    """No words make a traceback, and a create always has a container."""
    try:
        call = words.parse(argv)
    except UsageError:
        return
    assert call.command != "create" or call.container or {"h", "help"} & {*call.options}
