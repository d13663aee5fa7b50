"""Profiles: what is built in, how they merge, and that a wrong one says exactly what is wrong."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_run import profile_text, profiles, schema, sets, units
from mis_run.dataclass import replace
from mis_run.errors import ProfileError, UsageError
from mis_run.model import NetMode

BUILT_IN = ("ci-untrusted", "coding-agent", "default", "python-agent", "trace")
ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str, name: str = "mine") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_profiles_load_and_render_back(name: str, tmp_path: Path) -> None:
    """Every built-in profile loads, and what `mis profile show` prints loads to the same."""
    profile = profiles.load(name)
    again = profiles.load(str(write(tmp_path, profiles.render(profile))))
    same = {key: getattr(profile, key) for key in ("name", "source", "sources")}
    assert replace(again, **same) == profile


def test_catalogue_names_the_built_in_profiles() -> None:
    """`mis profile list` knows them all, each with a description."""
    found = {name: text for name, _, text in profiles.catalogue()}
    assert set(BUILT_IN) <= set(found)
    assert all(found[name] for name in BUILT_IN)


def test_extends_overrides_and_inherits(tmp_path: Path) -> None:
    """Single values override; a list replaces, or continues with \"...\"."""
    write(
        tmp_path,
        'extends = "default"\n[network]\nallow = ["192.0.2.1:1"]\n[limits]\npids = 9\n',
        "parent",
    )
    child = write(
        tmp_path, 'extends = "./parent.toml"\n[network]\nallow = ["...", "192.0.2.2:2"]\n'
    )
    found = profiles.load(str(child))
    assert found.network.allow == ("192.0.2.1:1", "192.0.2.2:2")
    assert found.limits.pids == 9
    assert found.limits.memory == profiles.load("default").limits.memory


@pytest.mark.parametrize("action", ["log", "defcon", "freeze", "kill"])
def test_what_follows_from_a_limit_is_inherited_and_shown(action: str, tmp_path: Path) -> None:
    """Each key by itself, and `mis profile show` prints it so that it loads back."""
    write(tmp_path, f'extends = "default"\n[limits]\non_oom = "{action}"\n', "parent")
    path = write(tmp_path, 'extends = "./parent.toml"\n[limits]\non_pids = "kill"\n')
    limits = profiles.load(str(path)).limits
    assert (limits.on_oom, limits.on_pids, limits.on_throttled) == (action, "kill", "log")
    shown = profiles.render(profiles.load(str(path)))
    assert f'on_oom = "{action}"' in shown
    assert profiles.load(str(write(tmp_path, shown, "shown"))).limits == limits


@pytest.mark.parametrize(
    ("text", "line", "words", "hint"),
    [
        ("[network]\nmod = 'none'", 2, "network.mod: unknown key", "'mode'"),
        ("[netwrk]\nmode = 'none'", 1, "netwrk: unknown key", "'network'"),
        ("[network]\nmode = 'guraded'", 2, "network.mode", "'guarded'"),
        ("\n\n[limits]\nmemory = true", 4, "limits.memory", ""),
        ("[limits]\nmemory = '1K'", 2, "too little", "6M"),
        ("[limits]\ncpus = 0", 2, "cores go from", ""),
        ("[limits]\npids = 0", 2, "limits.pids", ""),
        ("[limits]\npids = 9\non_pids = 'kil'", 3, "limits.on_pids: 'kil' is not", "'kill'"),
        ("[limits]\non_oom = 'defkon'", 2, "limits.on_oom", "'defcon'"),
        ("[limits]\non_throttled = 'stop'", 2, "limits.on_throttled", "log, defcon, freeze, kill"),
        ("[limits]\non_presure = 'log'", 2, "limits.on_presure: unknown key", "'on_pressure'"),
        ("[limits]\n# memory = 1\n'memory' = '2 bananas'", 3, "no size", ""),
        ("[network]\nallow = [\n 'x:y:z',\n]", 2, "network.allow", ""),
        ("[network]\nlisten = ['example.com']", 2, "needs an address", ""),
        ("[files]\nread = ['@secret']", 2, "unknown set", "@secrets"),
        ("[files]\nread = ['relative/path']", 2, "no absolute path", ""),
        ("[files]\nread = ['/a/../b']", 2, "'..'", ""),
        ("[exec]\nallow = ['/bin/x#sha256:12']", 2, "64 hexadecimal", ""),
        ("[require]\nguarantees = ['nett']", 2, "not one of", "'net'"),
        ("[defcon]\nthresholds = [3, 2, 1, 0]", 2, "defcon.thresholds", ""),
        ("[defcon]\n\ntainted = 5", 3, "defcon.tainted: 5 is not between 0 and 4", "4 (warning)"),
        ("[defcon]\ntainted = true", 2, "defcon.tainted: must be a whole number", "only recorded"),
        ("[files]\ntaint = ['customers']", 2, "files.taint: 'customers' is no absolute", "begin"),
        ("[files]\ntaint = '/x'", 2, "files.taint: must be a list", ""),
        ("[files]\ntaints = []", 2, "files.taints: unknown key", "'taint'"),
        ("[liveness]\ndeadline = '100ms'\nbeat = '100ms'", 2, "two beats", ""),
        ("[counters]\nevents = ['cycels']", 2, "counters.events", "'cycles'"),
        ("network = 3", 1, "must be a section", ""),
        ("extends = 'defualt'", 1, "no profile 'defualt'", "default"),
        ("limits.memory = 3.5", 1, "limits.memory", ""),
    ],
)
def test_errors_name_file_line_and_key(
    text: str, line: int, words: str, hint: str, tmp_path: Path
) -> None:
    """Each wrong profile gives its file, the line of the key, the problem, and the nearest name."""
    path = write(tmp_path, text)
    with pytest.raises(ProfileError) as raised:
        profiles.load(str(path))
    assert raised.value.message.startswith(f"{path}:{line}: "), raised.value.message
    assert words in raised.value.message
    assert hint in raised.value.hint


