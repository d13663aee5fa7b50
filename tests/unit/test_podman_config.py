"""podman's drop-in files: in, exactly out again, and nobody else's file touched."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from mis_run import podman_config as config
from mis_run.errors import UsageError
from mis_run.events import Guarantee


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "find_program", lambda name: Path("/opt") / name)
    monkeypatch.setattr(config, "VENDOR", tmp_path / "vendor.conf")


def tree(folder: Path) -> dict[str, str | None]:
    """Every path below, with the text of each file."""
    found = sorted(folder.rglob("*"))
    return {str(one): one.read_text() if one.is_file() else None for one in found}


def install(
    folder: Path, *, always: bool = False, waived: frozenset[Guarantee] = frozenset()
) -> list[Path]:
    return config.install(folder, always=always, waived=waived)


@pytest.mark.parametrize(
    "there", [(), ("containers.conf.d",), ("oci/hooks.d", "containers.conf.d")]
)
def test_in_and_out_again(tmp_path: Path, there: tuple[str, ...]) -> None:
    """Two files that podman reads; afterwards all is as it was, made folders included."""
    folder = tmp_path / "etc/containers"
    for name in there:
        (folder / name).mkdir(parents=True)
        (folder / name / "other.conf").write_text("[engine]\n")
    before = tree(tmp_path)
    drop_in, hook = install(folder)
    assert tomllib.loads(drop_in.read_text()) == {
        "engine": {"runtimes": {"mis": ["/opt/mis-oci-runtime"]}}
    }
    assert json.loads(hook.read_text()) == {
        "version": "1.0.0",
        "hook": {"path": "/opt/mis-oci-hook", "args": ["mis-oci-hook"], "timeout": 60},
        "when": {"annotations": {"^mis\\.": ".*"}},
        "stages": ["createRuntime", "poststop"],
    }
    assert config.status(folder)["missing"] == []
    assert set(config.status(folder)["files"].values()) == {"installed"}
    assert config.uninstall(folder)
    assert tree(tmp_path) == before
    assert not config.uninstall(folder)


def test_installed_again_with_other_options(tmp_path: Path) -> None:
    """The second one counts, and the first one's folders are still known."""
    folder = tmp_path / "containers"
    install(folder)
    _, hook = install(folder, always=True, waived=frozenset({Guarantee.FILE, Guarantee.EXEC}))
    data = json.loads(hook.read_text())
    assert data["when"] == {"always": True}
    assert data["hook"]["args"][1:] == ["--allow-missing", "exec,file"]
    assert config.uninstall(folder)
    assert tree(tmp_path) == {}


def test_an_edited_file_is_somebodys(tmp_path: Path) -> None:
    """Neither overwritten nor removed."""
    for name in (config.DROP_IN, config.HOOK):
        folder = tmp_path / Path(name).name
        install(folder)
        path = folder / name
        path.write_text(path.read_text() + "\n")
        before = tree(folder)
        for act in (install, config.uninstall):
            with pytest.raises(UsageError, match="not as mis-run wrote it"):
                act(folder)
        assert tree(folder) == before


def test_another_runtime_of_our_name(tmp_path: Path) -> None:
    """Refused: whoever says --runtime mis must get ours."""
    (tmp_path / "containers.conf").write_text('[engine.runtimes]\nmis = ["/x"]\n')
    with pytest.raises(UsageError, match="not ours is defined"):
        install(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["containers.conf"]
    (other,) = config.status(tmp_path)["in the way"]
    assert "/x" in other


@pytest.mark.parametrize("text", ["[engine", "engine = 1\n", "[engine]\nruntimes = 1\n", "\xff"])
def test_strange_configurations(tmp_path: Path, text: str) -> None:
    """A clear refusal or an installation; never a traceback."""
    (tmp_path / "containers.conf").write_bytes(text.encode("latin-1"))
    try:
        install(tmp_path)
        assert config.uninstall(tmp_path)
    except UsageError as error:
        assert "containers.conf" in error.message
    assert [path.name for path in tmp_path.iterdir()] == ["containers.conf"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"made": 1, "written": {}}'])
def test_a_damaged_note(tmp_path: Path, text: str) -> None:
    """Without the note nothing is known to be ours."""
    install(tmp_path)
    (tmp_path / config.NOTE).write_text(text)
    with pytest.raises(UsageError, match="not as mis-run wrote it"):
        config.uninstall(tmp_path)


def test_a_file_of_another_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mis docker status compares the programs."""
    install(tmp_path)
    monkeypatch.setattr(config, "find_program", lambda name: Path("/usr/bin") / name)
    assert all(
        "another version or place" in how for how in config.status(tmp_path)["files"].values()
    )
    assert os.listdir(tmp_path)
