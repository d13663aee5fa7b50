"""``--image`` before anything is unpacked: references, layouts, archives, users, and the plan.

What is read here may have been made to deceive: whatever it is, it gives an image or one message.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import layouts
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import Layout, sha

from mis_run import cli, masks, plan, profiles
from mis_run.dataclass import replace
from mis_run.errors import MisError, NotFound, SetupError, UsageError
from mis_run.host import Caller
from mis_run.images import blobs, config, engine, layout, words
from mis_run.images.accounts import Accounts, user
from mis_run.model import Host, Image, Options, User
from mis_run.options import parse

FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SETTINGS = {
    "User": "agent:staff",
    "Env": ["PATH=/app/bin", "X=a=b"],
    "Entrypoint": ["/entry"],
    "Cmd": ["serve", "--fast"],
    "WorkingDir": "/app",
}
HELLO = layouts.tar([layouts.entry("hello", b"hi")])


def found(path: Path, tag: str = "") -> layout.Found:
    return layout.find(blobs.Folder(path), f"oci:{path}", tag)


# ---- references -------------------------------------------------------------------------------


def test_references(tmp_path: Path) -> None:
    """Names are for an engine; a path is a layout or an archive by what is there."""
    folder, file = tmp_path / "lay", tmp_path / "a:b.tar"
    folder.mkdir()
    file.touch()
    for text in ("debian", "debian:12", "host:5000/a/b:1.2-x", "a@sha256:" + "0" * 64):
        assert words.read(text) == words.Wanted(text, words.Kind.ENGINE, name=text)
    for text, tag in ((f"oci:{folder}", ""), (f"{folder}", ""), (f"{folder}:v1", "v1")):
        read = words.read(text)
        assert (read.kind, read.path, read.tag) == (words.Kind.LAYOUT, folder, tag)
    for text, tag in ((f"{file}", ""), (f"archive:{file}:x/y:1", "")):
        if tag or text == str(file):
            assert words.read(text).kind is words.Kind.ARCHIVE
    assert words.read(f"docker-archive:{file}:v1").tag == "v1"


BAD_REFERENCES = [
    "",
    " ",
    "a b",
    "-x",
    "../x",
    "/no/such",
    "oci:",
    "oci:/no/such:1",
    "a//b",
    "a/../b",
]
BAD_REFERENCES += ["~nobody-of-this-name/x", "x" * 300, "oci:/tmp:" + "!", "a@sha256:00", "oci:/\0"]
BAD_REFERENCES += ["./" + "y" * 5000, "archive:/tmp", "oci:/etc/passwd"]


@pytest.mark.parametrize("text", BAD_REFERENCES)
def test_bad_references(text: str) -> None:
    """A message and a hint, whatever was typed."""
    with pytest.raises(UsageError) as caught:
        words.read(text)
    assert caught.value.hint


@FEW
@given(st.text(max_size=60))
def test_any_reference_is_read_or_refused(text: str) -> None:
    """Whatever is typed."""
    try:
        words.read(text)
    except UsageError as error:
        assert error.message


# ---- layouts ----------------------------------------------------------------------------------


def test_a_layout_becomes_an_image(tmp_path: Path) -> None:
    """Digests, layers lowest first, and the image's own words."""
    made = Layout(tmp_path / "lay")
    second = layouts.tar([layouts.entry("b", b"2")])
    made.add([HELLO, second], SETTINGS, tag="v1")
    read = found(made.path, "v1")
    image = read.image
    assert image.layers == (sha(HELLO), sha(second))
    assert [one.diff for one in read.layers] == list(image.layers)
    assert (image.user, image.workdir) == ("agent:staff", "/app")
    assert image.env == (("PATH", "/app/bin"), ("X", "a=b"))
    assert (image.entrypoint, image.command) == (("/entry",), ("serve", "--fast"))
    assert found(made.path).image == image  # one image needs no tag


def test_the_image_of_a_tag_and_of_this_machine(tmp_path: Path) -> None:
    """Of several, the tag decides, then the platform, also in an index in the index."""
    made = Layout(tmp_path / "lay")
    made.add([HELLO], {"User": "1"}, tag="one")
    made.add([HELLO], {"User": "2"}, tag="two")
    assert found(made.path, "two").image.user == "2"
    with pytest.raises(NotFound, match="several images") as several:
        found(made.path)
    assert "one, two" in several.value.hint
    with pytest.raises(NotFound, match="'three'"):
        found(made.path, "three")
    nested = Layout(tmp_path / "nested")
    nested.add([HELLO], arch="other")
    nested.add([HELLO], {"User": "mine"})
    note = {"mediaType": "x", "digest": sha(b""), "size": 0, "platform": {"os": "unknown"}}
    inner = nested.object({"manifests": [*nested.manifests, note]}, layouts.INDEX)
    nested.manifests = [inner]
    nested.write()
    assert found(nested.path).image.user == "mine"