def test_circles_and_depth_are_refused(tmp_path: Path) -> None:
    """extends cannot go round or down without end."""
    write(tmp_path, 'extends = "./b.toml"', "a")
    write(tmp_path, 'extends = "./a.toml"', "b")
    with pytest.raises(ProfileError, match="circle"):
        profiles.load(str(tmp_path / "a.toml"))
    for number in range(12):
        write(tmp_path, f'extends = "./p{number + 1}.toml"', f"p{number}")
    with pytest.raises(ProfileError, match="deeper"):
        profiles.load(str(tmp_path / "p0.toml"))


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    """A folder, a fifo, a huge file, bytes, a missing file, one anybody may write: all refused."""
    import os

    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "huge.toml").write_text("#" * (profiles.MOST_BYTES + 1))
    (tmp_path / "bytes.toml").write_bytes(b"a = '\xff'")
    write(tmp_path, "", "open").chmod(0o666)
    for name in ("fifo", "folder", "huge", "bytes", "open", "missing"):
        with pytest.raises(ProfileError):
            profiles.load(str(tmp_path / f"{name}.toml"))
    for name in ("../etc/passwd", "a/../b.toml", "", "x" * 500, "a\0b", "..", "a b"):
        with pytest.raises(ProfileError):
            profiles.load(name)


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_profile_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    """Arbitrary bytes never give anything but a Profile or a ProfileError."""
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(raw)
    with contextlib.suppress(ProfileError):
        profiles.load(str(path))


values = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(-10, 10**18),
        st.floats(allow_nan=True),
        st.text(max_size=12),
        st.sampled_from(["none", "@secrets", "2G", "1s", "*:80", "...", "cycles", "/**"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)
keys = st.sampled_from([key for section in schema.SECTIONS.values() for key in section] + ["bogus"])
sections = st.sampled_from([name for name in schema.SECTIONS if name] + ["bogus"])


@settings(max_examples=400)
@given(st.dictionaries(sections, st.one_of(values, st.dictionaries(keys, values, max_size=4))))
def test_any_values_are_a_profile_or_an_error(data: dict[str, object]) -> None:
    """Any TOML-shaped data either builds or is refused with a ProfileError."""
    try:
        schema.check(data, schema.Place("fuzz.toml", ""))
    except ProfileError:
        return
    schema.build(data, name="fuzz", sources=["fuzz.toml"])


def test_expand_fills_in_home_workspace_and_sets() -> None:
    """Patterns are resolved at plan time; an unknown variable or set is an error."""
    facts = {"HOME": "/home/kim", "WORKSPACE": "/srv/work"}
    found = sets.expand(["~/.cache", "$WORKSPACE/.git", "@workspace", "/etc"], facts)
    assert found == ("/home/kim/.cache", "/srv/work/.git", "/srv/work/**", "/etc")
    for bad in ("$NOTHING/x", "@nothing"):
        with pytest.raises(UsageError):
            sets.expand([bad], facts)


def test_the_reference_is_generated_from_the_code() -> None:
    """docs/profile-reference.md is what `python -m mis_run.profile_text` prints."""
    assert (ROOT / "docs/profile-reference.md").read_text() == profile_text.reference()


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.size, "512M", 512 << 20),
        (units.size, "1.5GiB", 3 << 29),
        (units.size, "4096", 4096),
        (units.duration, "100ms", 0.1),
        (units.duration, "30m", 1800.0),
        (units.duration, "2", 2.0),
        (units.cores, "1.5", 1.5),
        (units.count, "256", 256),
    ],
)
def test_units(read: object, text: str, value: float) -> None:
    """Sizes, times, cores and counts are read as people write them."""
    assert callable(read)
    assert read(text) == value


@given(st.text(max_size=12))
def test_units_refuse_everything_else(text: str) -> None:
    """Any text is a number or a UsageError."""
    for read in (units.size, units.duration, units.cores, units.count):
        with contextlib.suppress(UsageError):
            assert read(text) >= 0


def test_trace_denies_nothing() -> None:
    """The trace profile is audit only, and no profile but it is."""
    assert not profiles.load("trace").enforce
    assert all(profiles.load(name).enforce for name in BUILT_IN if name != "trace")
    assert profiles.load("ci-untrusted").network.mode is NetMode.NONE


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_was_made_of_a_profile_is_the_profile(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`build` leaves the built-in ones as JSON; without it, or with that of another text, the
    file is read itself, and says the same."""
    ready = profiles.load(name)
    assert (profiles.BUILT / f"{name}.json").exists()  # the control: that was the quick way
    monkeypatch.setattr(profiles, "BUILT", tmp_path)
    assert profiles.load(name) == ready
    stale = {"text": "description = 'old'", "values": {"description": "old"}}
    (tmp_path / f"{name}.json").write_text(json.dumps(stale))
    assert profiles.load(name) == ready
