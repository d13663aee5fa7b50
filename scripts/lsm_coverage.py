"""Write docs/lsm-coverage.md: every LSM hook of the test VM's kernels, and what we do about it.

    python scripts/lsm_coverage.py          boot both kernels, write the document
    python scripts/lsm_coverage.py facts    inside one of them: print its hooks as JSON

Guarded hooks are read from bpf/lsm_*.bpf.c, existing ones from the kernel's BTF, the words for all
others are below. A hook without words, or with words though it is guarded, is an error, here and in
tests/vm/inside/test_lsm_coverage.py.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "lsm-coverage.md"
MARK = "MIS-LSM-FACTS "
AREAS = {"file": "files", "tree": "files", "exec": "programs", "escape": "escape", "net": "sockets"}

# Functions of the BPF LSM itself that are named as if they were hooks.
NOT_HOOKS = frozenset(
    "find_cgroup_shim func_proto get_retval_range init is_sleepable_hook is_trusted verify_prog"
    "".split()
)

# Words by hook, as patterns; the first word says the class.
EXPLAINED: Mapping[str, str] = {
    # ---- covered by another hook ----
    r"file_(permission|post_open|truncate)": "covered by file_open: a descriptor was judged with "
    "its access mode, and is judged again when it arrives from elsewhere (file_receive)",
    r"mmap_backing_file": "covered by mmap_file, which sees the file on top",
    r"inode_(create|link|unlink|symlink|mkdir|rmdir|mknod|rename)": "covered by path_{name}: with "
    "the mount, and not called for the layers of an overlay",
    r"path_post_mknod|inode_post_\w+": "covered by the hook before the act",
    r"inode_(set|remove)security|inode_setsecctx|inode_notifysecctx": "covered by inode_setxattr",
    r"inode_permission": "covered by file_open and path_*: it has no mount, and is called for "
    "every component of every path",
    r"bprm_creds_for_exec": "covered by file_open and bprm_check_security",
    r"bpf_(map_create|prog_load)": "covered by bpf",
    r"bpf_token_\w+": "covered by bpf",
    r"perf_event_alloc": "covered by perf_event_open: no descriptor, nothing to read",
    r"kernel_post_(read_file|load_data)": "covered by kernel_read_file and kernel_load_data",
    r"key_(post_create_or_update|getsecurity)": "covered by key_alloc and key_permission",
    r"(fs_context|sb)_(dup|submount|set_mnt_opts|clone_mnt_opts|eat_lsm_opts"
    r"|mnt_opts_compat)": "covered by sb_mount, fs_context_parse_param and sb_kern_mount",
    r"tun_dev_attach": "covered by tun_dev_create",
    r"task_prlimit": "covered by task_setrlimit, which has the task",
    r"socket_(sendmsg|accept|post_create|socketpair)": "covered by the cgroup programs and XDP of "
    "net.bpf.c for inet, by unix_* for unix, by socket_create for the rest; by socket_connect, "
    "_bind, _listen and file_receive for what others made",
    r"file_send_sigiotask|file_set_fowner": "covered by the pid namespace: owners are visible",
    r"netlink_send": "covered by socket_create, routes only, and capable: what changes the network "
    "needs CAP_NET_ADMIN",
    r"inode_copy_up(_xattr)?": "covered by file_open with write access, judged on top",
    # ---- not relevant: reads facts, changes nothing of others ----
    r"inode_(getattr|readlink|follow_link|getxattr|listxattr|get_acl|listsecurity|getsecurity"
    r"|getsecid|getsecctx)": "not relevant: facts about a file, not its content; hidden paths are "
    "not mounted",
    r"sb_(statfs|show_options)": "not relevant: numbers of a file system",
    r"task_(getpgid|getsid|getscheduler|getioprio|getsecid_obj)|current_getsecid_subj": "not "
    "relevant: reads scheduling facts, within the pid namespace",
    r"socket_(getsockname|getpeername|getsockopt|getpeersec_\w+)": "not relevant: reads what the "
    "owner of a socket may know",
    r"get(proc|self)attr": "not relevant: reads its own attributes of other LSMs",
    # ---- not relevant: confined to the agent ----
    r"file_(fcntl|lock)": "not relevant: on a descriptor that was judged",
    r"socket_(recvmsg|setsockopt|shutdown|sock_rcv_skb)": "not relevant: on a socket that was "
    "judged; options that matter need a capability",
    r"(msg_queue|msg_msg|sem|shm|ipc)_\w+": "not relevant: the agent has its own IPC namespace",
    r"task_(fix_set\w+|prctl)": "not relevant: no_new_privs, and capable for what matters",
    r"cap(get|set)": "not relevant: gives nothing that the bounding set lacks",
    r"set(proc|self)attr": "not relevant: attributes of other LSMs, for them to judge",
    r"vm_enough_memory|mmap_addr": "not relevant: the cgroup limits memory, the kernel address 0",
    r"bprm_committ(ing|ed)_creds": "not relevant: tells of what was decided",
    r"binder_\w+": "not relevant: needs /dev/binder, which the container has not",
    # ---- not relevant: bookkeeping ----
    r"(?!inode_init_security_anon)\w+_(alloc|free|clone|delete|init)_security\w*|\w+_free"
    r"|(cred|sk|sb|backing_file|bdev|file|inode|task)_(alloc|free)\w*": "not "
    "relevant: keeps the memory of other LSMs",
    r"cred_(getsecid|prepare|transfer)|d_instantiate|task_to_inode|dentry_\w+|sock_graft"
    r"|\w*secid\w*|\w*secctx\w*|\w*secmark\w*|ismaclabel|kernfs_init_security|inode_setintegrity"
    r"|bdev_setintegrity|inode_invalidate_secctx|sk_\w+|inet_\w+|req_classify_flow|xfrm_\w+|sctp_\w+"
    r"|mptcp_add_subflow|kernel_act_as|kernel_create_files_as|audit_rule_\w+|file_release"
    r"|inode_(need_)?killpriv|inode_xattr_skipcap|sb_delete|initramfs_populated|task_free": "not "
    "relevant: labels, integrity and life cycle, for LSMs that keep such",
}


TITLE = """# LSM hooks: what the kernel plane guards

