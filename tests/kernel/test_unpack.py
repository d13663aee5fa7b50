"""Layers unpacked, hostile ones above all: nothing leads out, nothing is more than the agent may.

Needs root for what a layer has (owners, whiteouts). Each refused layer has its harmless twin, which
is unpacked: a refusal of everything would not pass.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layouts
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import entry, folder, hardlink, sha, symlink

from mis_run.errors import SetupError
from mis_run.images import aside, blobs, layer, unpack
from mis_run.images.layout import Layer

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners and whiteouts take root"),
]
Member = tuple[tarfile.TarInfo, bytes]


def put(tree: Path, *members: Member) -> unpack.Contents:
    """Unpacked without the other process and its root directory: the first line of defence."""
    tree.mkdir(exist_ok=True)
    return unpack.Unpacker(str(tree)).all(io.BytesIO(layouts.tar(members)))


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the tree that no layer may change."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "file").write_text("untouched")
    yield place
    assert [(e.name, e.read_text()) for e in place.iterdir()] == [("file", "untouched")]


def test_an_ordinary_layer(tmp_path: Path) -> None:
    """Files, folders, links, owners, modes and times are as the tar says."""
    tree = tmp_path / "tree"
    contents = put(
        tree,
        folder("./", mode=0o750),
        folder("app", uid=1000, gid=1001, mode=0o2770, mtime=1000),
        entry("app/x", b"data", uid=1000, mode=0o640, mtime=1234),
        symlink("app/up", "../../../../etc/passwd"),
        hardlink("app/y", "./app/x"),
        entry("deep/er/file", b"1"),
        entry("app/pipe", type=tarfile.FIFOTYPE),
    )
    assert (contents.members, contents.size, contents.devices) == (7, 5, 0)
    facts = (tree / "app/x").stat()
    assert (facts.st_uid, facts.st_nlink, stat.S_IMODE(facts.st_mode)) == (1000, 2, 0o640)
    assert (facts.st_mtime, (tree / "app").stat().st_mtime) == (1234, 1000)
    assert stat.S_IMODE(tree.stat().st_mode) == 0o750
    assert stat.S_IMODE((tree / "app").stat().st_mode) == 0o2770
    assert (tree / "app/up").readlink() == Path("../../../../etc/passwd")
    assert (tree / "deep/er/file").read_text() == "1"
    assert (tree / "app/pipe").is_fifo()


REFUSED: dict[str, tuple[list[Member], list[Member]]] = {
    # name: (hostile, harmless twin)
    "dot-dot": ([entry("../outside/file", b"x")], [entry("a/outside/file", b"x")]),
    "dot-dot-inside": ([entry("a/../../outside/file", b"x")], [entry("a/b/file", b"x")]),
    "dot-dot-folder": ([folder("..")], [folder("...")]),
    "through-link": (
        [symlink("a", "../outside"), entry("a/file", b"x")],
        [folder("a"), entry("a/file", b"x")],
    ),
    "through-absolute-link": (
        [symlink("a", "/"), folder("a/b"), entry("a/b/c", b"x")],
        [symlink("a", "/"), folder("d/b")],
    ),
    "link-in-place-of-folder": (
        [folder("a"), entry("a/1", b""), symlink("a", "../outside"), entry("a/file", b"x")],
        [folder("a"), entry("a/1", b""), symlink("a", "../outside"), entry("b/file", b"x")],
    ),
    "hard-link-out": ([hardlink("a", "../outside/file")], [entry("b"), hardlink("a", "b")]),
    "hard-link-through-link": (
        [symlink("l", "../outside"), hardlink("a", "l/file")],
        [folder("l"), entry("l/file"), hardlink("a", "l/file")],
    ),
    "hard-link-to-nothing": ([hardlink("a", "b")], [entry("b"), hardlink("a", "/b")]),
    "hard-link-to-folder": ([folder("b"), hardlink("a", "b")], [entry("b"), hardlink("a", "b")]),
    "hard-link-to-itself": ([entry("a"), hardlink("a", "a")], [entry("b"), hardlink("a", "b")]),
    "hard-link-to-whiteout": (
        [entry(".wh.b"), hardlink("a", "b")],
        [entry("b"), hardlink("a", "b")],
    ),
    "whiteout-of-dot-dot": ([entry("a/.wh..."), entry("a/.wh...")], [entry("a/.wh.x")]),
    "whiteout-of-nothing": ([entry("a/.wh.")], [entry("a/.wh.b")]),
    "whiteout-through-link": (
        [symlink("l", "../outside"), entry("l/.wh.file")],
        [folder("l"), entry("l/.wh.file")],
    ),
    "opaque-through-link": (
        [symlink("l", "../outside"), entry("l/.wh..wh..opq")],
        [folder("l"), entry("l/.wh..wh..opq")],
    ),
    "root-is-a-link": ([symlink("./", "/")], [folder("./")]),
    "root-is-a-file": ([entry(".", b"x")], [entry("x", b"x")]),
    "owner-out-of-range": ([entry("a", uid=2**32)], [entry("a", uid=2**32 - 2)]),
    "deep": ([entry("/".join("a" * 300))], [entry("/".join("a" * 200))]),
    "long": ([entry("/".join(["b" * 200] * 20))], [entry("/".join(["b" * 200] * 10))]),
    "file-as-folder": ([entry("a", b"x"), entry("a/b", b"x")], [folder("a"), entry("a/b", b"x")]),
    "empty-link": ([symlink("a", "")], [symlink("a", "b")]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_layers_are_refused(case: str, tmp_path: Path, outside: Path) -> None:
    """Each is refused; its twin is not; what is beside the tree stays as it is."""
    hostile, harmless = REFUSED[case]
    put(tmp_path / "twin", *harmless)
    with pytest.raises(unpack.Refused):
        put(tmp_path / "tree", *hostile)


def test_absolute_names_stay_inside(tmp_path: Path, outside: Path) -> None:
    """A leading slash means the layer's own root."""
    put(tmp_path / "tree", entry(f"{outside}/file", b"x"))
    assert (tmp_path / f"tree/{outside}/file").read_bytes() == b"x"


