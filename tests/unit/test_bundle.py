"""Plan → OCI configuration, the seccomp profile, and what is hidden: all without root."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run import bundle, masks, rootfs, seccomp
from mis_run.box import _parse
from mis_run.dataclass import replace
from mis_run.linux import abi
from mis_run.model import Bind, Host, Limits, NetMode, NetPlan, Plan, Profile, User
from mis_run.runtime import _hint, _words

HOST = Host(mechanisms={}, cgroup="hybrid", unified=None, controllers={}, runtime=None)
PLAN = Plan(
    name=None,
    command=("agent", "--flag"),
    cwd=Path("/home/u/project"),
    env=(("PATH", "/usr/bin"), ("EMPTY", "")),
    user=User(1000, 1000, (), "u", "/home/u"),
    tty=False,
    rootfs=None,
    binds=(),
    masked=(),
    protected=(),
    mechanisms=(),
    profile=Profile(name="test"),
    network=NetPlan(
        mode=NetMode.NONE, ipv6=False, allow=(), listen=(), resolvers=(), host_addresses=()
    ),
    limits=Limits(),
    host=HOST,
)
INSIDE = bundle.Inside(
    root=Path("/run/mis/0/root"),
    netns="/proc/1/fd/9",
    cgroups_path="/mis/0/agent",
    shim=Path("/x/mis-init"),
    info=Path("/run/mis/0/info"),
    seccomp=seccomp.profile(),
)


def targets(plan: Plan = PLAN, inside: bundle.Inside = INSIDE) -> list[str]:
    return [mount["destination"] for mount in bundle.mounts(plan, inside)]


def mount_of(target: str, plan: Plan = PLAN, inside: bundle.Inside = INSIDE) -> dict[str, Any]:
    return next(m for m in bundle.mounts(plan, inside) if m["destination"] == target)


# ---- the configuration ----------------------------------------------------------------------


def test_the_agent_is_executed_by_the_shim() -> None:
    """The shim is process 1, told its descriptor, and the command follows untouched."""
    process = bundle.config(PLAN, INSIDE)["process"]
    assert process["args"] == ["/run/mis/init", "3", "--", "agent", "--flag"]
    assert process["env"] == ["PATH=/usr/bin", "EMPTY="]
    assert process["cwd"] == "/home/u/project"


def test_a_user_has_no_capabilities_and_root_a_few() -> None:
    """Every capability set is empty for a user; root gets the six, never ambient ones."""
    user = bundle.config(PLAN, INSIDE)["process"]
    assert user["noNewPrivileges"] is True
    assert set(map(tuple, user["capabilities"].values())) == {()}
    as_root = replace(PLAN, user=User(0, 0, (), "root", "/root"))
    root = bundle.config(as_root, INSIDE)["process"]["capabilities"]
    assert set(root) == {"bounding", "effective", "permitted"}
    assert set(map(tuple, root.values())) == {bundle.ROOT_CAPABILITIES}


@pytest.mark.parametrize(
    ("netns", "expected"),
    [(None, []), ("", [{"type": "network"}]), ("/x", [{"type": "network", "path": "/x"}])],
)
def test_namespaces(netns: str | None, expected: list[dict[str, str]]) -> None:
    """Five namespaces are always new; the network's is the host's, new, or given."""
    found = bundle.config(PLAN, replace(INSIDE, netns=netns))["linux"]["namespaces"]
    assert [entry["type"] for entry in found[:5]] == ["pid", "ipc", "uts", "mount", "cgroup"]
    assert found[5:] == expected


def test_descriptor_limit_is_never_above_ours() -> None:
    """Raising a hard limit takes CAP_SYS_RESOURCE, so ours is the most the agent gets."""
    for ours, hard, soft in ((1 << 20, bundle.FILES, 4096), (1024, 1024, 1024)):
        limits = bundle.config(PLAN, replace(INSIDE, files=ours))["process"]["rlimits"]
        assert {"type": "RLIMIT_NOFILE", "hard": hard, "soft": soft} in limits
        assert {"type": "RLIMIT_CORE", "hard": 0, "soft": 0} in limits


def test_listener_path_is_set_only_when_given() -> None:
    """The runtime refuses a listenerPath without notify rules, so none appears by itself."""
    assert "listenerPath" not in bundle.config(PLAN, INSIDE)["linux"]["seccomp"]
    inside = replace(INSIDE, listener=Path("/run/mis/0/notify.sock"))
    assert bundle.config(PLAN, inside)["linux"]["seccomp"]["listenerPath"].endswith("notify.sock")
    assert "listenerPath" not in INSIDE.seccomp


def test_configuration_is_json() -> None:
    """The whole configuration can be written as config.json."""
    config = bundle.config(PLAN, INSIDE)
    assert json.loads(json.dumps(config)) == config


# ---- mounts ---------------------------------------------------------------------------------


def test_outer_mounts_come_first() -> None:
    """A bind inside another is mounted after it, in whatever order they were written."""
    binds = (Bind(Path("/a"), Path("/srv/x/y")), Bind(Path("/b"), Path("/srv")))
    inside = replace(INSIDE, hidden={"/home/u/project/.env": False})
    order = targets(replace(PLAN, binds=binds), inside)
    for outer, inner in (
        ("/srv", "/srv/x/y"),
        ("/home/u/project", "/home/u/project/.env"),
        (bundle.INFO, bundle.SHIM),
    ):
        assert order.index(outer) < order.index(inner)


def test_no_mount_keeps_devices_or_setuid() -> None:
    """Everything that is bound in is nosuid and nodev; /dev alone may hold devices."""
    inside = replace(INSIDE, hidden={"/home/u/project/k": True})
    for mount in bundle.mounts(replace(PLAN, protected=("/home/u/project/x",)), inside):
        assert "nosuid" in mount["options"]
        assert "nodev" in mount["options"] or mount["destination"] in ("/dev", "/dev/pts")


def test_read_only_places() -> None:
    """The shim, its folder, /sys and read-only binds cannot be written."""
    plan = replace(PLAN, binds=(Bind(Path("/a"), Path("/srv"), readonly=True),))
    for target in ("/srv", "/sys", bundle.INFO, bundle.SHIM):
        assert "ro" in mount_of(target, plan)["options"], target
    assert "rw" in mount_of("/home/u/project", plan)["options"]


def test_folders_above_a_protected_path_are_pinned() -> None:
    """Each folder between the bind and the path is a mount, so none can be renamed away."""
    inside = replace(INSIDE, protected=["/home/u/project/a/b/c", "/home/u/project/top"])
    order = targets(PLAN, inside)
    start = order.index("/home/u/project")
    assert order[start + 1 : start + 5] == [
        "/home/u/project/a",
        "/home/u/project/top",
        "/home/u/project/a/b",
        "/home/u/project/a/b/c",
    ]
    assert "rw" in mount_of("/home/u/project/a/b", PLAN, inside)["options"]
    assert "ro" in mount_of("/home/u/project/a/b/c", PLAN, inside)["options"]


def test_a_protected_folder_above_another_stays_read_only() -> None:
    """Pinning for the inner path never makes the outer protected one writable."""
    inside = replace(INSIDE, protected=["/home/u/project/.git/hooks", "/home/u/project/.git"])
    modes = dict(bundle._pinned(PLAN, inside.protected))
    assert modes == {"/home/u/project/.git": "ro", "/home/u/project/.git/hooks": "ro"}


def test_own_limits_are_shown_on_cgroup_v2_only() -> None:
    """The cgroup file system is there, read-only, where it is one mount."""
    assert "/sys/fs/cgroup" not in targets()
    v2 = replace(PLAN, host=replace(HOST, cgroup="v2"))
    assert "ro" in mount_of("/sys/fs/cgroup", v2)["options"]


# ---- limits ---------------------------------------------------------------------------------


def test_limits() -> None:
    """Bytes, cores and counts become what the specification calls them."""
    limits = Limits(memory=100, swap=50, cpus=1.5, pids=10, io_read=7)
    found = bundle.resources(limits, swap=True, device="8:16")
    assert found["memory"] == {"limit": 100, "swap": 150}
    assert found["cpu"] == {"quota": 150_000, "period": 100_000}
    assert found["pids"] == {"limit": 11}  # and the shim
    assert found["blockIO"] == {"throttleReadBpsDevice": [{"major": 8, "minor": 16, "rate": 7}]}


def test_limits_that_are_not_set_are_absent() -> None:
    """None means no limit of ours; swap is left alone where the kernel does not count it."""
    assert set(bundle.resources(Limits(), swap=True)) == {"devices"}
    assert "swap" not in bundle.resources(Limits(memory=1), swap=False)["memory"]
    assert "swap" not in bundle.resources(Limits(memory=1, swap=None), swap=True)["memory"]
    assert bundle.resources(Limits(cpus=0.0001), swap=True)["cpu"]["quota"] == bundle.SHORTEST


# ---- seccomp --------------------------------------------------------------------------------


def test_allowed_calls_exist() -> None:
    """A misspelt name would be dropped by the runtime in silence."""
    known = set(abi.numbers("x86_64")) | set(abi.numbers("aarch64"))
    later = {"uretprobe", "futex_wake", "futex_wait", "futex_requeue"}
    assert seccomp.ALLOWED - known <= later


def test_dangerous_calls_are_not_allowed() -> None:
    """What makes mounts, namespaces, kernel objects or looks into others is in no allow rule."""
    names = {name for rule in seccomp.profile()["syscalls"] for name in rule["names"]}
    dangerous = """mount umount2 move_mount open_tree fsopen fsmount fsconfig fspick mount_setattr
    pivot_root chroot unshare setns ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd bpf
    perf_event_open userfaultfd add_key request_key keyctl init_module finit_module delete_module
    kexec_load kexec_file_load io_uring_setup io_uring_enter io_uring_register swapon swapoff reboot
    syslog quotactl name_to_handle_at open_by_handle_at fanotify_init iopl ioperm modify_ldt
    settimeofday clock_settime sethostname setdomainname acct vhangup nfsservctl process_madvise
    memfd_secret move_pages mbind lookup_dcookie"""
    assert not names & set(dangerous.split())


def test_everything_else_is_eperm() -> None:
    """The default action refuses; only clone3 says ENOSYS, so that libc falls back to clone."""
    found = seccomp.profile()
    assert (found["defaultAction"], found["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 1)
    others = [rule for rule in found["syscalls"] if rule["action"] != "SCMP_ACT_ALLOW"]
    assert others == [{"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]


def test_notify_rules_replace_what_is_left_out() -> None:
    """A call that the escape guard governs has the guard's rule and no other."""
    rule = {"names": ["clone", "mount"], "action": "SCMP_ACT_NOTIFY"}
    rules = seccomp.profile([rule], left_out=("clone", "mount", "personality"))["syscalls"]
    assert [r for r in rules if "clone" in r["names"]] == [rule]
    assert not [r for r in rules if "personality" in r["names"]]


