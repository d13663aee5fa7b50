"""Docker's daemon.json: our runtimes in, everything else untouched, and exactly out again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_run import docker_config as config
from mis_run import json_text
from mis_run.errors import MisError, UsageError

OURS = {
    "mis": {"path": "/opt/mis-oci-runtime"},
    "mis-strict": {"path": "/opt/mis-oci-runtime", "runtimeArgs": ["--mis-profile", "strict"]},
}


@pytest.fixture(autouse=True)
def runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "runtimes", lambda: OURS)


TEXTS = [
    "{}",
    "{}\n",
    "{ }",
    "",
    " \n",
    '{"debug":true}',
    '{\n  "debug": true\n}\n',
    '{\n\t"debug": true,\n\t"dns": ["192.0.2.1"]\n}',
    '{"runtimes": {}}',
    '{"runtimes":{"other":{"path":"/x"}},"debug":false}',
    '{\n    "log-opts": {"max-size": "1e1m"},\n    "n": 1e3, "big": 12345678901234567890\n}\n',
    '{\n  "runtimes": {\n    "other": {\n      "path": "/x"\n    }\n  },\n  "é": "\\u00e9 }{,"\n}',
    '\r\n{\r\n  "a": 1\r\n}\r\n',
]


@pytest.mark.parametrize("text", TEXTS)
def test_in_and_out_again(tmp_path: Path, text: str) -> None:
    """Our runtimes are there, everything else means the same; afterwards every byte is back."""
    path = tmp_path / "daemon.json"
    path.write_bytes(text.encode())
    path.chmod(0o640)
    assert config.install(path) == ["mis", "mis-strict"]
    new = json.loads(path.read_text())
    old: dict[str, Any] = json.loads(text) if text.strip() else {}
    assert new["runtimes"] == {**OURS, **old.get("runtimes", {})}
    assert {**new, "runtimes": old.get("runtimes")} == {**old, "runtimes": old.get("runtimes")}
    assert config.status(path)["missing"] == []
    assert config.uninstall(path)
    assert path.read_bytes() == text.encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["daemon.json"]


@pytest.mark.parametrize("text", [text for text in TEXTS if text.strip()])
def test_the_rest_of_the_text_stays_to_the_byte(tmp_path: Path, text: str) -> None:
    """Nobody's formatting, numbers or escapes are rewritten: our lines are the only difference."""
    path = tmp_path / "daemon.json"
    path.write_bytes(text.encode())
    config.install(path)
    new = path.read_bytes().decode()
    left = 0
    for letter in new:
        left += left < len(text) and letter == text[left]
    assert left == len(text)


def test_edited_in_between(tmp_path: Path) -> None:
    """What somebody added meanwhile stays; only ours goes."""
    path = tmp_path / "daemon.json"
    path.write_text('{\n  "debug": true\n}\n')
    config.install(path)
    path.write_text(path.read_text().replace('"debug": true', '"debug": false'))
    assert config.uninstall(path)
    assert path.read_text() == '{\n  "debug": false\n}\n'
    config.install(path)
    data = json.loads(path.read_text())
    data["runtimes"]["theirs"] = {"path": "/y"}
    path.write_text(json.dumps(data))
    config.uninstall(path)
    assert json.loads(path.read_text()) == {
        "debug": False,
        "runtimes": {"theirs": {"path": "/y"}},
    }


def test_twice_is_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second install changes nothing, one from another place replaces the first; one way back."""
    path = tmp_path / "daemon.json"
    path.write_text('{"debug":true}')
    config.install(path)
    once = path.read_bytes()
    config.install(path)
    assert path.read_bytes() == once
    moved = {"mis": {"path": "/elsewhere/mis-oci-runtime"}}
    monkeypatch.setattr(config, "runtimes", lambda: moved)
    assert config.status(path)["runtimes"] == {
        "mis": "of another version or place",
        "mis-strict": "of another version or place",
    }
    config.install(path)
    assert json.loads(path.read_text())["runtimes"] == moved
    config.uninstall(path)
    assert path.read_text() == '{"debug":true}'
    assert not config.uninstall(path)
    assert path.read_text() == '{"debug":true}'


def test_no_file_and_no_folder(tmp_path: Path) -> None:
    """Both are made, and both are gone afterwards."""
    path = tmp_path / "etc/docker/daemon.json"
    assert config.status(path)["missing"] == ["mis", "mis-strict"]
    assert not config.uninstall(path)
    config.install(path)
    assert json.loads(path.read_text()) == {"runtimes": OURS}
    assert config.uninstall(path)
    assert not (tmp_path / "etc").exists()


def test_links_are_followed_not_replaced(tmp_path: Path) -> None:
    """Configuration managers link the file: the link stays a link."""
    real = tmp_path / "managed/docker.json"
    real.parent.mkdir()
    real.write_text("{}")
    path = tmp_path / "daemon.json"
    path.symlink_to(real)
    config.install(path)
    assert path.is_symlink()
    assert "mis" in json.loads(real.read_text())["runtimes"]
    config.uninstall(path)
    assert path.is_symlink()
    assert real.read_text() == "{}"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        "// comment\n{}",
        '{"a": 1,}',
        '{"runtimes": []}',
        '{"a": 1, "a": 2}',
        '{"runtimes": {"x": {}, "x": {}}}',
        '{"runtimes": {"mis": {"path": "/usr/bin/something-else"}}}',
        "[" * 100_000,
    ],
)
def test_files_that_cannot_be_edited_are_left_alone(tmp_path: Path, text: str) -> None:
    """A message that names the file; not a byte is changed."""
    path = tmp_path / "daemon.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"daemon\.json"):
        config.install(path)
    assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["daemon.json"]


def test_strange_files(tmp_path: Path) -> None:
    """A folder, a fifo, bytes that are no text, too large: refused without waiting."""
    path = tmp_path / "daemon.json"
    path.mkdir()
    with pytest.raises(MisError):
        config.install(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(MisError):
        config.install(path)
    path.unlink()
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(MisError):
        config.install(path)
    path.write_text(" " * (config.MOST_BYTES + 1))
    with pytest.raises(MisError):
        config.install(path)


def test_a_damaged_note_costs_only_the_exact_bytes(tmp_path: Path) -> None:
    """Without our note uninstall still takes our runtimes out."""
    path = tmp_path / "daemon.json"
    path.write_text('{"debug":true}')
    config.install(path)
    (tmp_path / config.NOTE).write_text("[]")
    assert config.uninstall(path)
    assert json.loads(path.read_text()) == {"debug": True, "runtimes": {}}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    st.dictionaries(st.text(max_size=4), VALUES, max_size=4),
    st.none() | st.integers(0, 5) | st.just("\t"),
)
def test_any_object_is_edited_and_cut(data: dict[str, Any], indent: int | str | None) -> None:
    """Putting members in and cutting them out gives the same values back, whatever the layout."""
    text = json.dumps(data, indent=indent)
    text = json_text.put_first(text, text.index("{"), {"a new one": {"x": [1]}}, 1)
    assert json.loads(text) == {"a new one": {"x": [1]}, **data}
    text = json_text.cut(text, json_text.top(text)["a new one"])
    assert json.loads(text) == data
    for name in data:
        text = json_text.cut(text, json_text.top(text)[name])
    assert json.loads(text) == {}


def test_the_real_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """``mis`` and one for each built-in profile that denies; all by absolute path."""
    monkeypatch.undo()
    found = config.runtimes()
    assert {"mis", "mis-ci-untrusted", "mis-coding-agent"} <= {*found}
    assert "mis-trace" not in found
    assert all(Path(one["path"]).is_absolute() for one in found.values())
