"""The command line: good words become Options, bad ones one message and exit code 2."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_run import cli, errors, words
from mis_run.errors import MisError, UsageError
from mis_run.model import Bind
from mis_run.options import parse

ROOT = Path(__file__).resolve().parents[2]


def options(*said: str) -> object:
    """What the command line means, without acting on it."""
    context = cli.command.make_context("mis-run", list(said))
    given = dict(context.params)
    for only_cli in ("dry_run", "quiet"):
        given.pop(only_cli)
    return parse(**given)


def test_options_come_first() -> None:
    """Everything from the command on belongs to the command, options of the same name too."""
    found = options("--memory", "1G", "--", "tool", "--memory", "2G")
    assert found.command == ("tool", "--memory", "2G")  # type: ignore[attr-defined]
    assert found.memory == 1 << 30  # type: ignore[attr-defined]
    found = options("tool", "--pids", "3")
    assert found.command == ("tool", "--pids", "3")  # type: ignore[attr-defined]


def test_binds(tmp_path: Path) -> None:
    """SRC, SRC:DST, SRC:ro and SRC:DST:ro."""
    source = str(tmp_path)
    found = options("-b", source, "-b", f"{source}:/x", "-b", f"{source}:/y:ro", "true")
    assert found.binds == (  # type: ignore[attr-defined]
        Bind(tmp_path.resolve(), tmp_path),
        Bind(tmp_path.resolve(), Path("/x")),
        Bind(tmp_path.resolve(), Path("/y"), readonly=True),
    )


BAD = [
    [],
    ["--"],
    ["--memory", "lots", "true"],
    ["--cpus", "-1", "true"],
    ["--pids", "1.5", "true"],
    ["--timeout", "soon", "true"],
    ["--net", "some", "true"],
    ["--allow-net", "x:y:z", "true"],
    ["--bind", "/no/such/place", "true"],
    ["--bind", "/usr:relative", "true"],
    ["--bind", "/usr:/a/../b", "true"],
    ["--bind", "/usr:/", "true"],
    ["--bind", "a:b:c:d", "true"],
    ["--env", "=x", "true"],
    ["--env", "MIS_TEST_SURELY_UNSET", "true"],
    ["--workdir", "/no/such/place", "true"],
    ["--workdir", "/", "true"],
    ["--workdir", "/etc", "true"],
    ["--workdir", "/etc/passwd", "true"],
    ["--rootfs", "/no/such/place", "true"],
    ["--profile", "nonsense", "true"],
    ["--profile", "../x", "true"],
    ["--user", "no-such-user", "true"],
    ["--user", "99999999999", "true"],
    ["--name", "a/b", "true"],
    ["--allow-missing", "everything", "true"],
    ["--frobnicate", "true"],
    ["-t", "true"],
    ["--net", "none", "--allow-net", "192.0.2.1:1", "true"],
]


@pytest.mark.parametrize("words", BAD, ids=lambda words: " ".join(words) or "nothing")
def test_bad_words_give_one_message(words: list[str], tmp_path: Path) -> None:
    """Exit code 2, one line of error, never a traceback, nothing on stdout."""
    argv = [sys.executable, "-I", "-m", "mis_run", *words]
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False, input=""
    )
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.startswith("mis-run: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert done.stdout == ""


flags = st.sampled_from(
    ["--memory", "--cpus", "--pids", "--timeout", "--net", "--bind", "--env", "--workdir", "--user"]
    + [
        "--profile",
        "--allow-missing",
        "--name",
        "--rootfs",
        "--log",
        "-t",
        "--json",
        "--bogus",
        "--",
    ]
)


CHOICES = ("none", "file", "kernel", "-p", "-b", "-T", "-q", "--no-tty", "--net=none", "--plane=x")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(flags, st.text(max_size=10)), max_size=8))
def test_any_words_are_options_or_a_usage_error(words: list[str]) -> None:
    """Whatever is typed, parsing gives Options or an error that names the problem."""
    import click

    try:
        options(*words)
    except UsageError as error:
        assert error.message
    except click.exceptions.Exit:
        pass
    except click.ClickException as error:
        assert error.format_message()


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(flags, st.text(max_size=4), st.sampled_from(CHOICES)), max_size=8))
def test_words_are_read_as_click_reads_them(said: list[str]) -> None:
    """Where the quick reading has an answer it is click's; where click complains it has none."""
    import click

    quick = words.read(said, {})
    try:
        slow = cli.command.make_context("mis-run", list(said)).params
    except (click.ClickException, click.exceptions.Exit):
        slow = None
    assert quick is None or quick == slow


def test_ordinary_words_need_no_click() -> None:
    """The reading is quick for what is typed every day, and leaves the rest to click."""
    for said in ("--net none -p x -- true -p y", "-e A=1 -e B --memory=1G -T -q true", "-- a"):
        assert words.read(said.split(), {}) == cli.command.make_context("x", said.split()).params
    for said in ("--help", "-pdefault true", "--prof x true", "--json=1 true", "--name"):
        assert words.read(said.split(), {}) is None
    assert words.read(["true"], {"_MIS_RUN_COMPLETE": "bash_complete"}) is None


def test_every_error_has_its_documented_code() -> None:
    """docs/exit-codes.md lists each error class with its code, and no other."""
    text = (ROOT / "docs/exit-codes.md").read_text()
    documented = {name: int(code) for code, name in re.findall(r"\| (\d+) \| `(\w+)` \|", text)}
    real = {
        name: one.exit_code
        for name, one in vars(errors).items()
        if isinstance(one, type) and issubclass(one, MisError)
    }
    assert documented == real


def test_help_is_complete() -> None:
    """--help names every option, the exit codes and examples."""
    argv = [sys.executable, "-I", "-m", "mis_run", "--help"]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for parameter in cli.command.params:
        for option in parameter.opts:
            if option.startswith("--"):
                assert option in text
    assert "Examples:" in text
    assert "exit-codes" in text