def test_an_image_for_another_machine(tmp_path: Path) -> None:
    """The index, or where that says nothing the configuration, tells."""
    made = Layout(tmp_path / "lay")
    made.add([HELLO], arch="pdp11")
    for _ in range(2):
        with pytest.raises(SetupError, match=r"linux/pdp11, this machine is linux/") as caught:
            found(made.path)
        assert "--platform" in caught.value.hint
        made.manifests[0].pop("platform", None)
        made.write()


def break_index(made: Layout) -> None:
    (made.path / "index.json").write_text("{")


def break_nothing_there(made: Layout) -> None:
    (made.path / "index.json").unlink()


def break_manifest(made: Layout) -> None:
    name = made.manifests[0]["digest"].removeprefix("sha256:")
    with (made.path / "blobs/sha256" / name).open("ab") as file:
        file.write(b" ")


def break_size(made: Layout) -> None:
    made.manifests[0]["size"] += 1
    made.write()


def break_digest_kind(made: Layout) -> None:
    made.manifests[0]["digest"] = "md5:00"
    made.write()


def break_digest_path(made: Layout) -> None:
    made.manifests[0]["digest"] = "sha256:../../../../etc/passwd"
    made.write()


def break_missing_blob(made: Layout) -> None:
    name = made.manifests[0]["digest"].removeprefix("sha256:")
    (made.path / "blobs/sha256" / name).unlink()


def break_pipe(made: Layout) -> None:
    name = made.manifests[0]["digest"].removeprefix("sha256:")
    (made.path / "blobs/sha256" / name).unlink()
    os.mkfifo(made.path / "blobs/sha256" / name)


def break_deep(made: Layout) -> None:
    (made.path / "index.json").write_text("[" * 100_000)


def break_huge(made: Layout) -> None:
    with (made.path / "index.json").open("wb") as file:
        file.truncate(blobs.MOST_TEXT + 1)


def break_loop(made: Layout) -> None:
    made.manifests = [{"mediaType": layouts.INDEX, "digest": 5, "size": 1}]
    made.write()


def break_empty(made: Layout) -> None:
    made.manifests = []
    made.write()


