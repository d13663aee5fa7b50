"""The escape guard in real launches: every listed call, escapes and escalations by the hundred."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from harness import run

from mis_run.guards import escape_rules
from mis_run.linux import abi

pytestmark = pytest.mark.root

PATIENT = """
extends = "default"
[defcon]
thresholds = [100000, 200000, 300000, 400000]
"""
NUMBERS = {
    name: abi.number(name)
    for name in sorted({*escape_rules.DENIED} & set(abi.numbers(abi.machine())))
}

COMMON = f"""
import ctypes, errno, json, mmap, os, signal, socket, sys, threading, time
NUMBERS = {NUMBERS!r}
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *args):
    values = [ctypes.c_long(a) for a in (*args, *[0] * (6 - len(args)))]
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(number), *values) < 0 else 0
def forked(act):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(act())
        finally:
            os._exit(99)
    return os.waitpid(pid, 0)[1]
"""

ESCAPES = """
UNSHARE, CLONE, SOCKET, PERSONALITY, MEMFD = (
    NUMBERS_MORE[n] for n in ("unshare", "clone", "socket", "personality", "memfd_create"))
met = {}
def note(name, number):
    met.setdefault(name, {}).setdefault(str(number), 0)
    met[name][str(number)] += 1
def clone(flags):
    pid = libc.syscall(ctypes.c_long(CLONE), ctypes.c_long(flags | 17), *[ctypes.c_long(0)] * 4)
    if pid == 0:
        os._exit(0)
    if pid < 0:
        return ctypes.get_errno()
    os.waitpid(pid, 0)
    return 0
source, target = ctypes.create_string_buffer(b"tmpfs"), ctypes.create_string_buffer(b"/mnt")
for turn in range(ROUNDS):
    for name, number in NUMBERS.items():
        args = (turn,) * 6
        if name == "mount":
            args = (ctypes.addressof(source), ctypes.addressof(target), ctypes.addressof(source))
        note(name, call(number, *args))
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        note("unshare", forked(lambda: call(UNSHARE, flag)) >> 8)
        note("clone", clone(flag))
    for family, kind, protocol in ((2, 3, 1), (10, 3, 58), (17, 3, 768), (38, 5, 0), (40, 1, 0),
                                   (16, 3, 15), (16, 3, 12), (29, 3, 1), (1 << 33 | 38, 5, 0)):
        note("socket", call(SOCKET, family, kind, protocol))
    note("personality", call(PERSONALITY, 0x400000))
    note("memfd_create", call(MEMFD, ctypes.addressof(source), 0x10))
print(json.dumps(met))
"""
MORE = {
    name: abi.number(name) for name in ("unshare", "clone", "socket", "personality", "memfd_create")
}


def script(body: str, **values: object) -> str:
    """A Python program for the agent."""
    return COMMON + "".join(f"{key} = {value!r}\n" for key, value in values.items()) + body


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A workspace with a profile beside it that never reaches a DEFCON level."""
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "patient.toml").write_text(PATIENT)
    return folder


def patient(work: Path) -> tuple[str, ...]:
    """Options for a run that only the guards, not DEFCON, hold back."""
    return ("--profile", str(work.parent / "patient.toml"))


def test_a_thousand_escape_attempts_over_all_listed_calls(work: Path) -> None:
    """1,000 attempts, every listed call and every kind of namespace and socket: none succeeds, and
    each is a violation in the record."""
    each = len(NUMBERS) + 2 * 7 + 9 + 2
    rounds = 1000 // each + 1
    body = script(ESCAPES, NUMBERS_MORE=MORE, ROUNDS=rounds)
    done = run("python3", "-c", body, cwd=work, options=patient(work))
    assert done.code == 0, done.err
    met = json.loads(done.out)
    attempts = sum(sum(errors.values()) for errors in met.values())
    assert attempts == rounds * each >= 1000
    assert not {name for name, errors in met.items() if "0" in errors}
    for name in NUMBERS:
        # libseccomp 2.5.4 ends before open_tree_attr: the runtime answers ENOSYS for it.
        assert met[name] in ({"1": rounds}, {"38": rounds}) and (
            name == "open_tree_attr" or met[name] == {"1": rounds}
        ), name
    counted = Counter(event["kind"] for event in done.denied())
    assert all(counted[f"escape.{n}"] == rounds for n in NUMBERS if n != "open_tree_attr")
    assert counted["escape.unshare"] == counted["escape.clone"] == 7 * rounds
    assert counted["net.socket"] == 9 * rounds


