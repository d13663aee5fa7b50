"""``mis-run --image``: an image's file system as the agent's root, guarded as the host's is.

From an OCI layout, with no engine there (DOCKER_HOST leads nowhere), and from a real dockerd's own
images.  After each test nothing is left but the cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import engine as engines
import layouts
import pytest
from engine import GATEWAY, Engine
from harness import HOST4, MIS_RUN, PORT, Done, host_elsewhere, mis, run, wait_for
from layouts import Layout, entry, folder
from leftovers import snapshot

from mis_run.linux import abi

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(engines.why_not() is not None, reason=str(engines.why_not())),
]
NOWHERE = "unix:///nonexistent/docker.sock"
SETTINGS = {
    "User": "user",
    "Env": ["PATH=/bin", "FROM=image"],
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["echo cmd; id -u; pwd; echo $FROM"],
    "WorkingDir": "/app",
}
UPPER = [
    folder("app", uid=1000, gid=1000),
    entry("app/note", b"of the image\n", uid=1000, gid=1000),
    entry("app/.env", b"TOKEN\n", uid=1000, gid=1000),
    entry("etc/.wh.secret"),
    entry("new/dir/file", b"new\n"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def layout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    made = Layout(tmp_path_factory.mktemp("layout") / "agent")
    made.add([layouts.tar_of(root), layouts.tar(UPPER)], SETTINGS)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "mis"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = snapshot()
    yield
    wait_for(lambda: snapshot() == before, 10)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where mis-run is called."""
    made = tmp_path / "place"
    made.mkdir()
    made.chmod(0o777)
    return made


