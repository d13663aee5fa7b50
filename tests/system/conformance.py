"""One table of acts, rules and verdicts, for both planes.

A row is an act of the agent, what it must meet, and the violation that the record must show: its
kind, its rule, and exactly how many.  Where the planes differ the row says so, and why (`Reason`).
`table` is pure; `run` launches one agent for all rows of a group.  test_conformance.py (here, and
tests/vm/inside/) has the tests; what the acts do is in conformance_acts.py.
"""

from __future__ import annotations

import errno
import json
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from harness import run as launched

ACTS = Path(__file__).with_name("conformance_acts.py")
PYTHON = "/usr/bin/python3"
OK, EPERM, ENOSYS = 0, errno.EPERM, errno.ENOSYS

PROFILE = """
extends = "default"
[files]
read = ["@system", "/var/tmp/**", "$WORKSPACE/open", "$WORKSPACE/one.txt"]
write = ["/var/tmp/**", "$WORKSPACE/open", "$WORKSPACE/results"]
deny = ["...", "**/*.key"]
[exec]
allow = ["@system", "$WORKSPACE/open"]
deny = ["$WORKSPACE/open/outlaw"]
[defcon]
act = false
[liveness]
deadline = "5s"
beat = "200ms"
"""


class Reason(StrEnum):
    """Why the planes judge a row differently; docs/decisions/kernel-plane.md has these too."""

    NO_OPEN = "fanotify tells of opens only: what else is done to a file the mounts decide"
    LINK = "the kernel plane refuses the link or move itself, by which a file would become readable"
    SILENT = "a capability that is not there refuses it on the host plane, and tells nobody"
    PLACE = (
        "the host plane judges a file where it is opened; the kernel plane keeps it where it was"
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """``act`` is a function of conformance_acts, ``args`` its arguments ({W}: the
    workspace, {T}: a scratch folder).

    ``met`` is 0, an errno or a word; ``kind`` and ``rule`` of the violation, ``count`` how many
    (None: at least one).  ``control``: what the same act meets without any guard, None where it
    must not be tried on a host.
    """

    name: str
    group: str
    act: str
    args: tuple[Any, ...]
    met: int | str = OK
    kind: str = ""
    rule: str = ""
    count: int | None = 0
    control: int | str | None = OK
    kernel: Row | None = None
    reason: Reason | None = None

    def on(self, plane: str) -> Row:
        """The row as ``plane`` (host or kernel) must judge it."""
        return self.kernel if plane == "kernel" and self.kernel else self


# ---- opens: every way to a file, in every kind of place ---------------------------------------

WAYS = (
    *("opened", "reopened", "soft", "chain", "by_folder", "openat2", "spelled", "rooted"),
    *("from_cwd", "mapped", "in_thread", "in_child", "in_orphan", "by_program", "handed_over"),
    "after_exec",
)
FLAGS = {
    "for writing": ("O_WRONLY",),
    "for both": ("O_RDWR",),
    "for appending": ("O_WRONLY", "O_APPEND"),
    "without following": ("O_RDONLY", "O_NOFOLLOW"),
    "truncating": ("O_WRONLY", "O_TRUNC"),
}
# place → file, rule that denies it ("": allowed), whether it may be written without guard
PLACES = {
    "allowed": ("{W}/open/file", "", True),
    "unlisted": ("{W}/none/file", "default", True),
    "a pattern's": ("{W}/open/a.key", "deny **/*.key", True),
    "named itself": ("{W}/one.txt", "", True),
    "secret": ("/etc/shadow", "deny @secrets", False),
    "system": ("/etc/passwd", "", False),
}


def _opens() -> list[Row]:
    rows = []
    for place, (path, rule, writable) in PLACES.items():
        denied = {"met": EPERM, "kind": "file.open", "rule": rule, "count": 1} if rule else {}
        for way in WAYS:
            rows.append(
                Row(name=f"{place}: {way}", group="opens", act=way, args=(path,), **denied)  # type: ignore[arg-type]
            )
        for words, flags in FLAGS.items() if writable else ():
            rows.append(
                Row(
                    name=f"{place}: {words}",
                    group="opens",
                    act="flags",
                    args=(path, *flags),
                    **denied,  # type: ignore[arg-type]
                )
            )
        if rule:
            rows.append(
                Row(
                    name=f"{place}: eight children at once",
                    group="opens",
                    act="many",
                    args=(path, 8),
                    **{**denied, "count": 8},  # type: ignore[arg-type]
                )
            )
    return rows


# ---- what is done to a file or a folder without opening it ------------------------------------


def _tree() -> list[Row]:
    def differs(name: str, act: str, *args: str, kind: str, reason: Reason, **kernel: Any) -> Row:
        row = Row(name=name, group="tree", act=act, args=args)
        met = {"met": EPERM, "kind": kind, "rule": "default", "count": 1, **kernel}
        return replace(row, reason=reason, kernel=replace(row, **met))

    def free(name: str, act: str, *args: str, **rest: Any) -> Row:
        return Row(name=name, group="tree", act=act, args=args, **rest)

    none, key = "{W}/none", "{W}/open/b.key"
    opens_it = {"truncated": "truncate", "mode": "chmod", "owner": "chown", "times": "setattr"}
    makes = {"folder_made": "mkdir", "fifo": "mknod", "linked": "symlink", "bound": "mknod"}
    patterns = {"kind": "", "reason": Reason.NO_OPEN, "rule": "deny **/*.key"}
    rows = [
        *(free(f"allowed: {act}", act, "{W}/open/file") for act in (*opens_it, "facts", "asked")),
        *(free(f"unlisted: {act}", act, f"{none}/file") for act in ("facts", "asked")),
        *(free(f"{place}: listed", "listed", folder) for place, folder in
          (("allowed", "{W}/open"), ("unlisted", none), ("root", "/"), ("system", "/etc"))),
        *(free(f"allowed: {act}", act, "{W}/open") for act in (*makes, "made")),
        free("allowed: watched", "watched", "{W}/open/file"),
        free("allowed: unlinked", "unlinked", "{W}/open/old1"),
        free("allowed: renamed", "renamed", "{W}/open/old2"),
        free("allowed: folder_removed", "folder_removed", "{W}/open/oldfolder"),
        free("scratch: made", "made", "{T}"),
        free("scratch: folder_made", "folder_made", "{T}"),
        # To make a file is to open it; what was made before the verdict stays, empty.
        free("a pattern's: made", "made_named", "{W}/open", ".key",
             met=EPERM, kind="file.open", rule="deny **/*.key", count=1),
        replace(
            one := free("unlisted: made", "made", none, met=EPERM, kind="file.open",
                        rule="default", count=1),
            reason=Reason.NO_OPEN, kernel=replace(one, kind="file.mknod"),
        ),
        *(differs(f"unlisted: {act}", act, f"{none}/file", kind=f"file.{word}",
                  reason=Reason.NO_OPEN) for act, word in opens_it.items()),
        *(differs(f"unlisted: {act}", act, none, kind=f"file.{word}", reason=Reason.NO_OPEN)
          for act, word in makes.items()),
        differs("unlisted: watched", "watched", f"{none}/file", kind="file.notify",
                reason=Reason.NO_OPEN),
        differs("unlisted: unlinked", "unlinked", f"{none}/old1", kind="file.unlink",
                reason=Reason.NO_OPEN),
        differs("unlisted: renamed", "renamed", f"{none}/old2", kind="file.rename",
                reason=Reason.NO_OPEN),
        differs("unlisted: folder_removed", "folder_removed", f"{none}/oldfolder",
                kind="file.rmdir", reason=Reason.NO_OPEN),
        *(differs(f"a pattern's: {act}", act, key, **{**patterns, "kind": f"file.{word}"})
          for act, word in opens_it.items()),
        differs("a pattern's: unlinked", "unlinked", "{W}/open/c.key",
                **{**patterns, "kind": "file.unlink"}),
        differs("a pattern's: renamed", "renamed", "{W}/open/d.key",
                **{**patterns, "kind": "file.rename"}),
        differs("unlisted: linked and read", "hard_then_read", f"{none}/file2", "{W}/open",
                kind="file.link", reason=Reason.PLACE),
        differs("unlisted: moved and read", "moved_then_read", f"{none}/old3", "{W}/open",
                kind="file.rename", reason=Reason.PLACE),
        differs("unlisted: exchanged and read", "exchanged_then_read", f"{none}/old4",
                "{W}/open/old4", kind="file.rename", reason=Reason.PLACE),
        # The host plane knows a denied file by its inode, and refuses to read it there.
        *(
            replace(
                one := free(f"a pattern's: {words}", act, path, "{W}/open", met=EPERM,
                            kind="file.open", rule="deny **/*.key", count=1),
                reason=Reason.LINK, kernel=replace(one, kind=f"file.{word}"),
            )
            for words, act, path, word in (
                ("linked and read", "hard_then_read", "{W}/open/e.key", "link"),
                ("moved and read", "moved_then_read", "{W}/open/f.key", "rename"),
            )
        ),
        free("allowed: linked and read", "hard_then_read", "{W}/open/file2", "{W}/open"),
        free("allowed: moved and read", "moved_then_read", "{W}/open/old3", "{W}/open"),
    ]  # fmt: skip
    device = free("allowed: device", "device", "{W}/open", met=EPERM, control=None)
    told = replace(device, kind="escape.mknod", rule="default", count=1)
    return [*rows, replace(device, reason=Reason.SILENT, kernel=told)]


# ---- programs -------------------------------------------------------------------------------

FINE, OUTLAW, STRAY = "{W}/open/fine", "{W}/open/outlaw", "{W}/none/prog"
RUNS = ("executed", "spawned", "by_fd", "by_proc_fd", "soft_executed", "in_thread_executed")


def _programs() -> list[Row]:
    rows = []
    where = {
        "allowed": (FINE, ""),
        "system": ("/bin/true", ""),
        "denied": (OUTLAW, "deny $WORKSPACE/open/outlaw"),
        "unlisted": (STRAY, "default"),
    }
    for place, (path, rule) in where.items():
        denied = {"met": EPERM, "kind": "exec.run", "rule": rule, "count": 1} if rule else {}
        rows += [
            Row(name=f"{place}: {act}", group="programs", act=act, args=(path,), **denied)  # type: ignore[arg-type]
            for act in RUNS
        ]
    both = {"group": "programs"}
    rows += [
        Row(name="allowed: interpreter", act="interpreted", args=(FINE, "{W}/open"), **both),  # type: ignore[arg-type]
        Row(name="denied: interpreter", act="interpreted", args=(OUTLAW, "{W}/open"), met=EPERM,
            kind="exec.run", rule="deny $WORKSPACE/open/outlaw", count=1, **both),  # type: ignore[arg-type]
        Row(name="allowed: copied", act="copy_executed", args=(FINE, "{W}/open"), **both),  # type: ignore[arg-type]
        Row(name="allowed: hard link", act="hard_executed", args=(FINE, "{W}/open"), **both),  # type: ignore[arg-type]
        Row(name="denied: read", act="opened", args=(OUTLAW,), met=EPERM, kind="file.open",
            rule="deny $WORKSPACE/open/outlaw", count=1, **both),  # type: ignore[arg-type]
        Row(name="denied: copied", act="copy_executed", args=(OUTLAW, "{W}/open"), met=EPERM,
            kind="file.open", rule="deny $WORKSPACE/open/outlaw", count=1, **both),  # type: ignore[arg-type]
        Row(name="allowed: by the loader", act="loaded", args=(FINE,), **both),  # type: ignore[arg-type]
    ]  # fmt: skip
    return rows


# ---- sockets and calls ------------------------------------------------------------------------

INET, INET6 = int(socket.AF_INET), int(socket.AF_INET6)
STREAM, DGRAM, RAW = 1, 2, 3
CALLS: dict[str, tuple[Any, ...]] = {
    # name → number on x86_64 and arguments; each refused whatever they are
    "mount": (165, 0, 0, 0, 0, 0),
    "umount2": (166, 0, 0),
    "pivot_root": (155, 0, 0),
    "chroot": (161, 0),
    "setns": (308, 0, 0),
    "ptrace": (101, 16, 1, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
    "kcmp": (312, 1, 1, 0, 0, 0),
    "pidfd_getfd": (438, 0, 0, 0),
    "bpf": (321, 0, 0, 0),
    "perf_event_open": (298, 0, 0, 0, 0, 0),
    "userfaultfd": (323, 1),
    "fanotify_init": (300, 0, 0),
    "add_key": (248, 0, 0, 0, 0, 0),
    "keyctl": (250, 0, 0),
    "init_module": (175, 0, 0, 0),
    "delete_module": (176, 0, 0),
    "io_uring_enter": (426, 0, 0, 0, 0, 0, 0),
    "swapon": (167, 0, 0),
    "syslog": (103, 3, 0, 0),
    "quotactl": (179, 0, 0, 0, 0),
    "sethostname": (170, 0, 0),
    "iopl": (172, 3),
    "open_by_handle_at": (304, 0, 0, 0),
    "name_to_handle_at": (303, 0, 0, 0, 0, 0),
    "move_mount": (429, 0, 0, 0, 0, 0),
    "open_tree": (428, 0, 0, 0),
    "fsopen": (430, 0, 0),
    "mount_setattr": (442, 0, 0, 0, 0, 0),
}


def _calls() -> list[Row]:
    refused = {"met": EPERM, "count": 1, "control": None, "group": "calls"}
    rows = [
        Row(name=f"call: {name}", act="syscall", args=words, kind=f"escape.{name}",
            rule="builtin escape", **refused)  # type: ignore[arg-type]
        for name, words in CALLS.items()
    ]  # fmt: skip
    for kind, flag in {"user": 0x10000000, "mnt": 0x20000, "net": 0x40000000}.items():
        rows.append(
            Row(name=f"call: unshare {kind}", act="syscall", args=(272, flag),
                kind="escape.unshare", rule="builtin escape", **refused)  # type: ignore[arg-type]
        )  # fmt: skip
    net = {"group": "calls", "control": None}
    rows += [
        Row(name="tcp to nobody", act="connected", args=(INET, STREAM, "198.51.100.1"), met=EPERM,
            kind="net.connect", rule="default", count=1, **net),  # type: ignore[arg-type]
        Row(name="tcp6 to nobody", act="connected", args=(INET6, STREAM, "2001:db8::1"), met=EPERM,
            kind="net.connect", rule="default", count=1, **net),  # type: ignore[arg-type]
        Row(name="udp to nobody", act="sent", args=(INET, "198.51.100.1"), met=EPERM,
            kind="net.send", rule="default", count=1, **net),  # type: ignore[arg-type]
        Row(name="raw socket", act="sock", args=(INET, RAW, 1), met=EPERM, kind="net.socket",
            count=1, **net),  # type: ignore[arg-type]
        Row(name="packet socket", act="sock", args=(17, RAW, 0), met=errno.EAFNOSUPPORT,
            kind="net.socket", count=1, **net),  # type: ignore[arg-type]
        Row(name="vsock", act="sock", args=(40, STREAM), met=errno.EAFNOSUPPORT,
            kind="net.socket", count=1, **net),  # type: ignore[arg-type]
        Row(name="kernel crypto socket", act="sock", args=(38, 5), met=errno.EAFNOSUPPORT,
            kind="net.socket", count=1, **net),  # type: ignore[arg-type]
        Row(name="tcp socket", act="sock", args=(INET, STREAM), group="calls"),
        Row(name="unix socket", act="sock", args=(1, STREAM), group="calls"),
        Row(name="abstract name of its own", act="abstract", args=(), group="calls"),
        Row(name="listening on loopback", act="listening", args=(INET, "127.0.0.1", 0),
            group="calls"),
        Row(name="tracing its own child", act="traced_child", args=(), met=EPERM,
            kind="escape.ptrace", rule="builtin escape", count=1, group="calls"),
        Row(name="a signal to its own child", act="child_signalled", args=(), group="calls"),
        Row(name="a signal to the container's init", act="signalled", args=(1,), **net),  # type: ignore[arg-type]
        Row(name="writing a kernel setting", act="written",
            args=("/proc/sys/kernel/hostname", "x"), met=errno.EROFS, **net),  # type: ignore[arg-type]
    ]  # fmt: skip
    return rows


def _races() -> list[Row]:
    denied = {"group": "races", "met": "refused", "kind": "file.open", "count": None}
    return [
        Row(name="a link flips to the unlisted", act="link_race", rule="default",
            args=("{W}/open/file2", "{W}/none/secret", 300), control="leaked", **denied),  # type: ignore[arg-type]
        Row(name="a link flips to a pattern's", act="link_race", rule="deny **/*.key",
            args=("{W}/open/file2", "{W}/open/secret.key", 300), control="leaked", **denied),  # type: ignore[arg-type]
        Row(name="a link flips to the host's secret", act="link_race", rule="deny @secrets",
            args=("{W}/open/file2", "/etc/shadow", 300), control=None, **denied),  # type: ignore[arg-type]
        Row(name="two names exchanged", act="rename_race", rule="deny **/*.key",
            args=("{W}/open/swap", "{W}/open/swap.key", 300), control="leaked",
            **{**denied, "kind": "file."}),  # type: ignore[arg-type]
    ]  # fmt: skip


def table() -> list[Row]:
    """Every row; names are unique."""
    return [*_opens(), *_tree(), *_programs(), *_calls(), *_races()]


GROUPS = ("opens", "tree", "programs", "calls", "races")


# ---- running it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a row met, and its violations."""

    met: int | str
    events: list[dict[str, Any]]


def make(workspace: Path) -> None:
    """The files that the rows are about."""
    for name in ("open", "none", "results"):
        (workspace / name).mkdir(parents=True)
        (workspace / name).chmod(0o777)
    for folder in ("open", "none"):
        for name in ("file", "file2", "old1", "old2", "old3", "old4"):
            (workspace / folder / name).write_text("open\n")
        (workspace / folder / "oldfolder").mkdir()
        (workspace / folder / "secret").write_text("SECRET\n")
    for name in (*(f"{letter}.key" for letter in "abcdef"), "secret.key", "swap.key"):
        (workspace / "open" / name).write_text("SECRET\n")
    (workspace / "open/swap").write_text("open\n")
    (workspace / "one.txt").write_text("open\n")
    for path in (FINE, OUTLAW, STRAY):
        program = Path(path.format(W=workspace))
        shutil.copy("/bin/true", program)
        with program.open("ab") as file:  # no two with one content
            file.write(path.encode())
        program.chmod(0o755)
    shutil.copy(ACTS, workspace / "open/acts.py")


def prepared(workspace: Path, rows: list[Row], scratch: str, seen: str = "") -> list[str]:
    """The command line that runs the rows; ``seen``: the workspace's path there, if another."""
    make(workspace)
    todo = [
        (f"r{number}", row.act, [
            arg.format(W=seen or workspace, T=scratch) if isinstance(arg, str) else arg
            for arg in row.args
        ])
        for number, row in enumerate(rows)
    ]  # fmt: skip
    (workspace / "open/rows.json").write_text(json.dumps(todo))
    return [PYTHON, "-I", "open/acts.py", "open/rows.json", "results/results.json", scratch]


def run(rows: list[Row], workspace: Path, plane: str) -> dict[str, Outcome]:
    """Launch an agent that does all of ``rows``; name → outcome."""
    argv = prepared(workspace, rows, "/var/tmp")
    profile = workspace.parent / "profile.toml"
    profile.write_text(PROFILE)
    options = ("--profile", str(profile), "--net", "none", "--plane", plane)
    done = launched(*argv, cwd=workspace, options=options, timeout=240)
    assert done.code == 0, (done.err, done.out)
    events = defaultdict(list)
    for event in done.denied():
        events[event.get("comm", "")].append(event)
    met = json.loads((workspace / "results/results.json").read_text())
    assert set(events) <= set(met), set(events) - set(met)
    return {
        row.name: Outcome(met[f"r{number}"], events[f"r{number}"])
        for number, row in enumerate(rows)
    }


class Launches:
    """The outcomes of a group; its agent is launched when they are first asked for."""

    def __init__(self, plane: str, folder: Callable[[str], Path]) -> None:
        self._plane = plane
        self._folder = folder
        self._known: dict[str, dict[str, Outcome]] = {}

    def of(self, row: Row) -> Outcome:
        """What ``row`` met."""
        if row.group not in self._known:
            rows = [one for one in table() if one.group == row.group]
            self._known[row.group] = run(rows, self._folder("c") / "ws", self._plane)
        return self._known[row.group][row.name]


def control(rows: list[Row], workspace: Path) -> dict[str, int | str]:
    """What the same acts meet without mis-run, of rows that have a control."""
    rows = [row for row in rows if row.control is not None]
    argv = prepared(workspace, rows, str(workspace / "results"))
    subprocess.run([sys.executable, *argv[1:]], cwd=workspace, check=True, timeout=240)
    met = json.loads((workspace / "results/results.json").read_text())
    return {row.name: met[f"r{number}"] for number, row in enumerate(rows)}


def differences(row: Row, outcome: Outcome) -> list[str]:
    """What of a row's outcome is not as the row says; empty when all is."""
    found = []
    if outcome.met != row.met:
        found.append(f"met {_word(outcome.met)}, not {_word(row.met)}")
    shown = [(event["kind"], event.get("rule")) for event in outcome.events]
    if row.count is None:
        if not shown:
            found.append("no violation")
    elif len(shown) != row.count:
        found.append(f"{len(shown)} violations, not {row.count}: {shown}")
    for kind, rule in shown:
        if not kind.startswith(row.kind) or (row.rule and row.rule != rule):
            found.append(f"{kind} by {rule!r}, not {row.kind} by {row.rule!r}")
    return found


def _word(met: int | str) -> str:
    return errno.errorcode.get(met, "OK") if isinstance(met, int) else met