def test_the_same_attempts_without_the_guard() -> None:
    """Negative control: outside, an ordinary user makes namespaces, odd sockets and executable
    memfds, and root mounts in a mount namespace of its own."""
    body = script(ESCAPES, NUMBERS_MORE=MORE, ROUNDS=1).replace("NUMBERS.items()", "()")
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--clear-groups", "--", "/usr/bin/python3", "-c", body],
        capture_output=True,
        text=True,
        check=True,
    )
    met = json.loads(done.stdout)
    if "22" in met["memfd_create"]:  # MFD_EXEC is of Linux 6.3
        del met["memfd_create"]
    assert all("0" in errors for errors in met.values()), met
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False
    )
    assert done.returncode == 0


def test_audit_lets_the_same_calls_run_and_records_them(work: Path) -> None:
    """In the trace profile a user namespace can be made, and is an audit violation."""
    body = script("print(forked(lambda: call(N, 0x10000000)) >> 8)", N=MORE["unshare"])
    options = ("--user", "65534")
    done = run("python3", "-c", body, cwd=work, options=("--profile", "trace", *options))
    assert done.out.strip() == "0"
    assert [event["verdict"] for event in done.denied("escape.unshare")] == ["audit"]
    done = run("python3", "-c", body, cwd=work, options=options)
    assert done.out.strip() == "1"
    assert [event["verdict"] for event in done.denied("escape.unshare")] == ["deny"]


ESCALATE = """
met = {"attempts": 0, "won": []}
def won(how):
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    ids = status["Uid"].split()
    if "0" in ids or int(status["CapEff"], 16) or int(status["CapPrm"], 16):
        met["won"].append([how, status["Uid"], status["CapEff"]])
def tried(how, act):
    met["attempts"] += 1
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except OSError:
            pass
        before = len(met["won"])
        won(how)
        os.write(writer, b"1" if len(met["won"]) > before else b"0")
        os._exit(0)
    os.waitpid(pid, 0)
    if os.read(reader, 1) != b"0":
        met["won"].append(how)
    os.close(reader)
    os.close(writer)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
every = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
def setuid_program():
    import subprocess
    found = subprocess.run([SUID], capture_output=True, text=True).stdout.split()
    if found[:1] == ["0"]:
        met["won"].append(["setuid program", found])
ways = [
    ("setuid", lambda: os.setuid(0)),
    ("setresuid", lambda: os.setresuid(0, 0, 0)),
    ("setreuid", lambda: os.setreuid(0, 0)),
    ("setgid", lambda: os.setgid(0)),
    ("setgroups", lambda: os.setgroups([0])),
    ("capset", lambda: libc.capset(header, every)),
    ("ambient", lambda: [libc.prctl(47, 2, cap, 0, 0) for cap in range(41)]),
    ("keepcaps", lambda: libc.prctl(8, 1, 0, 0, 0)),
    ("userns", lambda: libc.unshare(0x10000000)),
    ("userns-mount", lambda: libc.unshare(0x10020000)),
]
for turn in range(ROUNDS):
    for how, act in ways:
        tried(how, act)
    met["attempts"] += 1
    setuid_program()
met["nnp"] = [l.split()[1] for l in open("/proc/self/status") if l.startswith("NoNewPrivs")][0]
print(json.dumps(met))
"""


@pytest.fixture
def suid(work: Path) -> Path:
    """A set-user-id root program that prints its effective user."""
    source = work / "suid.c"
    source.write_text(
        '#include <stdio.h>\n#include <unistd.h>\nint main(){printf("%d\\n",geteuid());}'
    )
    program = work / "suid"
    subprocess.run(["gcc", "-o", program, source], check=True)
    program.chmod(0o4755)
    work.chmod(0o777)
    for folder in (work, *work.parents):
        if folder == Path("/tmp"):
            break
        folder.chmod(folder.stat().st_mode | 0o055)
    return program


def test_five_hundred_privilege_escalations(work: Path, suid: Path) -> None:
    """setuid calls and programs, capabilities, user namespaces, 500 times: never a privilege."""
    body = script(ESCALATE, SUID=str(suid), ROUNDS=46)
    options = (*patient(work), "--user", "65534")
    done = run("python3", "-c", body, cwd=work, options=options)
    assert done.code == 0, done.err
    met = json.loads(done.out)
    assert met["attempts"] >= 500 and met["won"] == [] and met["nnp"] == "1"
    assert len(done.denied("escape.unshare")) == 2 * 46


def test_the_same_escalations_without_the_guard(work: Path, suid: Path) -> None:
    """Negative control: outside, the set-uid program is root and a user namespace has every
    capability."""
    body = script(ESCALATE, SUID=str(suid), ROUNDS=1)
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--clear-groups", "--", "/usr/bin/python3", "-c", body],
        capture_output=True,
        text=True,
        check=True,
    )
    won = {str(how[0] if isinstance(how, list) else how) for how in json.loads(done.stdout)["won"]}
    assert {"userns", "userns-mount", "setuid program"} <= won


