"""Taint in real launches: whoever has read what is named cannot carry it to a new place.

Each refusal has its control: the same act without ``taint``, or before the reading, goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import (
    HOST4,
    MIS,
    MIS_RUN,
    OTHER_PORT,
    PORT,
    Done,
    TestHost,
    host_elsewhere,
    mis,
    run,
    wait_for,
)
from leftovers import snapshot
from test_file_guard import COMMON, PYTHON, READS

pytestmark = pytest.mark.root

KIND = "file.tainted"
NAMED = '[files]\ntaint = ["$WORKSPACE/customers"]\n'
# Each of these tests one effect: programs may start, or what is asked could not be asked.
STARTS = "[defcon]\neffects = { binaries = 0 }\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A checkout with data of customers in it."""
    folder = tmp_path / "workspace"
    (folder / "customers").mkdir(parents=True)
    (folder / "customers/list").write_text("SECRET")
    (folder / "open.txt").write_text("open")
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestHost]:
    with host_elsewhere(tmp_path_factory.mktemp("host")) as host:
        yield host


def options(folder: Path, text: str, *more: str) -> tuple[str, ...]:
    """A profile beside the workspace."""
    path = folder.parent / f"{secrets.token_hex(4)}.toml"
    path.write_text(f'extends = "default"\n{text}')
    return ("--profile", str(path), *more)


def offline(folder: Path, text: str, *more: str) -> tuple[str, ...]:
    return options(folder, text, "--net", "none", *more)


def marks(done: Done) -> list[dict[str, Any]]:
    return [event for event in done.events if event["kind"] == KIND]


def changes(done: Done) -> list[dict[str, Any]]:
    return [event["subject"] for event in done.events if event["kind"] == "defcon.change"]


TO_3 = {"from": 5, "to": 3, "violations": 0, "cause": "taint"}

# ---- what marks ---------------------------------------------------------------------------

WAYS = READS.partition("results = {")[0]
ONE_WAY = f"""{COMMON}{WAYS}
if sys.argv[1] == "names":
    print(json.dumps(sorted(ACTS)))
else:
    print(outcome(ACTS[sys.argv[1]]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As in test_file_guard: secrets of several kinds."""
    folder = tmp_path / "checkout"
    for name in ("", "sub", "a/b/c", "moved", "deep", "swap", "trunc"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / ".env").write_text("SECRET")
    (folder / "denied").mkdir()
    (folder / "denied/mod.py").write_text("print('SECRET')")
    (folder / "id.pem").write_text("SECRET")
    for name in ("swap/open", "open.txt"):
        (folder / name).write_text("open")
    return folder