def test_what_is_left_out(tmp_path: Path) -> None:
    """Devices, set-uid and set-gid bits, extended attributes."""
    tree = tmp_path / "tree"
    orders = {"SCHILY.xattr.trusted.overlay.redirect": "/", "SCHILY.xattr.user.x": "1"}
    contents = put(
        tree,
        entry("disk", type=tarfile.BLKTYPE, devmajor=8, devminor=0),
        entry("gone", type=tarfile.CHRTYPE, devmajor=0, devminor=0),
        entry("su", b"x", mode=0o6755),
        folder("dir", pax_headers=orders),
    )
    assert contents.devices == 2
    assert sorted(os.listdir(tree)) == ["dir", "su"]
    assert stat.S_IMODE((tree / "su").stat().st_mode) == 0o755
    assert os.listxattr(tree / "dir") == []


def test_whiteouts(tmp_path: Path) -> None:
    """They hide what is below, never what the same layer has, before or after them."""
    tree = tmp_path / "tree"
    put(
        tree,
        entry("d/.wh.gone"),
        entry("d/.wh.file"),
        entry("d/file", b"new"),
        entry("e/file", b"new"),
        entry("e/.wh.file"),
        entry("f/.wh.sub"),
        entry("f/sub/new", b"1"),
        folder("g/sub"),
        entry("g/.wh.sub"),
        entry("h/.wh..wh..opq"),
        entry("h/.wh..wh.plnk"),
    )
    gone = (tree / "d/gone").stat()
    assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0
    assert [(tree / f"{x}/file").read_text() for x in "de"] == ["new", "new"]
    for name in ("f/sub", "g/sub", "h"):
        assert os.getxattr(tree / name, "trusted.overlay.opaque") == b"y"
    assert sorted(os.listdir(tree / "h")) == []
    assert os.listxattr(tree / "d") == []