Written by scripts/lsm_coverage.py from the BTF of the test VM's kernels; tests/vm checks it.
"""


def guarded() -> dict[str, str]:
    """Hook → area, from the sources."""
    found = {}
    for area in AREAS:
        text = (ROOT / "bpf" / f"lsm_{area}.bpf.c").read_text()
        for hook in re.findall(r'SEC\("\??lsm/(\w+)"\)', text):
            found[hook] = area
        for hook in re.findall(r"^REFUSED(?:_TELLING)?\((\w+),", text, re.MULTILINE):
            found[hook] = area
    return found


def words(hook: str) -> str | None:
    """Why a hook has no program, or None."""
    for pattern, text in EXPLAINED.items():
        if re.fullmatch(pattern, hook):
            return text.replace("{name}", hook.removeprefix("inode_"))
    return None


def check(hooks: set[str]) -> list[str]:
    """What is wrong about the words for ``hooks``."""
    ours = guarded()
    problems = [f"{hook}: no words" for hook in sorted(hooks - set(ours)) if words(hook) is None]
    problems += [f"{hook}: guarded, and has words" for hook in sorted(ours) if words(hook)]
    return problems


def facts() -> dict[str, Any]:
    """Hooks of the running kernel, and what the verifier had to do for each of our programs."""
    argv = ["bpftool", "-j", "btf", "dump", "file", "/sys/kernel/btf/vmlinux"]
    types = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)["types"]
    names = {t["name"] for t in types if t["kind"] == "FUNC"}
    hooks = {name.removeprefix("bpf_lsm_") for name in names if name.startswith("bpf_lsm_")}
    sys.path.insert(0, str(ROOT))
    from scripts import verifier

    verified, warnings = verifier.examine()
    return {"hooks": sorted(hooks - NOT_HOOKS), "verified": verified, "warnings": warnings}


def document(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole document; ``found`` are the facts by kernel line."""
    ours = guarded()
    lines = list(found)
    every = sorted({hook for one in found.values() for hook in one["hooks"]})
    classes = {"guarded": 0, "covered": 0, "not": 0}
    rows = []
    for hook in every:
        text = words(hook) or f"guarded: {AREAS[ours[hook]]}"
        classes[text.split()[0].rstrip(":")] += 1
        where = ["yes" if hook in found[line]["hooks"] else "–" for line in lines]
        work = [_cell(found[line]["verified"], hook) for line in lines]
        rows.append(f"| {hook} | {' | '.join(where)} | {text} | {' | '.join(work)} |")
    heads = " | ".join([*lines, "what we do", *(f"verified, {line}" for line in lines)])
    total = " and ".join(_total(line, found[line]["verified"].values()) for line in lines)
    words_ = textwrap.fill(
        f"{len(every)} hooks: {classes['guarded']} guarded, {classes['covered']} covered by "
        f"another mechanism, {classes['not']} not relevant. None is unexplained.",
        100,
    )
    verifier = textwrap.fill(
        '"Verified" is how many instructions the verifier walked to accept the program, its '
        f"measure of complexity, and how many states it kept: {total}. The limit for one program "
        "is 1,000,000 instructions. A test allows a quarter more than what is written here, and "
        "no warning of libbpf or the kernel.",
        100,
    )
    table = [f"| hook | {heads} |", f"|{'---|' * (2 * len(lines) + 2)}", *rows]
    return "\n".join([TITLE, words_, "", verifier, "", *table, ""])