ANY_DEPTH = '[files]\ntaint = ["**/.env", "*.pem", "$WORKSPACE/**/denied/**"]\n'
ANCHORED = "[files]\ntaint = [{}]\n".format(
    ", ".join(
        f'"$WORKSPACE/{name}"'
        for name in (".env", "id.pem", "denied", *(f"{d}/.env" for d in ("a/b/c", "moved")))
        + tuple(f"{d}/.env" for d in ("sub", "deep", "swap", "trunc"))
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("named", [ANY_DEPTH, ANCHORED], ids=["any depth", "anchored"])
def test_every_way_to_a_file_marks(named: str, checkout: Path, tmp_path: Path) -> None:
    """By any name, link, descriptor, process or thread: the file is read, and the agent marked,
    once; reading another file marks nobody."""
    listed = subprocess.run(
        [PYTHON, "-c", ONE_WAY, "names"], capture_output=True, text=True, check=True, cwd="/"
    )
    ways = json.loads(listed.stdout)
    assert len(ways) > 25

    def go(way: str) -> tuple[str, Done]:
        folder = tmp_path / way.replace(" ", "-") / "workspace"
        shutil.copytree(checkout, folder)
        words = (PYTHON, "-c", ONE_WAY, way)
        return way, run(*words, cwd=folder, options=offline(folder, named + STARTS))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(go, ways))
    for way, done in found:
        assert done.out.strip() in ("SECRET", "opened"), (way, done.out, done.err)
        assert len(marks(done)) == 1, way
        assert changes(done) == [TO_3] and done.denied() == [], way
    other = run("cat", "open.txt", cwd=checkout, options=offline(checkout, named))
    assert other.out == "open" and marks(other) == changes(other) == []


def test_the_same_ways_without_a_rule_mark_nobody(checkout: Path) -> None:
    """The control: all of them in one run, read and not marked."""
    every = f"{COMMON}{WAYS}print(json.dumps([outcome(act) for act in ACTS.values()]))"
    done = run(PYTHON, "-c", every, cwd=checkout, options=offline(checkout, STARTS))
    assert set(json.loads(done.out)) <= {"SECRET", "opened"}
    assert marks(done) == changes(done) == []


@pytest.mark.parametrize(
    ("script", "rule"),
    [
        ("mv customers other; cat other/list", "$WORKSPACE/customers"),
        ("echo NEW > customers/new; cat customers/new", "$WORKSPACE/customers"),
        ("cat led/list", "$WORKSPACE/led"),
        ("cat customers/list", "$WORKSPACE/led"),
        ("cat out/list", "$WORKSPACE/out"),
        ("cat /again/list", "$WORKSPACE/out"),
        ("cat /data/list", "/data"),
        ("cat /again/list", "/data"),
        ("ln /data/list /data/linked; cat /data/linked", "/data/list"),
        ("cat /usr/lib/os-release >/dev/null", "/etc/os-release"),
        ("mv /usr/lib/os-release /usr/lib/zz; cat /usr/lib/zz >/dev/null", "/etc/os-release"),
        ("cat < customers/list", "**/list"),
        ("exec 3<> customers/list", "$WORKSPACE/customers"),
        ("./tool", "$WORKSPACE/tool"),
    ],
)
def test_what_is_named_at_launch(script: str, rule: str, workspace: Path) -> None:
    """A folder that is moved, a new file in it, links inside the workspace and out of it, binds
    and a second bind of the same folder, the root, programs: each marks; without the rule none
    does."""
    (workspace / "led").symlink_to("customers")
    (workspace / "out").symlink_to("/data")
    shutil.copy("/usr/bin/true", workspace / "tool")
    data = workspace.parent / "data"
    shutil.copytree(workspace / "customers", data)
    binds = ("--bind", f"{data}:/data", "--bind", f"{data}:/again")
    given = offline(workspace, f'[files]\ntaint = ["{rule}"]\n{STARTS}', *binds)
    control = shutil.copytree(workspace, workspace.parent / "control", symlinks=True)
    done = run("sh", "-c", script, cwd=workspace, options=given)
    assert done.code == 0 and done.denied() == [], (done.out, done.err)
    assert [event["rule"] for event in marks(done)] == [f"taint {rule}"]
    assert changes(done) == [TO_3]
    (data / "linked").unlink(missing_ok=True)
    free = run("sh", "-c", script, cwd=control, options=offline(control, STARTS, *binds))
    assert free.code == 0 and marks(free) == [], free.err


@pytest.fixture
def small_root(tmp_path: Path) -> Iterator[Path]:
    """A root file system on a file system that has a UUID."""
    busybox = shutil.which("busybox")
    image, root = tmp_path / "image", tmp_path / "root"
    root.mkdir()
    with image.open("w") as file:
        file.truncate(64 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, root], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device with ext4 here: {error}")
    try:
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "run", "root"):
            (root / name).mkdir()
        shutil.copy(busybox or "", root / "bin/busybox")
        for name in ("sh", "ln", "mv", "cat"):
            (root / "bin" / name).symlink_to("busybox")
        (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\n")
        (root / "etc/key").write_text("SECRET\n")
        yield root
    finally:
        subprocess.run(["umount", root], check=True)


@pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox is not installed")
def test_a_root_agent_renames_and_links_in_its_root(small_root: Path, workspace: Path) -> None:
    """What a pattern names from the root on marks by any name, where the overlay knows what its
    copies came from; without the rule nothing does."""
    root = ("--rootfs", str(small_root))
    for text, times in (('[files]\ntaint = ["/etc/key"]\n', 1), ("", 0)):
        for act in ("mv /etc/key /etc/other", "ln /etc/key /etc/other; ln /etc/other /etc/third"):
            given = offline(workspace, text, *root)
            done = run("sh", "-c", f"{act}; cat /etc/other", cwd=workspace, options=given)
            assert done.out == "SECRET\n", done.err
            assert len(marks(done)) == times, act


def test_a_program_marks_when_it_is_executed(workspace: Path) -> None:
    """The event is of the exec gate, and the program, never executed before, runs: where the
    kernel looks once more, after the mark, only if the level lets new programs run."""
    shutil.copy("/usr/bin/true", workspace / "tool")
    given = offline(workspace, '[files]\ntaint = ["$WORKSPACE/tool"]\n')
    done = run("sh", "-c", "./tool && echo ran", cwd=workspace, options=given)
    start = next(event["subject"] for event in done.events if event["kind"] == "run.start")
    assert done.out == ("" if "bpf-lsm" in start["mechanisms"] else "ran\n")
    assert [event["guard"] for event in marks(done)] == ["exec"]
    given = offline(workspace, f'[files]\ntaint = ["$WORKSPACE/tool"]\n{STARTS}')
    done = run("sh", "-c", "./tool && echo ran", cwd=workspace, options=given)
    assert done.out == "ran\n" and len(marks(done)) == 1


def test_looking_is_not_reading(workspace: Path) -> None:
    """Listing a folder, stat, O_PATH and what is denied mark nobody; reading, the control, does."""
    script = f"""{COMMON}
os.listdir("customers"); os.stat("customers/list"); os.open("customers/list", os.O_PATH)
os.rename("customers/list", "customers/moved"); os.chmod("customers/moved", 0o600)
print(outcome(read, "customers/denied"))
if len(sys.argv) > 1:
    read("customers/moved")
"""
    (workspace / "customers/denied").write_text("SECRET")
    text = f'{NAMED}deny = ["...", "**/denied"]\n'
    for more in ((), ("read",)):
        given = offline(workspace, text)
        done = run(PYTHON, "-c", script, *more, cwd=workspace, options=given)
        assert done.code == 0 and done.out == "EPERM\n", (done.out, done.err)
        assert len(marks(done)) == len(more)
        if not more:
            (workspace / "customers/moved").rename(workspace / "customers/list")


# ---- what follows -------------------------------------------------------------------------

CARRY = f"""{COMMON}
def talk(kind, port):
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(3)
        sock.connect(("{HOST4}", port))
        sock.send(b"hello")
        return sock.recv(100).decode()
def send(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.sendto(b"hello", ("{HOST4}", port))
        return sock.recv(100).decode()
def write(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT)); return "written"
def execute(path):
    return subprocess.run([path], stdout=subprocess.DEVNULL).returncode
ready = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
ready.settimeout(3)
old = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
old.settimeout(3)
old.connect(("{HOST4}", {PORT}))
old.send(b"first"); old.recv(100)
"""
AT_ONCE = f"""{CARRY}
secret = "customers/list"
fd = os.open(secret, os.O_RDONLY)
met = ready.connect_ex(("{HOST4}", {OTHER_PORT}))
print(json.dumps([errno.errorcode.get(met, "connected"), os.pread(fd, 100, 0).decode()]))
"""
ROUTES = ("--allow-net", f"{HOST4}:{PORT}", "--allow-net", f"{HOST4}:{OTHER_PORT}")


def test_a_new_destination_is_refused_at_once(workspace: Path, elsewhere: TestHost) -> None:
    """Between the end of the open and the connect lies nothing but the connect, and it is refused;
    without the rule it goes on."""
    for _ in range(5):
        done = run(
            *(PYTHON, "-c", AT_ONCE), cwd=workspace, options=options(workspace, NAMED, *ROUTES)
        )
        assert json.loads(done.out) == ["EPERM", "SECRET"], done.err
        assert [event["rule"] for event in done.denied()] == ["defcon: new destinations are denied"]
        kinds = [event["kind"] for event in done.events]
        assert kinds.index(KIND) < kinds.index("defcon.change") < kinds.index("net.connect")
    free = run(*(PYTHON, "-c", AT_ONCE), cwd=workspace, options=options(workspace, "", *ROUTES))
    assert json.loads(free.out) == ["connected", "SECRET"], free.err
    assert free.denied() == []


ALL = f"""{CARRY}
def everything():
    return {{
        "new": outcome(talk, socket.SOCK_STREAM, {OTHER_PORT}),
        "new udp": outcome(talk, socket.SOCK_DGRAM, {OTHER_PORT}),
        "sent": outcome(send, {OTHER_PORT}),
        "used": outcome(talk, socket.SOCK_DGRAM, {PORT}),
        "open": outcome(lambda: old.send(b"more") and old.recv(100).decode()),
        "outside": outcome(write, "/var/tmp/outside"),
        "inside": outcome(write, "inside"),
        "program": outcome(execute, "/usr/bin/uptime"),
        "memory": outcome(lambda: bool(mmap.mmap(-1, 4096, prot=7))),
    }}
with open(sys.argv[1]) as file:
    file.read()
print(json.dumps(everything()))
"""


def test_everything_of_the_level_holds_when_the_reading_goes_on(
    workspace: Path, elsewhere: TestHost
) -> None:
    """Destinations, mounts, programs and memory as at level 3; what was used before, and the
    workspace, stay; who read something else, the control, may do all of it."""
    given = options(workspace, NAMED, *ROUTES)
    met = run(PYTHON, "-c", ALL, "customers/list", cwd=workspace, options=given)
    free = run(PYTHON, "-c", ALL, "open.txt", cwd=workspace, options=given)
    assert json.loads(met.out) == {
        **dict.fromkeys(("new", "new udp", "sent", "program"), "EPERM"),
        "memory": "EACCES",
        "outside": "EROFS",
        "used": "echo hello",
        "open": "echo more",
        "inside": "written",
    }, (met.out, met.err)
    assert json.loads(free.out) == {
        **dict.fromkeys(("new", "new udp", "sent", "used"), "echo hello"),
        "open": "echo more",
        **dict.fromkeys(("outside", "inside"), "written"),
        "program": "0",
        "memory": "True",
    }, (free.out, free.err)
    assert changes(met)[0] == TO_3 and changes(free) == []


FADE = f"""{CARRY}
for _ in range(int(sys.argv[1])):
    outcome(read, sys.argv[2]); time.sleep(0.02)
time.sleep(1)
print(outcome(talk, socket.SOCK_STREAM, {OTHER_PORT}))
"""


def test_time_does_not_lift_a_mark(workspace: Path, elsewhere: TestHost) -> None:
    """The level of violations fades, the control; a mark's does not."""
    (workspace / "denied").write_text("no")
    text = f'{NAMED}deny = ["...", "**/denied"]\n[defcon]\ndecay = "100ms"\n'
    for act, met in ((("1", "customers/list"), "EPERM"), (("6", "denied"), "echo hello")):
        given = options(workspace, text, *ROUTES)
        done = run(PYTHON, "-c", FADE, *act, cwd=workspace, options=given)
        assert done.out.strip() == met, (act, done.out, done.err)
        assert changes(done)[0 if met == "EPERM" else 1]["to"] == 3


@pytest.mark.parametrize(
    ("text", "level", "acts"),
    [
        ("[defcon]\ntainted = 0\n", 5, True),
        ("[defcon]\nact = false\n", 3, False),
        ("[mode]\nenforce = false\n", 5, False),
    ],
    ids=["recorded", "act", "audit"],
)
def test_where_nothing_follows(
    text: str, level: int, acts: bool, workspace: Path, elsewhere: TestHost
) -> None:
    """With tainted = 0, without acting and in audit mode the mark is in the record, and the agent
    goes where it wants."""
    given = options(workspace, NAMED + text, *ROUTES)
    done = run(PYTHON, "-c", ALL, "customers/list", cwd=workspace, options=given)
    found = json.loads(done.out)
    assert (found["new"], found["outside"]) == ("echo hello", "written"), (found, done.err)
    assert [event["subject"].get("acts", True) for event in marks(done)] == [acts]
    facts = next(event["subject"] for event in done.events if event["kind"] == "run.exit")
    assert (facts["level"], facts["tainted"]) == (level, True)


def test_other_levels(workspace: Path) -> None:
    """At 4 writes go on elsewhere; at 2 only what a rule names explicitly is read again, and a file
    that one names is; at 1 the agent has ended before it has the file."""
    again = "x=; read x < customers/list; echo $x"
    script = f"{again}; (echo y > /var/tmp/y) && echo wrote; read y < open.txt; echo $y; {again}"
    explicit = 'read = ["...", "$WORKSPACE/customers/list"]\n'
    for level, more, out in (
        (4, "", "SECRET wrote open SECRET"),
        (2, "", "SECRET"),
        (2, explicit, "SECRET SECRET"),
        (1, "", ""),
    ):
        given = offline(workspace, f"{NAMED}{more}[defcon]\ntainted = {level}\n")
        done = run("sh", "-c", f"{script} 2>/dev/null", cwd=workspace, options=given)
        assert done.out.split() == out.split(), (level, done.out, done.err)
        assert changes(done)[0] == {**TO_3, "to": level}
        assert (done.code == 119) is (level == 1)


STORM = f"""{COMMON}
busy = os.open("/var/tmp/busy", os.O_WRONLY | os.O_CREAT)
pids = []
for number in range(24):
    if not (pid := os.fork()):
        for turn in range(20):
            outcome(read, "customers/list" if turn == number % 7 else "open.txt")
            outcome(lambda: os.close(os.open(f"/var/tmp/{{number}}", os.O_WRONLY | os.O_CREAT)))
        os._exit(0)
    pids.append(pid)
print(sum(os.waitpid(pid, 0)[1] for pid in pids))
"""


def test_many_at_once(workspace: Path) -> None:
    """While others open, write and wait, the mark is made once, and nobody waits for good; a mount
    with a writer stays writable, which is told."""
    done = run(PYTHON, "-c", STORM, cwd=workspace, options=offline(workspace, NAMED), timeout=60)
    assert (done.code, done.out) == (0, "0\n"), done.err
    assert len(marks(done)) == 1
    (partly,) = (event for event in done.events if event["kind"] == "defcon.partly")
    (left,) = partly["subject"]["still_writable"]
    assert "/var/tmp".startswith(left)


def test_the_file_that_marks_may_itself_be_open_for_writing(workspace: Path) -> None:
    """It waits with its mount busy: that one stays writable, the others do not, and it goes on."""
    given = offline(workspace, '[files]\ntaint = ["/var/tmp/named"]\n')
    script = "echo x > /var/tmp/named; (echo x > /dev/shm/x) || read x < /var/tmp/named; echo $x"
    done = run("sh", "-c", script, cwd=workspace, options=given)
    assert done.out == "x\n", (done.out, done.err)
    assert len(marks(done)) == 1
    free = run("sh", "-c", script, cwd=workspace, options=offline(workspace, ""))
    assert free.out == "\n"  # it could write there


# ---- who is told, who lifts it, who keeps it ----------------------------------------------


def test_the_agent_can_read_that_it_is_marked_and_why(workspace: Path) -> None:
    """Before, its rules say what would mark it; after, its denials what has, and in its words."""
    script = """
    cat $MIS_INFO/README; echo ----; cat $MIS_INFO/rules.json; echo ----
    cat $MIS_INFO/denials.jsonl customers/list $MIS_INFO/denials.jsonl"""
    done = run("sh", "-c", script, cwd=workspace, options=offline(workspace, NAMED))
    words, rules, denials = done.out.split("----\n")
    assert "Once you open any of $WORKSPACE/customers" in words
    assert json.loads(rules)["files"]["taint"] == ["$WORKSPACE/customers"]
    assert denials.startswith("SECRET")  # nothing was written there before
    told = json.loads(denials.removeprefix("SECRET"))
    assert told["kind"] == KIND and told["path"] == f"{workspace}/customers/list"
    assert "DEFCON 3" in told["why"] and "taint $WORKSPACE/customers" in told["why"]
    assert "tainted: it has opened" in done.err


def test_people_are_told(workspace: Path) -> None:
    """--dry-run, mis inspect, mis explain and the profile that is shown."""
    given = offline(workspace, NAMED + STARTS, "--name", "told")
    argv = [*MIS_RUN, *given, "--dry-run", "--", "true"]
    shown = subprocess.run(argv, cwd=workspace, capture_output=True, text=True, check=True)
    assert "taint        $WORKSPACE/customers (marks: DEFCON 3)" in shown.stdout
    assert 'taint = ["$WORKSPACE/customers"]' in mis("profile", "show", given[1]).stdout
    agent = begin(workspace, given, "cat customers/list; while [ ! -e stop ]; do sleep 0.1; done")
    wait_for(lambda: "SECRET" in (workspace / "out").read_text())
    facts = json.loads(mis("inspect", "told").stdout)
    assert facts["tainted"] is True and facts["level"] == 3
    assert facts["plan"]["profile"]["files"]["taint"] == ["$WORKSPACE/customers"]
    explained = mis("explain", "told").stdout
    (workspace / "stop").touch()
    assert agent.wait(20) == 0
    assert "cat opened" in explained and "marks the agent" in explained


def begin(folder: Path, given: tuple[str, ...], script: str) -> subprocess.Popen[bytes]:
    """An agent in the background, with its output in a file."""
    (folder / "out").touch()
    given += ("--log", str(folder.parent / "record.jsonl"))
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        [*MIS_RUN, *given, "--", "sh", "-c", f"exec >> out; {script}"],
        cwd=folder,
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
    )


