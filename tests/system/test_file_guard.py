"""The file guard and the exec gate in real launches: every way to a file we could think of.

Each attack runs twice: guarded, and under a profile without the rule, where it must succeed; an
attack that fails in both proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import PACE, run

pytestmark = pytest.mark.root

PATIENT = "[defcon]\nthresholds = [100000, 200000, 300000, 400000]\n"
PYTHON = "/usr/bin/python3"

COMMON = """
import ctypes, errno, json, mmap, os, shutil, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *args):
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *values)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def content(fd):
    return os.pread(fd, 100, 0).decode()
def read(path, **rest):
    fd = os.open(path, os.O_RDONLY, **rest)
    try:
        return content(fd)
    finally:
        os.close(fd)
def outcome(act, *args):
    try:
        return str(act(*args))
    except OSError as error:
        return errno.errorcode[error.errno]
"""

READS = """
secret, other = ".env", "open.txt"
def symlink():
    os.symlink(secret, "sym"); return read("sym")
def hard_link():
    os.link(secret, "hard"); return read("hard")
def renamed():
    os.rename("moved/.env", "moved/free"); return read("moved/free")
def renamed_folder():
    os.rename("deep", "shallow"); return read("shallow/.env")
def exchanged():
    call(316, -100, b"swap/.env", -100, b"swap/open", 2); return read("swap/open")
def reopened():
    fd = os.open(secret, os.O_PATH); return read(f"/proc/self/fd/{fd}")
def linked_from_fd():
    fd = os.open(secret, os.O_PATH)
    call(265, -100, f"/proc/self/fd/{fd}".encode(), -100, b"fromfd", 0x400); return read("fromfd")
def openat2():
    how = (ctypes.c_uint64 * 3)(0, 0, 0)
    return content(call(437, -100, secret.encode(), ctypes.byref(how), 24))
def mapped():
    with open(secret, "rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:100].decode()
def in_child():
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            os.setsid()
            try:
                print(json.dumps(read(secret)), file=open("grandchild", "w")); os._exit(0)
            except OSError as error:
                print(json.dumps(errno.errorcode[error.errno]), file=open("grandchild", "w"))
                os._exit(0)
        os._exit(os.WEXITSTATUS(os.wait()[1]))
    os.wait()
    return json.load(open("grandchild"))
def in_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(outcome(read, secret)))
    thread.start(); thread.join()
    return found[0]
def passed():
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [os.open(secret, os.O_PATH)])
    return read(f"/proc/self/fd/{socket.recv_fds(theirs, 1, 1)[1][0]}")
def by_folder():
    return read(secret, dir_fd=os.open(".", os.O_PATH))
def for_writing():
    os.close(os.open(secret, os.O_WRONLY)); return "opened"
def truncating():
    os.close(os.open("trunc/.env", os.O_WRONLY | os.O_TRUNC)); return "opened"