# ---- what is hidden -------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "home" / "u" / ".ssh").mkdir(parents=True)
    (root / "home" / "u" / ".ssh" / "id").touch()
    (root / "etc").mkdir()
    (root / "etc" / "shadow").touch()
    (root / "etc" / "shadow-").touch()
    (root / "var").mkdir()
    (root / "run").mkdir()
    (root / "var" / "run").symlink_to("/run")
    (root / "out").symlink_to("../../../../../../../../etc")
    (root / "circle").symlink_to("circle")
    return root


def test_patterns_find_what_exists(tree: Path) -> None:
    """Globs match within a component, dot files too; what is missing is no error."""
    found = masks.find_all(str(tree), ("/etc/shadow*", "/home/*/.s*/**", "/no/such", "/circle/x"))
    assert found == {"/etc/shadow": False, "/etc/shadow-": False, "/home/u/.ssh": True}


def test_links_never_lead_out_of_the_root(tree: Path) -> None:
    """A link is followed as if the root were /, however many .. it has."""
    assert masks.resolve(str(tree), "/out/shadow") == "/etc/shadow"
    assert masks.find_all(str(tree), ("/out/passwd", "/out/shadow")) == {"/etc/shadow": False}
    assert masks.resolve(str(tree), "/var/run/x") == "/run/x"
    with pytest.raises(OSError, match="symbolic links"):
        masks.resolve(str(tree), "/circle")