def recorded(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder.parent / "record.jsonl").read_text().rpartition("\n")[0]  # no half a line
    return [e for line in text.splitlines() if (e := json.loads(line))["kind"] == kind]


LATER = """
import os, socket, time
def connect():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        return udp.connect_ex(("192.0.2.7", 9))
open("customers/list").close()
while not os.path.exists("go"):
    print("waiting", flush=True)
    time.sleep(0.1)
open("customers/list").close()
print(connect(), flush=True)
"""
UDP = '[network]\nallow = ["192.0.2.7:9/udp"]\n'


@pytest.mark.parametrize(("level", "met"), [(None, "1"), (3, "1"), (2, "1"), (4, "0"), (5, "0")])
def test_an_operator_lifts_it(level: int | None, met: str, workspace: Path) -> None:
    """A level higher than the mark's lifts what it does, also for what is read afterwards; any
    other, and no word at all, does not."""
    given = options(workspace, f'{NAMED}{UDP}[defcon]\ndecay = "100ms"\n', "--name", "lifts")
    (workspace / "later.py").write_text(LATER)
    agent = begin(workspace, given, f"exec {PYTHON} later.py")
    wait_for(lambda: "waiting" in (workspace / "out").read_text(), 20)
    if level is not None:
        assert mis("defcon", "lifts", str(level)).returncode == 0
    time.sleep(0.5)  # in which a level of violations has faded
    (workspace / "go").touch()
    assert agent.wait(20) == 0
    assert (workspace / "out").read_text().split()[-1] == met
    assert len(recorded(workspace, KIND)) == 1