@pytest.mark.skipif(abi.machine() != "x86_64", reason="x86 has other entry points")
def test_other_entry_points_end_the_caller(work: Path) -> None:
    """int 0x80 and x32 calls kill their caller with SIGSYS; outside, int 0x80 works."""
    body = script("""
kept = []
def code(raw):
    memory = mmap.mmap(-1, 4096, prot=7)
    memory.write(raw)
    kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)
I386 = bytes.fromhex("53b814000000cd805bc3")
X32 = bytes.fromhex("53b8270000400f055bc3")
print([forked(lambda raw=raw: 0 if code(raw)() == os.getpid() else 1) for raw in (I386, X32)])
""")
    done = run("python3", "-c", body, cwd=work)
    assert [status & 0x7F for status in json.loads(done.out)] == [31, 31]
    outside = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True)
    assert 31 not in [status & 0x7F for status in json.loads(outside.stdout)]


WAYS = {
    "children": "for _ in range(20): forked(lambda: call(N))",
    "threads": """
threads = [threading.Thread(target=call, args=(N,)) for _ in range(20)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
    "grandchildren": """
def grandchild():
    os.setsid()
    if os.fork() == 0:
        call(N)
        os.execv("/bin/true", ["true"])
    return 0
for _ in range(20): forked(grandchild)
""",
}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_twenty_denials_kill_the_agent(way: str, work: Path) -> None:
    """Twenty denials of children, threads or double-forked grandchildren reach DEFCON 1 at the
    15th, through 4, 3 and 2 at the 3rd, 6th and 10th, and end the run."""
    body = script(WAYS[way] + "\ntime.sleep(20)\nprint('alive')", N=NUMBERS["reboot"])
    done = run("python3", "-c", body, cwd=work)
    assert done.code == 119 and "alive" not in done.out, done.err
    changes = [e["subject"] for e in done.events if e["kind"] == "defcon.change"]
    assert [(c["violations"], c["to"]) for c in changes] == [(3, 4), (6, 3), (10, 2), (15, 1)]


def test_fewer_denials_do_not(work: Path) -> None:
    """Negative control: fourteen denials leave it alive, at level 2."""
    body = script("for n in range(14): call(N, n)\nprint('alive')", N=NUMBERS["reboot"])
    done = run("python3", "-c", body, cwd=work)
    assert done.code == 0 and done.out.strip() == "alive"
    assert [e["subject"]["to"] for e in done.events if e["kind"] == "defcon.change"] == [4, 3, 2]


def test_writable_and_executable_memory_at_level_3(work: Path) -> None:
    """W+X memory can be had at first and is refused from level 3 on."""
    body = script(
        """
def map_it():
    try:
        mmap.mmap(-1, 4096, prot=7)
    except PermissionError:
        return "refused"
    return "mapped"
print(map_it())
for n in range(6): call(N, n)
print(map_it())
""",
        N=NUMBERS["reboot"],
    )
    done = run("python3", "-c", body, cwd=work)
    assert done.out.split() == ["mapped", "refused"]
    assert [event["rule"][:6] for event in done.denied("escape.mmap")] == ["defcon"]


TOOLS = {
    "python": (
        "python3",
        "-c",
        "import concurrent.futures as f, multiprocessing, subprocess, tempfile, asyncio, socket\n"
        "with f.ProcessPoolExecutor(2) as p: print(list(p.map(abs, [1, -2])))\n"
        "with f.ThreadPoolExecutor(2) as p: print(list(p.map(abs, [1, -2])))\n"
        "subprocess.run(['true'], check=True); asyncio.run(asyncio.sleep(0)); socket.socketpair()",
    ),
    "node": (
        "node",
        "-e",
        "const w=require('worker_threads'),c=require('child_process');"
        "c.execSync('true');require('fs').readdirSync('.');"
        "new w.Worker('1',{eval:true}).on('exit',()=>console.log('ok'))",
    ),
    "gcc": ("sh", "-c", "echo 'int main(){return 0;}' > x.c && gcc -O2 x.c -o x && ./x"),
    "git": (
        "sh",
        "-c",
        "git init -q r && cd r && git -c user.name=a -c user.email=b commit -q --allow-empty -m x"
        " && git clone -q . ../r2 && git -C ../r2 log --oneline",
    ),
    "su": ("sh", "-c", "su -c true 2>/dev/null; true"),
}


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_ordinary_tools_meet_no_denial(tool: str, work: Path) -> None:
    """Interpreters, compiler, git and PAM do nothing that the guard refuses."""
    words = TOOLS[tool]
    if not shutil.which(words[0]):
        pytest.skip(f"{words[0]} is not installed")
    done = run(*words, cwd=work)
    assert done.code == 0, done.err
    assert done.denied("escape") == done.denied("net.socket") == []