def said(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "EPERM"
def program():
    return said("cat", secret)
def redirected():
    return said("sh", "-c", "cat < .env")
def python_module():
    return said(sys.executable, "denied/mod.py")
here = os.getcwd()
ACTS = {
    "plain": lambda: read(secret), "absolute": lambda: read(f"{here}/{secret}"),
    "dots": lambda: read(f"../{os.path.basename(here)}/./{secret}"),
    "slashes": lambda: read(f"{here}//{secret}"),
    "proc root": lambda: read(f"/proc/self/root{here}/{secret}"),
    "proc cwd": lambda: read(f"/proc/self/cwd/{secret}"),
    "nested": lambda: read("sub/.env"), "deeper": lambda: read("a/b/c/.env"),
    "key": lambda: read("id.pem"),
    **{f.__name__: f for f in (
        symlink, hard_link, renamed, renamed_folder, exchanged, reopened, linked_from_fd, openat2,
        mapped, in_child, in_thread, passed, by_folder, for_writing, truncating, program,
        redirected, python_module)},
}
results = {name: outcome(act) for name, act in ACTS.items()}
results["allowed"] = read(other).strip()
print(json.dumps(results))
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A checkout with secrets of several kinds in it."""
    folder = tmp_path / "workspace"
    for name in ("", "sub", "a/b/c", "moved", "deep", "swap", "trunc", "denied"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("", "sub", "a/b/c", "moved", "deep", "swap", "trunc"):
        (folder / name / ".env").write_text("SECRET")
    (folder / "id.pem").write_text("SECRET")
    (folder / "swap/open").write_text("open")
    (folder / "open.txt").write_text("open")
    (folder / "denied/mod.py").write_text("print('SECRET')")
    return folder


def profile(folder: Path, name: str, text: str) -> tuple[str, ...]:
    """A profile beside the workspace, as options."""
    path = folder.parent / f"{name}.toml"
    path.write_text(f'extends = "default"\n{PATIENT}{text}')
    return ("--profile", str(path), "--net", "none")


def attack(script: str, workspace: Path, options: tuple[str, ...]) -> tuple[dict[str, str], Any]:
    """What each act met, and the finished run."""
    done = run(PYTHON, "-c", COMMON + script, cwd=workspace, options=options)
    assert done.code == 0, (done.err, done.out)
    return json.loads(done.out), done


def test_every_way_to_a_denied_file_meets_the_same_verdict(workspace: Path, tmp_path: Path) -> None:
    """By any name, link, descriptor, process or thread: EPERM and an event; without the rule each
    of them reads the secret."""
    control = tmp_path / "control"
    shutil.copytree(workspace, control)
    denied = '[files]\ndeny = ["...", "**/.env", "*.pem", "$WORKSPACE/**/denied/**"]\n'
    met, done = attack(READS, workspace, profile(workspace, "guarded", denied))
    free, _ = attack(READS, control, profile(workspace, "free", ""))
    assert met.pop("allowed") == free.pop("allowed") == "open"
    assert {name: found for name, found in met.items() if found != "EPERM"} == {}
    assert {name: found for name, found in free.items() if found not in ("SECRET", "opened")} == {}
    # The kernel plane refuses to move or link what is denied, the host plane to open it then.
    assert len(done.denied("file.")) >= len(met)
    assert {event["rule"] for event in done.denied("file.open")} == {
        "deny **/.env",
        "deny *.pem",
        "deny $WORKSPACE/**/denied/**",
    }
    assert (workspace / "trunc/.env").read_text() == "SECRET"


RACE = """
stop = time.monotonic() + SECONDS
flips, seen = 0, {"SECRET": 0, "open": 0, "EPERM": 0, "other": 0}
def flip():
    global flips
    while flips < ROUNDS and time.monotonic() < stop:
        for target in (".env", "open.txt"):
            os.symlink(target, "next"); os.rename("next", "race")
        flips += 1
os.symlink("open.txt", "race")
thread = threading.Thread(target=flip); thread.start()
while thread.is_alive():
    found = outcome(read, "race")
    seen[found if found in seen else "other"] += 1
print(json.dumps({"flips": flips, **seen}))
"""


def test_symlink_races(workspace: Path) -> None:
    """A link that flips 5,000 times between an allowed and a denied file never leads to the
    denied one; without the guard it does."""
    script = RACE.replace("ROUNDS", "5000").replace("SECONDS", str(20 * PACE))
    denied = '[files]\ndeny = ["...", "**/.env"]\n'
    met, _ = attack(script, workspace, profile(workspace, "guarded", denied))
    (workspace / "race").unlink()
    free, _ = attack(script, workspace, profile(workspace, "free", ""))
    assert int(met["flips"]) == int(free["flips"]) == 5000
    assert met["SECRET"] == 0 and int(met["EPERM"]) > 10 and int(met["open"]) > 10, met
    assert int(free["SECRET"]) > 10, free


PROGRAMS = """
tool = shutil.which("TOOL")
def started(argv, **rest):
    done = subprocess.run(argv, capture_output=True, text=True, **rest)
    return "ran" if done.returncode == 0 else f"code {done.returncode}"
def executed(act):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        try:
            act()
        except OSError as error:
            os.write(writer, errno.errorcode[error.errno].encode())
        os._exit(0)
    os.close(writer); os.wait()
    return os.read(reader, 20).decode() or "ran"
def argv(path):
    return executed(lambda: os.execv(path, ["TOOL", "--version"]))
def at_fd(fd):
    pointers = (ctypes.c_char_p * 3)(b"TOOL", b"--version", None)
    environment = (ctypes.c_char_p * 1)(None)
    return executed(lambda: call(322, fd, b"", pointers, environment, 0x1000))
def copied():
    shutil.copy(tool, "copy"); os.chmod("copy", 0o755); return argv("./copy")
def hard_linked():
    # Beside it: elsewhere may be another file system.
    os.link(tool, tool + "-linked"); return argv(tool + "-linked")
def soft_linked():
    os.symlink(tool, "soft"); return argv("./soft")
def interpreter():
    with open("script", "w") as file:
        file.write(f"#!{tool} --version\\n")
    os.chmod("script", 0o755)
    return executed(lambda: os.execv("./script", ["script"]))
def loader():
    import glob
    found = executed(lambda: os.execv(glob.glob("/lib64/ld-*.so*")[0], ["ld", tool, "--version"]))
    done = subprocess.run([glob.glob("/lib64/ld-*.so*")[0], tool, "--version"], capture_output=True)
    return "ran" if done.returncode == 0 else "EPERM"
def memory():
    with open(tool, "rb") as file:
        data = file.read()
    fd = call(319, b"x", 0)
    os.write(fd, data)
    return at_fd(fd)
ACTS = {
    "plain": lambda: argv(tool), "descriptor": lambda: at_fd(os.open(tool, os.O_PATH)),
    "proc": lambda: argv(f"/proc/self/fd/{os.open(tool, os.O_PATH)}"),
    "read": lambda: len(read_bytes(tool)) and "ran",
    **{f.__name__: f for f in (copied, hard_linked, soft_linked, interpreter, loader)},
}
def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()
print(json.dumps({name: outcome(act) for name, act in ACTS.items()}))
"""


def test_every_way_to_a_denied_program_meets_the_same_verdict(workspace: Path) -> None:
    """A program of @lolbins is not executed by path, link, copy, descriptor, script or loader;
    without the rule each way runs it."""
    tool = next(name for name in ("curl", "wget", "rsync", "ssh", "strace") if shutil.which(name))
    script = PROGRAMS.replace("TOOL", tool)
    denied = '[exec]\ndeny = ["@lolbins"]\n'
    met, done = attack(script, workspace, profile(workspace, "guarded", denied))
    for left in ("copy", "soft", "script"):
        (workspace / left).unlink(missing_ok=True)
    free, _ = attack(script, workspace, profile(workspace, "free", ""))
    # The kernel plane refuses the link itself, as one between two file systems.
    refusals = ("EPERM", "EXDEV")
    assert {name: found for name, found in met.items() if found not in refusals} == {}
    assert {name: found for name, found in free.items() if found != "ran"} == {}
    assert {event["rule"] for event in done.denied("exec.run")} == {"deny @lolbins"}


def test_what_memory_holds_is_not_executed(workspace: Path) -> None:
    """A program written into a memfd does not run, where a copy on disk may."""
    script = PROGRAMS.replace("TOOL", "true").replace(
        "print(json.dumps({name: outcome(act) for name, act in ACTS.items()}))",
        'print(json.dumps({"memory": outcome(memory), "copied": outcome(copied)}))',
    )
    met, _ = attack(script, workspace, profile(workspace, "free", ""))
    assert met["copied"] == "ran"
    assert met["memory"] in ("EACCES", "EPERM", "ENOSYS")


def test_a_list_of_allowed_programs(workspace: Path) -> None:
    """Only what [exec] allow names runs; its libraries load; another program cannot even be read;
    a script needs both itself and its interpreter."""
    (workspace / "tool.sh").write_text("#!/bin/sh\necho script ran\n")
    (workspace / "tool.sh").chmod(0o755)
    script = """
def argv(*words):
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        return errno.errorcode[error.errno]
print(json.dumps({"sh": argv("sh", "-c", "echo sh ran"), "script": argv("./tool.sh"),
    "ls": argv("ls"), "read ls": outcome(read_all, "/usr/bin/ls"), "libm": str(bool(
    ctypes.CDLL("libm.so.6"))), "sqlite": str(bool(__import__("sqlite3")))}))
""".replace("print(json", "def read_all(p):\n    return len(open(p,'rb').read())\nprint(json")
    only = '[exec]\nallow = ["@python", "sh"]\n'
    with_script = '[exec]\nallow = ["@python", "sh", "$WORKSPACE/tool.sh"]\n'
    met, _ = attack(script, workspace, profile(workspace, "only", only))
    more, _ = attack(script, workspace, profile(workspace, "more", with_script))
    assert met == {
        "sh": "sh ran",
        "script": "EPERM",
        "ls": "EPERM",
        "read ls": "EPERM",
        "libm": "True",
        "sqlite": "True",
    }
    assert more["script"] == "script ran"


def test_a_program_bound_to_its_content(workspace: Path, tmp_path: Path) -> None:
    """With #sha256 a program runs while it has that content, where the agent cannot write."""
    tools = tmp_path / "tools"
    tools.mkdir()
    shutil.copy("/usr/bin/true", tools / "good")
    shutil.copy("/usr/bin/echo", tools / "bad")
    shutil.copy("/usr/bin/true", workspace / "mine")
    digest = hashlib.sha256((tools / "good").read_bytes()).hexdigest()
    rules = ", ".join(
        f'"{path}#sha256:{digest}"' for path in (tools / "good", tools / "bad", workspace / "mine")
    )
    options = profile(workspace, "hash", f'[exec]\nallow = ["@python", "sh", {rules}]\n')
    script = f"{tools}/good && echo good; {tools}/bad echo bad; ./mine && echo mine; true"
    done = run(
        "sh", "-c", script, cwd=workspace, options=(*options, "--bind", f"{tools}:{tools}:ro")
    )
    assert done.out == "good\n", (done.out, done.err)
    assert len(done.denied("exec.run")) >= 2


def test_what_no_rule_names_is_denied(workspace: Path) -> None:
    """Without @workspace in its rules a profile gives no file of it."""
    options = profile(workspace, "narrow", '[files]\nread = ["@system"]\nwrite = ["/var/tmp/**"]\n')
    done = run(
        "sh",
        "-c",
        "cat open.txt; echo x > /var/tmp/y && cat /var/tmp/y",
        cwd=workspace,
        options=options,
    )
    assert done.out == "x\n"
    assert [event["rule"] for event in done.denied("file.open")] == ["default"]
    done = run("cat", "open.txt", cwd=workspace, options=profile(workspace, "free", ""))
    assert done.out == "open" and done.denied() == []


def test_the_more_specific_rule_decides(workspace: Path) -> None:
    """An exact path beats a floating denial, a floating denial an allowed folder, in any order."""
    text = '[files]\nread = ["$WORKSPACE/sub/.env", "..."]\ndeny = ["**/.env", "..."]\n'
    done = run(
        *("sh", "-c", "cat sub/.env; cat .env"),
        cwd=workspace,
        options=profile(workspace, "mixed", text),
    )
    assert done.out == "SECRET"
    assert [event["subject"]["path"] for event in done.denied()] == [f"{workspace}/.env"]


def test_a_rule_marked_kill(workspace: Path) -> None:
    """Opening a honey pot ends all of the agent at once, with DEFCON's exit code."""
    (workspace / "honey").write_text("pot")
    options = profile(workspace, "kill", '[files]\nkill = ["$WORKSPACE/honey"]\n')
    script = f"(sleep {5 * PACE}; echo survived) & sleep 1; cat honey; wait"
    done = run("sh", "-c", script, cwd=workspace, options=options)
    assert done.code == 119 and done.out == ""
    assert done.denied()[0]["verdict"] == "kill"


def test_audit_denies_nothing_and_tells_everything(workspace: Path) -> None:
    """In audit mode the same open succeeds and is recorded."""
    text = '[files]\ndeny = ["...", "**/.env"]\n[mode]\nenforce = false\n'
    done = run("cat", ".env", cwd=workspace, options=profile(workspace, "audit", text))
    assert done.out == "SECRET"
    assert [event["verdict"] for event in done.denied("file.open")] == ["audit"]


def test_levels_change_verdicts(workspace: Path) -> None:
    """From level 3 on a program not executed before is refused, one executed before is not, even
    though the kernel had remembered others; at 2 only what a rule names explicitly is opened."""
    path = workspace.parent / "levels.toml"
    path.write_text('extends = "default"\n[files]\ndeny = ["...", "**/.env"]\n')
    script = (
        "cat open.txt; ls >/dev/null; for i in 1 2 3 4 5 6; do cat .env; done; cat open.txt; id -u"
    )
    done = run("sh", "-c", script, cwd=workspace, options=("--profile", str(path), "--net", "none"))
    assert done.out == "openopen", (done.out, done.err)
    assert done.denied("exec.run")[0]["rule"].startswith("defcon")


def test_level_3_keeps_writes_in_the_workspace(workspace: Path) -> None:
    """Before, /var/tmp and the home take files; from level 3 on only the workspace does."""
    path = workspace.parent / "writes.toml"
    path.write_text(
        'extends = "default"\n[files]\ndeny = ["...", "**/.env"]\n[defcon]\n'
        "effects = { binaries = 0, explicit = 0, kill = 0 }\n"
    )
    write = "(echo x > $d/y) 2>/dev/null && echo $d"
    script = f"""
    for d in . /var/tmp $HOME; do {write}; done; echo then
    for i in 1 2 3 4 5 6 7; do cat .env 2>/dev/null; done
    for d in . /var/tmp $HOME; do {write}; done"""
    done = run("sh", "-c", script, cwd=workspace, options=("--profile", str(path), "--net", "none"))
    home = os.path.expanduser("~")
    assert done.out.split() == [".", "/var/tmp", home, "then", "."], (done.out, done.err)


def test_the_agent_can_read_its_rules_and_its_denials(workspace: Path) -> None:
    """In words and as JSON; the denial names what would allow it; nothing there can be changed."""
    denied = '[files]\ndeny = ["...", "**/.env"]\n'
    script = """
    cat .env 2>/dev/null; cat $MIS_INFO/README; echo; echo ----; cat $MIS_INFO/rules.json; echo ----
    sleep 0.1; cat $MIS_INFO/denials.jsonl
    (echo x >> $MIS_INFO/denials.jsonl) 2>/dev/null && echo changed"""
    done = run("sh", "-c", script, cwd=workspace, options=profile(workspace, "told", denied))
    words, rules, denials = done.out.split("----\n")
    assert "**/.env" in words and "Network: none" in words
    assert json.loads(rules)["files"]["deny"][-1] == "**/.env"
    (line,) = denials.splitlines()
    assert json.loads(line)["path"] == f"{workspace}/.env"
    assert json.loads(line)["allow_by_profile"] == f'[files] read = ["...", "{workspace}/.env"]'


@pytest.mark.parametrize("who", ["processes", "threads"])
def test_thresholds_are_exact(workspace: Path, who: str) -> None:
    """Sixteen concurrent violators cross 3, 6, 10 and 15 exactly once each, and DEFCON 1 comes
    at the fifteenth."""
    path = workspace.parent / "exact.toml"
    path.write_text('extends = "default"\n[files]\ndeny = ["...", "**/.env"]\n')
    script = (
        COMMON
        + """
def violate():
    for _ in range(20):
        outcome(read, ".env"); time.sleep(0.02)
if sys.argv[1] == "processes":
    for _ in range(16):
        if os.fork() == 0:
            violate(); os._exit(0)
else:
    for _ in range(16):
        threading.Thread(target=violate).start()
time.sleep(20)
"""
    )
    done = run(
        *(PYTHON, "-c", script, who),
        cwd=workspace,
        options=("--profile", str(path), "--net", "none"),
    )
    changes = [event["subject"] for event in done.events if event["kind"] == "defcon.change"]
    assert [(one["to"], one["violations"]) for one in changes] == [(4, 3), (3, 6), (2, 10), (1, 15)]
    assert done.code == 119
    killed = next(event["subject"] for event in done.events if event["kind"] == "run.killed")
    assert killed["populated"] == 0


def test_a_storm_of_opens(workspace: Path) -> None:
    """64 processes that open as fast as they can get every verdict right, and the run ends."""
    script = (
        COMMON
        + """
for number in range(64):
    if os.fork() == 0:
        wrong = 0
        for turn in range(100):
            name = f"made-{number}-{turn}"
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY)); wrong += read(name) != ""
            wrong += outcome(read, ".env") != "EPERM"
            os.unlink(name)
        os._exit(wrong > 0)
print(sum(os.wait()[1] for _ in range(64)))
"""
    )
    options = profile(workspace, "storm", '[files]\ndeny = ["...", "**/.env"]\n')
    done = run(PYTHON, "-c", script, cwd=workspace, options=options, timeout=120)
    assert done.out == "0\n", (done.out, done.err)
    assert sum(1 for _ in done.denied("file.open")) == 6400


def test_a_heartbeat_tries_the_guards_again_and_again(workspace: Path) -> None:
    """Canaries are tried while the agent runs, and are not the agent's violations."""
    options = profile(workspace, "beat", '[liveness]\ncanary = "50ms"\n')
    done = run("sleep", "1", cwd=workspace, options=options)
    assert done.code == 0 and done.denied() == []
    facts = next(event["subject"] for event in done.events if event["kind"] == "run.exit")
    assert facts["canaries"] >= 5 and facts["network"]["denied"] == 0


def test_the_canary_is_nobody_elses(workspace: Path) -> None:
    """An agent that opens a canary is denied, and counted: that of the plane that judges."""
    script = "cat /run/mis/canary /run/mis/kernel-canary"
    done = run("sh", "-c", script, cwd=workspace, options=profile(workspace, "free", ""))
    (event,) = done.denied()
    assert event["subject"]["path"] in script.split()


def test_fifos_and_special_files_work(workspace: Path) -> None:
    """A FIFO between two processes carries what is written, also when the writer comes first."""
    script = "mkfifo p; (echo hello > p) & sleep 0.2; cat p; wait; head -c1 /dev/zero | wc -c"
    done = run("sh", "-c", script, cwd=workspace, options=profile(workspace, "free", ""))
    assert done.out == "hello\n1\n", (done.out, done.err)
    assert done.denied() == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