def test_later_members_replace_earlier_ones(tmp_path: Path) -> None:
    """A folder's content goes with it; a folder named twice stays."""
    tree = tmp_path / "tree"
    put(
        tree,
        folder("a"),
        entry("a/x", b"1"),
        entry("a", b"now a file"),
        folder("b", mtime=5),
        entry("b/x", b"1"),
        folder("b", mode=0o700, mtime=9),
        entry("c", b"1"),
        entry("c", b"22"),
        symlink("d", "c"),
        entry("d", b"not through it"),
    )
    assert (tree / "a").read_text() == "now a file"
    assert (tree / "b/x").exists() and (tree / "b").stat().st_mtime == 9
    assert (tree / "c").read_text() == "22"
    assert (tree / "d").read_text() == "not through it"


# ---- amounts ----------------------------------------------------------------------------------


def test_amounts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members, bytes and free space; one less of each is unpacked."""
    members = [entry(f"f{n}", b"x" * 100) for n in range(10)]
    data = layouts.tar(members)
    unpack.Unpacker(str(tmp_path), most=1000).all(io.BytesIO(data))
    with pytest.raises(unpack.Refused, match="999 bytes"):
        unpack.Unpacker(str(tmp_path), most=999).all(io.BytesIO(data))
    monkeypatch.setattr(unpack, "MOST_MEMBERS", 10)
    put(tmp_path / "ten", *members)
    monkeypatch.setattr(unpack, "MOST_MEMBERS", 9)
    with pytest.raises(unpack.Refused, match="more than 9"):
        put(tmp_path / "nine", *members)
    monkeypatch.setattr(unpack, "MOST_MEMBERS", 10)
    monkeypatch.setattr(unpack, "RESERVE", 1 << 60)
    with pytest.raises(unpack.Refused, match="stay free"):
        put(tmp_path / "full", *members)


def test_holes_take_no_space(tmp_path: Path) -> None:
    """A file of zeros is one hole; its size is what the tar says."""
    put(tmp_path / "tree", entry("holes", b"\0" * (8 << 20) + b"end"))
    facts = (tmp_path / "tree/holes").stat()
    assert facts.st_size == (8 << 20) + 3
    assert facts.st_blocks * 512 < 1 << 20
    assert (tmp_path / "tree/holes").read_bytes()[-4:] == b"\0end"


# ---- the other process ------------------------------------------------------------------------


class Memory:
    """Blobs of a test."""

    where = "memory"

    def __init__(self, **files: bytes) -> None:
        self.files = files

    def names(self) -> frozenset[str]:
        return frozenset(self.files)

    def open(self, name: str) -> Any:
        return io.BytesIO(self.files[name])


HELLO = layouts.tar([entry("hello", b"hi"), entry(".wh.x")])


def test_a_layer_is_checked_while_it_is_unpacked(tmp_path: Path) -> None:
    """Plain, gzip and zstd; each wrong digest or size is refused, and nothing else."""
    zstandard = pytest.importorskip("zstandard")
    kinds = (HELLO, gzip.compress(HELLO), zstandard.ZstdCompressor().compress(HELLO))
    for number, blob in enumerate(kinds):

        def tree(name: str, number: int = number) -> Path:
            place = tmp_path / f"{name}{number}"
            place.mkdir()
            return place

        source = Memory(a=blob)
        good = Layer(sha(HELLO), "a", sha(blob), len(blob))
        assert layer.unpack(source, good, tree("good"))["members"] == 2
        assert (tmp_path / f"good{number}/hello").read_text() == "hi"
        for wrong, match in (
            (Layer(sha(b""), "a", sha(blob), len(blob)), "its tar has the digest"),
            (Layer(sha(HELLO), "a", sha(b""), len(blob)), "the blob sha256:.* has the digest"),
            (Layer(sha(HELLO), "a", sha(blob), len(blob) - 1), "more than"),
        ):
            with pytest.raises(SetupError, match=match):
                layer.unpack(source, wrong, tree(match[:7].replace(" ", "-")))


@pytest.mark.parametrize(
    "blob", [b"", b"\x1f\x8bxx", HELLO[:600], b"x" * 1000, gzip.compress(HELLO)[:-5]]
)
def test_damaged_layers(blob: bytes, tmp_path: Path) -> None:
    """A message with the layer's digest; the whole layer passes (above)."""
    with pytest.raises(SetupError, match="memory: layer sha256:"):
        layer.unpack(Memory(a=blob), Layer(sha(HELLO), "a"), tmp_path)


