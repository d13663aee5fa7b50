"""Where something is missing: it starts, or says exactly what is missing and what to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness import MIS, MIS_RUN, mis
from leftovers import snapshot

pytestmark = pytest.mark.root
RUN = " ".join(MIS_RUN)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    folder = tmp_path / "workspace"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    return folder


def shell(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script in a shell of its own; mount and network changes stay in its namespaces."""
    return subprocess.run(
        ["sh", "-c", script], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


V1_ONLY = "umount /sys/fs/cgroup/unified"
V2_ONLY = "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"
NO_NFT = "mount --bind /dev/null $(command -v nft)"
READ_ONLY = "mount -o remount,bind,ro /sys/fs/cgroup/unified"

CASES = {
    "not root": (
        f"setpriv --reuid 65534 --regid 65534 --clear-groups {RUN} -- true",
        ("needs root", "sudo ./mis-run"),
    ),
    "no runtime": (f"MIS_RUNTIME=/nonexistent {RUN} -- true", ("OCI runtime", "install runc")),
    "no nftables": (
        f"unshare -m sh -c '{NO_NFT}; {RUN} --allow-net 198.51.100.1:1 -- true'",
        ("nft", "--net none"),
    ),
    "read-only cgroups": (
        f"unshare -m sh -c '{READ_ONLY}; {RUN} -- true'",
        ("read-only", "--privileged"),
    ),
    "cgroup v1 only": (f"unshare -m sh -c '{V1_ONLY}; {RUN} -- true'", ("cgroup2", "mount -t")),
    "no controllers in v2": (
        f"unshare -m sh -c '{V2_ONLY}; {RUN} -- true'",
        ("no memory controller", "--allow-missing limits"),
    ),
    "no CAP_SYS_ADMIN": (
        f"setpriv --bounding-set -sys_admin --inh-caps -sys_admin {RUN} -- true",
        ("network namespace", "CAP_SYS_ADMIN"),
    ),
    "no capabilities": (
        f"setpriv --bounding-set -all --inh-caps -all {RUN} -- true",
        ("Permission denied", "hint:"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_with_the_reason_and_the_next_step(name: str, workspace: Path) -> None:
    """Exit code 120, one message with the missing thing, one hint, and nothing was made."""
    before = snapshot()
    script, words = CASES[name]
    done = shell(script, workspace)
    assert done.returncode == 120, (done.returncode, done.stderr)
    assert done.stderr.startswith("mis-run: ")
    for word in words:
        assert word in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot() == before


WORKS = {
    "no nftables, no destination": f"unshare -m sh -c '{NO_NFT}; {RUN} -- echo here'",
    "no nftables, no network": f"unshare -m sh -c '{NO_NFT}; {RUN} --net none -- echo here'",
    "limits waived": (f"unshare -m sh -c '{V2_ONLY}; {RUN} --allow-missing limits -- echo here'"),
    "IPv6 off": (
        "unshare -n sh -c 'echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; "
        "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6; "
        f"{RUN} --allow-net [2001:db8::1]:80 -- echo here'"
    ),
    "standard input and output closed": f"{RUN} -- true <&- >&-; echo here",
}


@pytest.mark.parametrize("name", WORKS)
def test_works_without(name: str, workspace: Path) -> None:
    """Where the missing part is not needed, or was waived by name, the agent runs."""
    before = snapshot()
    done = shell(WORKS[name], workspace)
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr
    assert snapshot() == before


def test_doctor_tries_everything() -> None:
    """mis doctor says of each mechanism whether it works, and why not; exit code 0 as root here."""
    done = mis("doctor")
    assert done.returncode == 0, done.stdout
    for mechanism in ("runtime", "cgroup-v2", "cgroup-bpf", "xdp", "nftables", "seccomp-notify"):
        assert f"works    {mechanism}" in done.stdout, done.stdout


def test_doctor_as_nobody(workspace: Path) -> None:
    """Without root it still tells, with exit code 120 and no traceback."""
    words = " ".join(f"'{word}'" for word in MIS)
    script = f"setpriv --reuid 65534 --regid 65534 --clear-groups {words} doctor --json"
    done = shell(script, workspace)
    assert done.returncode == 120, done.stderr
    assert '"root"' in done.stdout