BREAKS = [value for name, value in sorted(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__.removeprefix("break_"))
def test_a_broken_layout_is_one_message(broken: Callable[[Layout], None], tmp_path: Path) -> None:
    """It names the folder; before it was broken the same layout was an image."""
    made = Layout(tmp_path / "lay")
    made.add([HELLO])
    assert found(made.path).image.layers
    broken(made)
    with pytest.raises(MisError) as caught:
        found(made.path)
    assert str(made.path) in caught.value.message


BAD_CONFIGS: list[Any] = [
    [],
    {},
    {"rootfs": {"diff_ids": []}},
    {"rootfs": {"diff_ids": ["sha256:0"]}},
    {"rootfs": {"diff_ids": [sha(b"")] * 200}},
    {"config": []},
    {"config": {"Env": ["novalue"]}},
    {"config": {"Env": ["=x"]}},
    {"config": {"Env": ["A=\0"]}},
    {"config": {"Env": "A=1"}},
    {"config": {"Cmd": [1]}},
    {"config": {"Entrypoint": "sh"}},
    {"config": {"User": 5}},
    {"config": {"WorkingDir": "/a/../.."}},
    {"os": "windows"},
]


@pytest.mark.parametrize("change", BAD_CONFIGS, ids=str)
def test_bad_configurations(change: Any) -> None:
    """Each wrong value is named; the same without it is an image."""
    good = {"os": "linux", "architecture": config.machine(), "rootfs": {"diff_ids": [sha(b"")]}}
    assert config.image("x", "d", good).layers == (sha(b""),)
    with pytest.raises(SetupError, match="image x"):
        config.image(
            "x", "d", {**good, **change} if isinstance(change, dict) and change else change
        )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ("os", "architecture", "rootfs", "config", "manifests", "layers", "digest", "size")


@FEW
@given(data=st.dictionaries(st.sampled_from(KEYS), json_values), as_index=st.booleans())
def test_any_json_is_an_image_or_a_message(
    data: dict[str, Any], as_index: bool, tmp_path: Path
) -> None:
    """As a configuration, and as an index."""
    made = Layout(tmp_path / hashlib.sha256(os.urandom(8)).hexdigest())
    if as_index:
        (made.path / "index.json").write_text(json.dumps(data))
    else:
        inner = {"config": made.object(data), "layers": data.get("layers", [])}
        made.manifests = [made.object(inner, layouts.MANIFEST)]
        made.write()
    try:
        found(made.path)
    except MisError as error:
        assert error.message


# ---- archives ---------------------------------------------------------------------------------


def test_archives(tmp_path: Path) -> None:
    """The tar of a layout, and what older engines save, are the same image."""
    made = Layout(tmp_path / "lay")
    made.add([HELLO], SETTINGS, tag="v1", compress=False)
    image = found(made.path).image
    with blobs.archive(made.archive(tmp_path / "oci.tar")) as opened:
        assert layout.find(opened, image.name, "v1").image == image
    name = image.digest.removeprefix("sha256:")
    text = (made.path / "blobs/sha256" / name).read_bytes()
    listed = [{"Config": f"{name}.json", "RepoTags": ["a/b:v1"], "Layers": ["x/layer.tar"]}]
    members = [
        layouts.entry(f"{name}.json", text),
        layouts.entry("y/layer.tar", HELLO),
        layouts.symlink("x/layer.tar", "../y/layer.tar"),
        layouts.entry("manifest.json", json.dumps(listed).encode()),
    ]
    (tmp_path / "old.tar").write_bytes(layouts.tar(members))
    with blobs.archive(tmp_path / "old.tar") as opened:
        read = layout.find(opened, image.name, "v1")
        assert read.image == image
        assert read.blobs.open(read.layers[0].name).read() == HELLO
        with pytest.raises(NotFound, match="v2"):
            layout.find(opened, image.name, "v2")


def test_what_is_no_archive(tmp_path: Path) -> None:
    """Rubbish, an empty file, a compressed one, a configuration that is not what its name says."""
    for name, data in (("rubbish", b"x" * 2000), ("zipped", b"\x1f\x8b" + b"x" * 2000)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SetupError, match=name), blobs.archive(tmp_path / name):
            pass
    listed = [{"Config": "c.json", "Layers": []}]
    members = [
        layouts.entry("c.json", b"{}"),
        layouts.entry("manifest.json", json.dumps(listed).encode()),
    ]
    (tmp_path / "wrong").write_bytes(layouts.tar(members))
    with blobs.archive(tmp_path / "wrong") as opened, pytest.raises(SetupError, match="its name"):
        layout.find(opened, "x", "")


@FEW
@given(noise=st.binary(max_size=1500), at=st.integers(0, 4000))
def test_any_bytes_are_an_archive_or_a_message(noise: bytes, at: int, tmp_path: Path) -> None:
    """Noise over a real archive."""
    made = Layout(tmp_path / os.urandom(8).hex())
    made.add([HELLO])
    path = made.archive(made.path.with_suffix(".tar"))
    data = path.read_bytes()
    path.write_bytes(data[:at] + noise + data[at + len(noise) :])
    try:
        with blobs.archive(path) as opened:
            layout.find(opened, "x", "")
    except MisError as error:
        assert error.message


# ---- users ------------------------------------------------------------------------------------

IMAGE = Image(name="x", digest="sha256:0", layers=(sha(b""),))
PEOPLE = Accounts(
    "root:x:0:0::/root:/bin/sh\nagent:x:1000:1001::/home/agent:/bin/sh\nodd:x:a:b\nbad:x:-1:1::/:\n",
    "root:x:0:\nstaff:x:50:agent\n",
)
ME = User(1234, 1235, (), "me", "/home/me")
ROOT = User(0, 0, (), "root", "/root")


@pytest.mark.parametrize(
    ("spec", "asked", "caller", "expected"),
    [
        ("agent", None, ME, User(1000, 1001, (), "agent", "/home/agent")),
        ("agent:staff", None, ROOT, User(1000, 50, (), "agent", "/home/agent")),
        ("1000", None, ME, User(1000, 1001, (), "agent", "/home/agent")),
        ("77", None, ME, User(77, 77, (), "77", "/")),
        ("77:staff", None, ME, User(77, 50, (), "77", "/")),
        ("", None, ME, User(1234, 1235, (), "1234", "/home/me")),
        ("root", None, ME, User(1234, 1235, (), "1234", "/home/me")),
        ("0:0", None, ME, User(1234, 1235, (), "1234", "/home/me")),
        ("", None, ROOT, User(0, 0, (), "root", "/root")),
        ("agent", "0", ME, User(0, 0, (), "root", "/root")),
        ("agent", "7:8", ME, User(7, 8, (), "7", "/")),
        ("root", "agent", ME, User(1000, 1001, (), "agent", "/home/agent")),
    ],
)
def test_users(spec: str, asked: str | None, caller: User, expected: User) -> None:
    """The image's user, by its own files; root only for root, or when asked for."""
    assert user(replace(IMAGE, user=spec), asked, PEOPLE, caller) == expected


@pytest.mark.parametrize(
    "spec", ["nobody", "bad", "agent:", "agent:nogroup", ":", "4294967295", "-1"]
)
def test_users_that_are_not_there(spec: str) -> None:
    """Refused, never guessed."""
    with pytest.raises(UsageError, match=r"no such user"):
        user(replace(IMAGE, user=spec), None, PEOPLE, ME)


def test_a_user_before_the_image_is_unpacked() -> None:
    """A number is known, a name is not."""
    assert user(replace(IMAGE, user="5:6"), None, None, ME).uid == 5
    assert user(replace(IMAGE, user="agent"), None, None, ME).uid == -1


# ---- the plan ---------------------------------------------------------------------------------

HOST = Host(mechanisms={}, cgroup="hybrid", unified=None, controllers={}, runtime=None)
FULL = replace(
    IMAGE,
    env=(("PATH", "/app/bin"), ("LANG", "C"), ("MIS_PROFILE", "forged"), ("HOME", "/app")),
    entrypoint=("/entry",),
    command=("serve",),
    workdir="/app",
)


def planned(image: Image = FULL, **options: Any) -> plan.Plan:
    given = {"command": (), "workdir": None, "image": "x", **options}
    environ = {"PATH": "/host/bin", "LANG": "de_DE", "TERM": "xterm"}
    profile = profiles.load(str(options.pop("profile", "default")))
    return plan.make(Options(**given), profile, HOST, Caller(ME, environ), image)


@pytest.mark.parametrize(
    ("command", "entrypoint", "expected"),
    [
        ((), None, ("/entry", "serve")),
        (("a", "b"), None, ("/entry", "a", "b")),
        ((), "/other", ("/other",)),
        (("a",), "/other", ("/other", "a")),
        (("a",), "", ("a",)),
    ],
)
def test_commands(
    command: tuple[str, ...], entrypoint: str | None, expected: tuple[str, ...]
) -> None:
    """As Docker puts them together."""
    assert planned(command=command, entrypoint=entrypoint).command == expected


def test_an_image_without_a_command() -> None:
    """Says so, before anything is made."""
    for image, entrypoint in ((IMAGE, None), (FULL, "")):
        with pytest.raises(UsageError, match="names no command"):
            planned(image, entrypoint=entrypoint)


def test_the_environment_is_the_images() -> None:
    """Over the caller's locale, under --env; what tells of mis-run cannot be forged."""
    env = dict(planned(env=(("X", "1"),)).env)
    assert env["PATH"] == "/app/bin"
    assert (env["LANG"], env["TERM"], env["HOME"], env["X"]) == ("C", "xterm", "/app", "1")
    assert env["MIS_PROFILE"] == "default"
    assert "/host/bin" not in str(env)


def test_the_workspace_is_bound_only_when_named(tmp_path: Path) -> None:
    """By default nothing of the host is in an image's root."""
    made = planned()
    assert (made.cwd, made.workspace, made.shared()) == (Path("/app"), False, {})
    bound = planned(workdir=tmp_path)
    assert bound.cwd == tmp_path
    assert list(bound.shared()) == [str(tmp_path)]
    assert planned(replace(FULL, workdir="/")).cwd == Path("/")


def test_sets_mean_the_image() -> None:
    """@system is all of it; the host's @secrets are not in it; what a profile denies stays."""
    made = planned()
    assert "/**" in made.profile.files.read
    assert made.masked == ()


def test_words_that_contradict() -> None:
    """--image and --rootfs; --entrypoint without an image."""
    context = cli.command.make_context("mis-run", ["--image", "x", "--rootfs", "/", "true"])
    for words_, match in (
        (["--image", "x", "--rootfs", "/", "true"], "one root"),
        (["--entrypoint", "x", "true"], "for images"),
    ):
        context = cli.command.make_context("mis-run", words_)
        given_ = {k: v for k, v in context.params.items() if k not in ("dry_run", "quiet")}
        with pytest.raises(UsageError, match=match):
            parse(**given_)


def test_tar_members_of_an_archive_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More names than a saved image has are no saved image."""
    path = tmp_path / "many.tar"
    path.write_bytes(layouts.tar([layouts.entry(f"f{n}") for n in range(20)]))
    with blobs.archive(path) as opened:
        assert len(opened.names()) == 20
    monkeypatch.setattr(blobs, "MOST_NAMES", 10)
    with pytest.raises(SetupError, match="more than 10 files"), blobs.archive(path):
        pass


def test_sparse_and_special_members_are_no_blobs(tmp_path: Path) -> None:
    """Only regular files: a device or folder in an archive is refused by name."""
    path = tmp_path / "odd.tar"
    members = [layouts.entry("index.json", type=tarfile.CHRTYPE), layouts.folder("blobs")]
    path.write_bytes(layouts.tar(members))
    with blobs.archive(path) as opened, pytest.raises(SetupError, match="no regular file"):
        layout.find(opened, "x", "")


def test_a_header_that_pretends_to_be_huge(tmp_path: Path) -> None:
    """An extended header of 8 GiB, in a file that is almost all hole, takes no memory."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    path = tmp_path / "huge.tar"
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(9 << 30)
    with pytest.raises(SetupError, match="no archive of an image"), blobs.archive(path):
        pass


def test_floating_denials_are_found_wherever_they_are(tmp_path: Path) -> None:
    """Files, folders and links of an image, by name; a link's target is not looked at."""
    for name in ("app/.env", "app/keys/a.pem", "etc/b.pem", "srv/secret/x/y", "srv/other/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "app/c.pem").symlink_to("/etc/hosts")
    (tmp_path / "app/dir").symlink_to("/srv")
    patterns = ("**/.env", "*.pem", "/srv/**/secret", "/etc/anchored", "**/nothing/**")
    assert masks.find_floating(str(tmp_path), patterns) == {
        "/app/.env": False,
        "/app/keys/a.pem": False,
        "/etc/b.pem": False,
        "/app/c.pem": False,
        "/srv/secret": True,
    }
    assert masks.find_floating(str(tmp_path), ("/app/.env",)) == {}  # anchored: find_all's


def test_a_launch_without_an_image_does_not_pay_for_it() -> None:
    """Neither our readers nor the docker SDK are imported."""
    names = "mis_run.cli, mis_run.host, mis_run.plan, mis_run.launch, mis_run.follow"
    argv = [sys.executable, "-I", "-c", f"import sys, {names}; print(*sys.modules)"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert "mis_run.launch" in done
    ours = [name for name in done if name.startswith(("mis_run.images", "docker", "requests"))]
    assert ours == []


# ---- an engine's answers ------------------------------------------------------------------------


class Client:
    """As much of the SDK's client as we use."""

    def __init__(self, facts: dict[str, Any], blocks: list[bytes]) -> None:
        self._facts, self._blocks = facts, blocks

    def inspect_image(self, name: str) -> dict[str, Any]:
        import docker.errors

        if name != "x":
            raise docker.errors.ImageNotFound("no such image")
        return self._facts

    def get_image(self, name: str) -> list[bytes]:
        return self._blocks


def test_an_engines_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it describes is checked as a layout is; what it saves must leave room on the disk."""
    made = Layout(tmp_path / "lay")
    made.add([HELLO], SETTINGS)
    saved = made.saved(tmp_path / "saved.tar", "x:1").read_bytes()
    facts = {"Os": "linux", "Architecture": config.machine(), "Config": SETTINGS, "Id": "sha256:1"}
    facts["RootFS"] = {"Layers": [sha(HELLO)]}

    @contextmanager
    def client() -> Iterator[Client]:
        yield Client(facts, [saved[:1000], saved[1000:]])

    monkeypatch.setattr(engine, "_client", client)
    image = engine.inspect("x")
    assert (image.digest, image.layers, image.user) == ("sha256:1", (sha(HELLO),), "agent:staff")
    with pytest.raises(NotFound, match="does not have it") as caught:
        engine.inspect("y")
    assert "docker pull y" in caught.value.hint
    with engine.saved(image, tmp_path) as found:
        assert found.image.layers == image.layers
    monkeypatch.setattr(engine, "RESERVE", 1 << 60)
    with pytest.raises(SetupError, match="too big"), engine.saved(image, tmp_path):
        pass
    facts["RootFS"] = None
    with pytest.raises(SetupError, match="diff_ids"):
        engine.inspect("x")