def test_a_bomb_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small blob of much tar ends at the limit, not at the disk's."""
    monkeypatch.setattr(layer, "MOST_BYTES", 4 << 20)
    bomb = gzip.compress(HELLO + b"\0" * (16 << 20))
    assert len(bomb) < 1 << 20
    with pytest.raises(SetupError, match="the tar has more than"):
        layer.unpack(Memory(a=bomb), Layer(sha(HELLO), "a"), tmp_path)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs aside cannot take the machine's memory; a little it can."""
    monkeypatch.setattr(aside, "MEMORY", 64 << 20)
    assert aside.run("test", lambda: {"size": len(bytearray(1 << 20))}) == {"size": 1 << 20}
    with pytest.raises(SetupError, match="MemoryError"):
        aside.run("test", lambda: {"size": len(bytearray(256 << 20))})


def test_what_dies_aside_is_told() -> None:
    """Neither silence nor a hang."""
    with pytest.raises(SetupError, match="ended with -9"):
        aside.run("test", lambda: os.kill(os.getpid(), 9))  # type: ignore[arg-type, return-value]


def test_the_other_process_sees_only_the_tree(tmp_path: Path) -> None:
    """Its root directory is the tree: even a link that were followed would stay inside."""
    seen: list[Member] = [symlink("link", "/etc/passwd")]
    tree = tmp_path / "tree"
    tree.mkdir()
    data = layouts.tar(seen)
    real = unpack.Unpacker.all

    def spy(self: unpack.Unpacker, stream: Any) -> unpack.Contents:
        contents = real(self, stream)
        contents.devices = int(os.path.exists("/link"))  # followed by the kernel
        return contents

    patch = pytest.MonkeyPatch()
    patch.setattr(unpack.Unpacker, "all", spy)
    try:
        assert layer.unpack(Memory(a=data), Layer(sha(data), "a"), tree)["devices"] == 0
    finally:
        patch.undo()
    assert os.path.exists(tree / "link")  # the control: from here it leads to the host's file


# ---- anything ---------------------------------------------------------------------------------

NAMES = st.lists(
    st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq", ".wh...", "etc"]),
    min_size=1,
    max_size=4,
).map("/".join)
KINDS = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
    + [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE, b"Z"]
)
TARGETS = NAMES | st.sampled_from(["/", "../outside", "/../../outside/file", "outside/file", "a/b"])
MEMBERS = st.lists(
    st.builds(
        lambda name, kind, target, mode: entry(
            name, b"x" if kind == tarfile.REGTYPE else b"", type=kind, linkname=target, mode=mode
        ),
        NAMES,
        KINDS,
        TARGETS,
        st.integers(0, 0o7777),
    ),
    max_size=12,
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(members=MEMBERS)
def test_any_members_stay_inside(members: list[Member], tmp_path: Path, outside: Path) -> None:
    """Whatever they are called and point to: unpacked or refused, and nothing outside changes."""
    tree = tmp_path / os.urandom(8).hex()
    try:
        put(tree, *members)
    except (unpack.Refused, *blobs.UNREADABLE):
        pass
    assert (outside / "file").read_text() == "untouched"
    assert os.listdir(outside) == ["file"]
    for place, folders, names in os.walk(tree):
        for name in (*folders, *names):
            mode = os.lstat(f"{place}/{name}").st_mode
            assert stat.S_ISDIR(mode) or not mode & 0o6000
            assert not stat.S_ISBLK(mode)
            assert not stat.S_ISCHR(mode) or os.lstat(f"{place}/{name}").st_rdev == 0


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(min_size=1, max_size=700), at=st.integers(0, len(HELLO)))
def test_any_bytes_are_a_layer_or_a_message(noise: bytes, at: int, tmp_path: Path) -> None:
    """Noise over a real layer is never taken for it, and never more than a message."""
    data = HELLO[:at] + noise + HELLO[at + len(noise) :]
    tree = tmp_path / os.urandom(8).hex()
    tree.mkdir()
    if data == HELLO:
        return
    with pytest.raises(SetupError, match="memory: layer"):
        layer.unpack(Memory(a=data), Layer(sha(HELLO), "a"), tree)