def _cell(verified: Mapping[str, Sequence[int]], hook: str) -> str:
    return " / ".join(f"{count:,}" for count in verified.get(hook, ()))


def _total(line: str, work: Iterable[Sequence[int]]) -> str:
    instructions, states = zip(*work, strict=True)
    return (
        f"{sum(instructions):,} and {sum(states):,} on {line} "
        f"(most: {max(instructions):,} and {max(states):,})"
    )


def recorded(text: str, line: str) -> dict[str, list[int]]:
    """Hook → verified instructions and states on kernel ``line``, as the document says."""
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in text.splitlines()
        if row[:2] == "| "
    ]
    column = rows[0].index(f"verified, {line}")
    return {
        row[0]: [int(word.replace(",", "")) for word in row[column].split("/")]
        for row in rows[1:]
        if row[column] and row[0]
    }


def main() -> int:
    """The command line; see the module's first words."""
    if sys.argv[1:] == ["facts"]:
        print(MARK + json.dumps(facts()))
        return 0
    path = ROOT / "tests" / "vm" / "vm.py"
    spec = importlib.util.spec_from_file_location("mis_vm", path)
    assert spec and spec.loader
    vm = importlib.util.module_from_spec(spec)
    sys.modules["mis_vm"] = vm
    spec.loader.exec_module(vm)
    found = {}
    for line in vm.LINES:
        done = vm.run(line, f"{sys.executable} -I {Path(__file__).resolve()} facts")
        said = [text for text in done.console.splitlines() if MARK in text]
        if not said:
            print(done.console[-3000:], file=sys.stderr)
            return 1
        found[line] = json.loads(said[-1].partition(MARK)[2])
    problems = check({hook for one in found.values() for hook in one["hooks"]})
    for problem in problems:
        print(f"lsm_coverage: {problem}", file=sys.stderr)
    if not problems:
        DOCUMENT.write_text(document(found))
    return len(problems) > 0


if __name__ == "__main__":
    sys.exit(main())