@pytest.mark.parametrize(("reads", "met"), [(True, "1"), (False, "0")])
def test_it_outlives_a_supervisor(reads: bool, met: str, workspace: Path) -> None:
    """The next one knows of it, and time does not lift it then either; who has not read is not
    marked then, the control."""
    before = snapshot()
    text = f'{NAMED}{UDP}[defcon]\ndecay = "100ms"\n[liveness]\non_loss = "open"\n'
    given = options(workspace, text, "--name", "outlives")
    script = LATER if reads else LATER.replace('open("customers/list").close()\n', "")
    (workspace / "later.py").write_text(script)
    agent = begin(workspace, given, f"exec {PYTHON} later.py")
    wait_for(lambda: "waiting" in (workspace / "out").read_text(), 20)
    os.kill(agent.pid, signal.SIGKILL)
    agent.wait(10)
    again = subprocess.Popen([*MIS, "attach", "outlives"], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: recorded(workspace, "run.attached"))
        time.sleep(0.5)
    finally:
        (workspace / "go").touch()
    assert again.wait(20) == 0
    assert (workspace / "out").read_text().split()[-1] == met
    (attached,) = recorded(workspace, "run.attached")
    assert attached["subject"]["level"] == (3 if reads else 5)
    assert len(recorded(workspace, KIND)) == reads
    assert snapshot() == before