def test_what_lies_in_a_hidden_folder_is_not_named_again(tree: Path) -> None:
    """One entry covers a folder and everything in it."""
    assert masks.find_all(str(tree), ("/home/u/.ssh/id", "/home")) == {"/home": True}


@pytest.mark.parametrize("pattern", ["**/.git/hooks", "relative", "/a/**/b", "/", "/**", ""])
def test_patterns_that_cannot_be_masked(pattern: str, tree: Path) -> None:
    """Patterns of the file guard alone, and the root itself, hide nothing."""
    assert masks.find_all(str(tree), (pattern,)) == {}


def test_masks_inside_a_bind(tree: Path) -> None:
    """A pattern is looked up where the bind comes from, and named where it goes to."""
    found = masks.inside(str(tree / "home" / "u"), "/w/x", ("/w/*/.ssh", "/etc/shadow"))
    assert found == {"/w/x/.ssh": True}
    assert masks.inside(str(tree), "/w", ("/w", "/w/**", "/")) == {}


@given(st.text(alphabet="ab/*.[]?", max_size=20))
def test_no_pattern_breaks_the_search(pattern: str) -> None:
    """Any pattern gives paths inside the root or nothing."""
    for path in masks.find_all("/proc/self/task", (pattern,)):
        assert path.startswith("/")
        assert path != "/"