class Images:
    """mis-run with one image and one cache."""

    def __init__(self, image: str, cache: Path, place: Path, host: str = NOWHERE) -> None:
        self.image, self.cache, self.place = image, cache, place
        self.env = {"MIS_CACHE": str(cache), "DOCKER_HOST": host}

    def run(
        self, *words: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> Done:
        options = ("--image", self.image, *options)
        return run(*words, cwd=self.place, options=options, env={**self.env, **(env or {})})

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = [*MIS_RUN, "-q", "--image", self.image, "--", *words]
        return subprocess.Popen(
            argv,
            cwd=self.place,
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def mis(self, *words: str) -> str:
        before = os.environ.get("MIS_CACHE")
        os.environ["MIS_CACHE"] = str(self.cache)
        try:
            done = mis(*words)
        finally:
            del os.environ["MIS_CACHE"]
            if before is not None:
                os.environ["MIS_CACHE"] = before
        assert done.returncode == 0, done.stderr
        return done.stdout

    def profile(self, text: str) -> str:
        path = self.place.parent / f"profile{hashlib.sha256(text.encode()).hexdigest()[:8]}.toml"
        path.write_text(f'extends = "default"\n{text}\n')
        return str(path)


@pytest.fixture
def images(layout: Layout, cache: Path, place: Path) -> Images:
    return Images(f"oci:{layout.path}", cache, place)


@pytest.fixture(scope="module")
def dockerd(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    top = tmp_path_factory.mktemp("engine")
    with engines.running(top, {"mis": {"path": engines.RUNTIME}}) as running:
        running.docker("load", "-i", str(layout.saved(top / "saved.tar", "mis-agent:1")))
        yield running


def errno_of(done: Done) -> int:
    """What ``act`` printed."""
    return int(done.out.strip().splitlines()[-1])


# ---- what runs --------------------------------------------------------------------------------


def test_an_image_runs_as_it_says(images: Images) -> None:
    """Its command, user, folder and environment; a command replaces its command only."""
    done = images.run()
    assert (done.code, done.out) == (0, "cmd\n1000\n/app\nimage\n"), done.err
    assert images.run("echo $FROM; exit 7", options=("-e", "FROM=me")).out == "me\n"
    assert images.run("exit 7").code == 7
    began = next(event for event in done.events if event["kind"] == "run.start")
    assert began["subject"]["image"].startswith("sha256:")
    assert images.run("/bin/id", "-u", options=("--entrypoint", "")).out == "1000\n"
    assert images.run("-u", options=("--entrypoint", "/bin/id")).out == "1000\n"
    missing = images.run("x", options=("--entrypoint", "/no/such/program"))
    assert missing.code == 127
    assert "/no/such/program" in missing.err


def test_layers_lie_on_each_other(images: Images, layout: Layout) -> None:
    """What the upper layer removed is gone, what it brought is there, the rest shows through."""
    done = images.run("ls /etc/secret; cat /new/dir/file /app/note; ls /bin/act")
    assert done.out == "new\nof the image\n/bin/act\n"
    assert "/etc/secret: No such file" in done.err
    lower = Layout(images.place.parent / "lower")
    lower.add([layout_tar(layout, 0)], SETTINGS)
    alone = Images(f"oci:{lower.path}", images.cache, images.place)
    assert alone.run("cat /etc/secret").out == "secret of the image\n"  # the control
    assert len(list((images.cache / "layers").iterdir())) == 2  # shared, not unpacked twice


def layout_tar(layout: Layout, number: int) -> bytes:
    import gzip

    manifest = json.loads(layout.read(layout.manifests[0]))
    return gzip.decompress(layout.read(manifest["layers"][number]))


def test_nothing_of_the_host_is_there(images: Images) -> None:
    """Not its files, not the folder that mis-run is called in; in the host's root they are."""
    (images.place / "mine").write_text("mine")
    looks = f"ls {images.place}/mine; ls /usr/bin/python3; ls -a /root"
    assert images.run(looks, options=("--user", "0")).out.split() == [".", ".."]
    assert "mine" in run("sh", "-c", looks, cwd=images.place).out


def test_a_workspace_when_it_is_named(images: Images) -> None:
    """--workdir binds it at its own path, read-write, as the folder to begin in."""
    (images.place / "mine").write_text("mine\n")
    done = images.run("pwd; cat mine; echo kept > new", options=("-w", str(images.place)))
    assert done.out == f"{images.place}\nmine\n", done.err
    assert (images.place / "new").read_text() == "kept\n"
    assert (images.place / "new").stat().st_uid == 1000


def test_users(images: Images, root: Path) -> None:
    """Root when asked for; an image that is root's runs as whoever called."""
    assert images.run("id -u", options=("--user", "0")).out == "0\n"
    assert images.run("id -u; id -g", options=("--user", "7:8")).out == "7\n8\n"
    unknown = images.run("id", options=("--user", "nobody-here"))
    assert unknown.code == 2
    assert "no such user" in unknown.err
    made = Layout(images.place.parent / "rootly")
    made.add([layouts.tar_of(root)], {**SETTINGS, "User": "0", "WorkingDir": ""})
    rootly = Images(f"oci:{made.path}", images.cache, images.place)
    who = {"SUDO_UID": "65534", "SUDO_GID": "65534", "SUDO_USER": "nobody"}
    assert rootly.run("id -u; pwd", env=who).out == "65534\n/\n"


def test_writes_are_thrown_away(images: Images) -> None:
    """The agent may change the image; the next one, and the cache, never see it."""
    script = "echo changed > note; rm -r /new; cat note; test -e /new || echo gone"
    before = tree(images.cache)
    done = images.run(script, options=("--user", "0"))
    assert done.out == "changed\ngone\n", done.err
    assert images.run("cat note; cat /new/dir/file").out == "of the image\nnew\n"
    assert tree(images.cache) == before


def tree(cache: Path) -> str:
    """Everything in the cached layers, as one word."""
    argv = ["tar", "-C", str(cache / "layers"), "--sort=name", "-cf", "-", "."]
    return hashlib.sha256(subprocess.run(argv, capture_output=True, check=True).stdout).hexdigest()


# ---- guarded ----------------------------------------------------------------------------------


def check_guards(images: Images, host: str) -> None:
    """Each guard denies and counts; without its rule the same act works."""
    deny = images.profile(
        '[files]\ndeny = ["/app/note", "**/.env"]\n[exec]\ndeny = ["/bin/forbidden"]'
    )
    strict = ("--profile", deny)
    reads = "cat note; ln note n; cat n; mv .env e; cat e; ln .env f; cat f"
    assert images.run("cat note .env").out == "of the image\nTOKEN\n"
    done = images.run(reads, options=strict)
    assert done.out == ""
    assert {event["rule"] for event in done.denied("file")} == {"deny /app/note"}
    assert images.run("cat .env", options=strict).denied("file.open")[0]["rule"] == "deny **/.env"

    assert images.run("/bin/forbidden").out == "ran\n"
    done = images.run("/bin/forbidden; cp /bin/forbidden x; ./x", options=strict)
    assert done.out == ""
    assert done.denied("exec")

    connect = f"/bin/act connect {host} {PORT}"
    allowed = images.run(connect, options=("--allow-net", f"{host}:{PORT}/tcp"))
    assert errno_of(allowed) != errno.EPERM
    assert not allowed.denied()
    done = images.run(connect)
    assert errno_of(done) == errno.EPERM
    assert done.denied("net")

    mount = f"/bin/act syscall {abi.number('mount')} 0 0 0 0 0"
    done = images.run(mount, options=("--user", "0"))
    assert errno_of(done) == errno.EPERM
    assert done.denied("escape")


def test_the_guards_hold(images: Images, root: Path) -> None:
    """Files, programs, network and system calls, as with the host's root."""
    plain = [str(root / "bin/act"), "syscall", str(abi.number("mount")), "0", "0", "0", "0", "0"]
    assert subprocess.run(plain, check=False, capture_output=True).returncode == errno.EFAULT
    with host_elsewhere(images.place.parent) as elsewhere:
        check_guards(images, HOST4)
        assert elsewhere.got() == [""]  # the allowed one, which says nothing
    done = images.run("/bin/act nnp", options=("--user", "0"))
    assert done.out == "1\n"


@pytest.mark.parametrize("pattern", ["**/note", "/app/note", "/app"])
def test_what_taints_in_an_image(pattern: str, images: Images) -> None:
    """Its owner may rename it, and write to the copy above: it marks; another file does not."""
    options = ("--profile", images.profile(f'[files]\ntaint = ["{pattern}"]'))
    for script, times in (
        ("mv note x; cat x", 1),
        ("mkdir d; mv note d/x; cat d/x", 1),
        ("chmod 600 note; mv note x; echo more >> x", 1),
        ("cat /etc/passwd >/dev/null", 0),
    ):
        done = images.run(script, options=options)
        marks = [event["rule"] for event in done.events if event["kind"] == "file.tainted"]
        assert marks == [f"taint {pattern}"] * times, (script, done.out, done.err)


def test_a_hostile_image_gets_nowhere(place: Path, cache: Path, root: Path) -> None:
    """Links out of it lead back into it; set-uid programs gain nothing; MIS_* are not its own."""
    evil = [
        layouts.symlink("etc/hosts", "/proc/1/environ"),
        layouts.symlink("run", "/app"),
        layouts.symlink("app/hosts", "../../../../../../etc/shadow"),
        entry("bin/su", (root / "bin/act").read_bytes(), mode=0o6755),
        folder("app/mis", uid=1000, gid=1000, mode=0o777),
    ]
    made = Layout(place.parent / "evil")
    settings = {**SETTINGS, "Env": ["PATH=/bin", "MIS_PROFILE=trace", "MIS_INFO=/app"]}
    made.add([layouts.tar_of(root), layouts.tar(evil)], settings)
    images = Images(f"oci:{made.path}", cache, place)
    done = images.run(
        "cat hosts; echo $MIS_PROFILE $MIS_INFO; cat /etc/hosts; bin/su nnp; ls -l /bin/su"
    )
    assert "default /run/mis" in done.out
    assert "root:" not in done.out
    assert "localhost" in done.out
    assert "rws" not in done.out


# ---- the cache --------------------------------------------------------------------------------


def test_concurrent_launches_unpack_once(layout: Layout, place: Path, tmp_path: Path) -> None:
    """All of them run; nothing half-made stays."""
    images = Images(f"oci:{layout.path}", tmp_path / "cache", place)
    running = [images.start("sleep 0.2; echo done") for _ in range(4)]
    results = [one.communicate(timeout=60) for one in running]
    assert [out for out, _ in results] == ["done\n"] * 4, results
    assert len(list((images.cache / "layers").iterdir())) == 2
    assert list((images.cache / "partial").iterdir()) == []
    assert stat_mode(images.cache) == 0o700


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_interrupted_unpacking_is_never_complete(root: Path, place: Path, tmp_path: Path) -> None:
    """SIGKILL and SIGINT in the middle: no layer of that name, no process; the next one works."""
    many = [entry(f"many/{n}", b"x" * 50) for n in range(30_000)]
    made = Layout(tmp_path / "lay")
    made.add([layouts.tar(many), layouts.tar_of(root)], SETTINGS, compress=False)
    images = Images(f"oci:{made.path}", tmp_path / "cache", place)
    for number in (signal.SIGKILL, signal.SIGINT):
        launch = images.start("true")
        wait_for(lambda: unpacking(images.cache), 30)
        launch.send_signal(number)
        launch.communicate(timeout=30)
        assert launch.returncode == (-9 if number == signal.SIGKILL else 130)
        wait_for(lambda: not unpacking(images.cache), 10)
        assert list((images.cache / "layers").iterdir()) == []
    done = images.run("ls /many | wc -l")
    assert done.out == "30000\n", done.err
    assert list((images.cache / "partial").iterdir()) == []


def unpacking(cache: Path) -> list[str]:
    """Processes whose root directory is in the cache."""
    found = []
    for entry_ in Path("/proc").glob("[0-9]*/root"):
        try:
            place = os.readlink(entry_)
        except OSError:  # it ended meanwhile
            continue
        if place.startswith(str(cache)):
            found.append(str(entry_))
    return found


ON_AN_OVERLAY = """
mount -t tmpfs tmpfs "$1"; cd "$1"; mkdir lower upper work cache
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work cache; chmod 700 cache
cd "$2"; export MIS_CACHE="$1/cache"; shift 2; exec "$@"
"""


def test_a_cache_on_an_overlay_says_so(layout: Layout, place: Path, tmp_path: Path) -> None:
    """Whiteouts cannot be made there. The control: on the tmpfs below it they can."""
    (tmp_path / "disk").mkdir()
    words = (*MIS_RUN, "-q", "--image", f"oci:{layout.path}", "--", "true")
    for script in (ON_AN_OVERLAY, ON_AN_OVERLAY.replace("mount -t overlay", ": mount")):
        argv = ["unshare", "-m", "sh", "-ec", script, "sh", str(tmp_path / "disk"), str(place)]
        done = subprocess.run([*argv, *words], capture_output=True, text=True, check=False)
        if script is ON_AN_OVERLAY:
            assert done.returncode == 121
            assert "cannot be kept on this file system" in done.stderr
            assert "hint: MIS_CACHE=" in done.stderr
        else:
            assert done.returncode == 0, done.stderr


def test_prune_keeps_what_runs(layout: Layout, place: Path, tmp_path: Path) -> None:
    """Layers of a live run stay and are read on; afterwards they go."""
    images = Images(f"oci:{layout.path}", tmp_path / "cache", place)
    script = "echo up; sleep 3; cat /app/note"
    running = images.start(script)
    assert running.stdout is not None
    assert running.stdout.readline() == "up\n"
    listed = json.loads(images.mis("image", "list", "--json"))
    assert [(one["name"], one["in_use"]) for one in listed] == [(images.image, True)]
    assert json.loads(images.mis("image", "prune", "--json")) == {"images": [], "layers": []}
    assert running.communicate(timeout=30)[0] == "of the image\n"
    assert json.loads(images.mis("image", "prune", "--idle", "1h", "--json"))["images"] == []
    removed = json.loads(images.mis("image", "prune", "--json"))
    assert (removed["images"], len(removed["layers"])) == ([images.image], 2)
    assert list((images.cache / "layers").iterdir()) == []
    assert images.run("echo again").out == "again\n"


def test_a_damaged_layer_never_runs(root: Path, place: Path, tmp_path: Path) -> None:
    """Any bit of a blob changed: refused, and nothing of it is kept."""
    made = Layout(tmp_path / "lay")
    made.add([layouts.tar_of(root)], SETTINGS)
    manifest = json.loads(made.read(made.manifests[0]))
    path = made.path / "blobs/sha256" / manifest["layers"][0]["digest"].removeprefix("sha256:")
    data = bytearray(path.read_bytes())
    images = Images(f"oci:{made.path}", tmp_path / "cache", place)
    for at in (len(data) // 2, len(data) - 3):
        data[at] ^= 1
        path.write_bytes(data)
        done = images.run("echo ran")
        assert (done.code, done.out) == (121, ""), done.err
        assert manifest["layers"][0]["digest"][:20] in done.err or "layer sha256:" in done.err
        assert list((images.cache / "layers").iterdir()) == []
        data[at] ^= 1
    path.write_bytes(data)
    assert images.run("echo ran").out == "ran\n"


def test_as_many_layers_as_images_have(root: Path, place: Path, tmp_path: Path) -> None:
    """127, which is Docker's own limit; the uppermost wins."""
    made = Layout(tmp_path / "lay")
    tops = [layouts.tar([entry("top", str(n).encode()), entry(f"f{n}")]) for n in range(126)]
    made.add([layouts.tar_of(root), *tops], SETTINGS, compress=False)
    images = Images(f"oci:{made.path}", tmp_path / "cache", place)
    done = images.run("cat /top; ls -d /f* | wc -l")
    assert done.out == "125126\n", done.err


# ---- words ------------------------------------------------------------------------------------


def test_dry_run_shows_the_image(layout: Layout, place: Path, tmp_path: Path) -> None:
    """Its digest and layers; nothing is unpacked, and the cache is not even made."""
    images = Images(f"oci:{layout.path}", tmp_path / "cache", place)
    done = images.run(options=("--dry-run",))
    assert done.code == 0, done.err
    layers = json.loads(layout.read(json.loads(layout.read(layout.manifests[0]))["config"]))[
        "rootfs"
    ]
    for digest in layers["diff_ids"]:
        assert f"layer      {digest}" in done.out
    assert "looked up when it is unpacked" in done.out
    assert not images.cache.exists()
    shown = images.run(options=("--dry-run", "--json"))
    assert json.loads(shown.out)["image"]["layers"] == layers["diff_ids"]


def test_what_cannot_run_says_why(images: Images, place: Path, tmp_path: Path) -> None:
    """One message, one hint, a documented code."""
    other = Layout(tmp_path / "other")
    other.add([layouts.tar([entry("x")])], SETTINGS, arch="pdp11")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "debian:12": (121, "no engine answers"),
        f"oci:{other.path}": (121, "linux/pdp11"),
        f"{empty}": (121, "no image is here"),
        "/no/such": (2, "no such file"),
        f"{images.image}:v9": (127, "no image is called"),
        "a b": (2, "cannot be read"),
    }
    for image, (code, words) in cases.items():
        done = Images(image, images.cache, place).run("true")
        assert (done.code, words in done.err) == (code, True), (image, done.err)
        assert "hint:" in done.err
        assert "Traceback" not in done.err


def test_an_archive_is_enough(layout: Layout, cache: Path, place: Path, tmp_path: Path) -> None:
    """What `docker save` and skopeo write, without an engine, shares layers with the layout."""
    before = len(list((cache / "layers").iterdir())) if cache.exists() else 0
    for path in (layout.archive(tmp_path / "oci.tar"), layout.saved(tmp_path / "d.tar", "a:1")):
        done = Images(f"archive:{path}", cache, place).run()
        assert done.out == "cmd\n1000\n/app\nimage\n", done.err
    assert len(list((cache / "layers").iterdir())) == max(before, 2)


def test_a_cache_that_others_can_write_is_refused(
    layout: Layout, place: Path, tmp_path: Path
) -> None:
    """Who could write there could change what agents execute."""
    images = Images(f"oci:{layout.path}", tmp_path / "cache", place)
    images.cache.mkdir(mode=0o777)
    images.cache.chmod(0o777)
    done = images.run("true")
    assert (done.code, "root's alone" in done.err) == (121, True)
    images.cache.chmod(0o700)
    assert images.run("true").code == 0
    os.chown(images.cache, 65534, 65534)  # also when everything is there already
    assert images.run("true").code == 121
    os.chown(images.cache, 0, 0)
    assert images.run("true").code == 0


# ---- an engine's images -----------------------------------------------------------------------


def test_an_engines_image(dockerd: Engine, place: Path, tmp_path: Path) -> None:
    """The same image as the engine runs it: same words, same files, same verdicts."""
    images = Images("mis-agent:1", tmp_path / "cache", place, dockerd.host)
    done = images.run()
    assert (done.code, done.out) == (0, "cmd\n1000\n/app\nimage\n"), done.err
    theirs = dockerd.docker("run", "--rm", "mis-agent:1")
    assert done.out == theirs.stdout
    check_guards(images, GATEWAY)
    digest = dockerd.docker("inspect", "-f", "{{.Id}}", "mis-agent:1").stdout.strip()
    shown = images.run(options=("--dry-run", "--json"))
    assert json.loads(shown.out)["image"]["digest"] == digest
    # Unpacked once: without the engine's `save` the second launch takes what is there.
    assert list((images.cache / "partial").iterdir()) == []
    one_layer = Images(engines.IMAGE, images.cache, place, dockerd.host)
    assert one_layer.run("/bin/cat", "/etc/secret").out == "secret of the image\n"


def test_an_engine_shares_layers_with_a_layout(
    dockerd: Engine, images: Images, place: Path
) -> None:
    """By the digest of the layer, whoever has it."""
    assert images.run("echo 1").out == "1\n"
    before = sorted((images.cache / "layers").iterdir())
    engine = Images("mis-agent:1", images.cache, place, dockerd.host)
    assert engine.run("echo 2").out == "2\n"
    assert sorted((images.cache / "layers").iterdir()) == before


def test_an_engine_without_the_image(dockerd: Engine, cache: Path, place: Path) -> None:
    """Says so, and how to get it; nothing is pulled."""
    done = Images("no-such-image:1", cache, place, dockerd.host).run("true")
    assert done.code == 127
    assert "the engine does not have it" in done.err
    assert "docker pull no-such-image:1" in done.err


def test_the_runtime_of_an_image(dockerd: Engine) -> None:
    """docker run --runtime mis, the same image: the other half of the same product."""
    done = dockerd.docker("run", "--rm", "--runtime", "mis", "mis-agent:1")
    assert done.stdout == "cmd\n1000\n/app\nimage\n"