def test_separate_file_systems() -> None:
    """Programs' trees are shown, homes, boot and what engines mount below /var are not."""
    mounts = (
        *(("/", "ext4"), ("/usr", "xfs"), ("/usr", "xfs"), ("/opt/x", "ext4"), ("/home", "ext4")),
        *(("/var", "ext4"), ("/var/lib/docker/overlay2/x/merged", "overlay"), ("/boot", "ext4")),
        *(("/usr/lib/modules", "tmpfs"), ("/usrlocal", "ext4")),
    )
    assert rootfs.separate(replace(HOST, mounts=mounts)) == ["/usr", "/opt/x", "/var"]


def test_hidden_and_protected_paths_of_a_plan(tree: Path) -> None:
    """Only what exists, inside a bind; a bind that was named itself is never hidden."""
    work = tree / "home" / "u"
    (work / "link").symlink_to("/etc")
    plan = replace(
        PLAN,
        cwd=work,
        binds=(Bind(tree / "etc", Path("/srv")), Bind(tree / "etc", work / ".ssh")),
        masked=(f"{work}/.ssh", "/srv/shadow", "/etc/shadow"),
        protected=(f"{work}/.ssh", f"{work}/link", f"{work}/missing", "/elsewhere", str(work)),
    )
    assert rootfs.hidden(plan) == {"/srv/shadow": False}
    assert rootfs.protected(plan) == [f"{work}/.ssh"]


def test_nothing_is_made_below_another_bind(tree: Path) -> None:
    """A denied file that another bind covers is not there to be covered: the runtime would make an
    empty file for the mount, on the host."""
    work = tree / "home" / "u"
    inner = work / ".ssh"
    file = next(path for path in sorted(inner.iterdir()) if path.is_file())
    plan = replace(PLAN, cwd=work, masked=(str(file),))
    assert rootfs.hidden(plan) == {str(file): False}
    assert rootfs.hidden(replace(plan, binds=(Bind(tree / "etc", inner),))) == {}


@pytest.mark.parametrize("home", ["/", "", "/usr/sbin", "/nonexistent", "/bin/", "relative"])
def test_no_home_is_laid_over_the_system(home: str) -> None:
    """System users have /usr/sbin or / as their home; that must not become empty."""
    assert not rootfs.has_home(User(1, 1, (), "daemon", home))
    assert rootfs.has_home(User(1, 1, (), "u", "/home/u"))


def test_files_of_etc() -> None:
    """The agent's own resolv.conf, hosts and hostname."""
    files = rootfs.etc_files(["127.0.0.1"], {"model": "198.18.0.2"})
    assert files["resolv.conf"] == "nameserver 127.0.0.1\n"
    assert "198.18.0.2\tmodel\n" in files["hosts"]
    assert "127.0.0.1\tlocalhost\n" in files["hosts"]


# ---- what the shim and the runtime say ------------------------------------------------------


@given(st.binary(max_size=64))
def test_any_report_parses(data: bytes) -> None:
    """Malformed bytes are a word and a number, never an exception."""
    word, value = _parse(data)
    assert isinstance(word, str)
    assert value >= 0


def test_reports() -> None:
    """The number is the second field, whatever follows."""
    assert _parse(b"exit 3") == ("exit", 3)
    assert _parse(b"failed 2 exec") == ("failed", 2)
    assert _parse(b"") == ("", 0)


def test_words_of_the_runtime(tmp_path: Path) -> None:
    """The last error of the log is told, with what to do; a damaged log is no second error."""
    log = tmp_path / "log"
    log.write_text(
        '{"level":"warning","msg":"w"}\nnot json\n{"level":"error","msg":"mkdir /x: denied"}\n[1]\n'
    )
    assert _words(log) == "mkdir /x: denied"
    assert "bind" in _hint(_words(log))
    assert _words(tmp_path / "missing") == "no reason given"
