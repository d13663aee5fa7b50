"""Boot a stock Debian kernel under QEMU and run one command in it, with this machine's files.

What the development machine's own kernel refuses (BPF LSM) or does not have (cgroup v1 only, v2
only) is tested there. Kernels come from the machine's own apt sources, newest of each line, into
``.cache/vm``; virtme-ng shares the root file system read-only, so the checkout and its virtual
environment are at the same paths in the guest. No KVM: emulation is slow but works anywhere.

    python tests/vm/vm.py shell 6.12            a root shell in it
    python tests/vm/vm.py run 6.1 -- uname -a   one command
    python tests/vm/vm.py run 6.12 --count -- COMMAND   a nanosecond of its clock is an instruction
    python tests/vm/vm.py fetch                 only get the kernels

Out of scope: which tests run and how they are reported (conftest.py), other machines than
Debian's amd64 and arm64.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "vm"
LINES = ("6.1", "6.12")
"""Kernel lines: 6.1 is the oldest with the BPF LSM hooks we use, 6.12 the newest long-term one."""
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, "")
QEMU = {"amd64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64"}.get(ARCH, "qemu-system-x86")
LSM = "lsm=landlock,lockdown,yama,bpf"  # Debian compiles BPF LSM in; the list switches it on
OPTIONS_9P = "ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose"
# One thread for all CPUs.  The kernel changes its own code while it runs (static keys: the first
# memory cgroup, a cpuset) by way of a breakpoint, and no CPU may meet that later
# (text_poke_bp_batch, arch/x86/kernel/alternative.c).  QEMU 7.2 with a thread for each may still
# run what it translated in between: "Oops: int3" in the page allocator, seen in two of three runs.
ACCELERATOR = "-accel tcg,thread=single"
# One CPU, whose clock goes on by a nanosecond with each instruction: times are instruction counts,
# and the same however busy this machine is.
COUNTING = f"{ACCELERATOR} -icount shift=0,sleep=off"
# Never needed in a virtual machine without devices, and three quarters of the size.
UNWANTED = ("sound", *(f"drivers/{name}" for name in (
    "ata", "gpu", "hid", "iio", "infiniband", "input", "isdn", "media", "mtd", "net/ethernet",
    "net/wireless", "scsi", "staging", "usb",
)))  # fmt: skip


class VmError(Exception):
    """The virtual machine cannot be had or did not do what it was asked."""


@dataclass(frozen=True)
class Done:
    """A finished guest: its command's exit code (None: it never said) and its whole console."""

    code: int | None
    console: str


def missing() -> str:
    """Why there can be no virtual machine here, or an empty string."""
    if not ARCH:
        return f"no Debian kernels for {os.uname().machine}"
    for tool, package in (
        (QEMU, "qemu-system-x86 or qemu-system-arm"),
        ("depmod", "kmod"),
        ("dpkg-deb", "dpkg"),
        ("apt-get", "apt"),
        ("unshare", "util-linux"),
    ):
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} is missing (package {package})"
    if shutil.which("vng", path=_path()) is None:
        return "virtme-ng is missing (pip install virtme-ng)"
    return ""


def kernel(line: str) -> Path:
    """The boot image of the newest kernel of ``line``, fetched when it is not cached.

    Without a reachable mirror the newest cached one of the line is used. Raises VmError when
    there is none either.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{line}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cached = sorted(CACHE.glob(f"{line}/*/boot/vmlinuz-*"), key=lambda path: _key(path.name))
        newest = _newest(line)
        if not newest and not cached and os.geteuid() == 0:  # no lists yet
            subprocess.run(["apt-get", "-qq", "update"], capture_output=True, check=False)
            newest = _newest(line)
        if newest and cached and cached[-1].name == f"vmlinuz-{newest}":
            return cached[-1]
        try:
            if not newest:
                raise VmError(f"apt offers no linux-image-{line}.*-{ARCH}; apt-get update?")
            image = _fetch(line, newest)
        except VmError as error:
            if not cached:
                raise
            print(f"vm: using the cached {cached[-1].name}: {error}", file=sys.stderr)
            return cached[-1]
        for old in cached:
            if old != image:
                shutil.rmtree(old.parents[1])
        return image


def run(
    line: str,
    command: str,
    *,
    share: Path | None = None,
    timeout: float = 240,
    cgroups: str = "v2",
    memory: str = "2G",
    interactive: bool = False,
    count: bool = False,
) -> Done:
    """Boot ``line``, run ``command`` in its shell as root, wait at most ``timeout`` seconds.

    ``share`` is a directory that the guest may write, at the same path; the rest of this
    machine's files are read-only there, or a throw-away layer (/tmp, /etc, /usr, /var …).
    ``cgroups``: which kind of host the guest is, see layout.py; ``count``: see COUNTING.
    All processes of the virtual machine end with this call, and with the calling thread however
    that dies.
    """
    image = kernel(line)
    with tempfile.TemporaryDirectory(prefix="mis-vm-") as folder:
        told = Path(folder, "code")
        python = shlex.quote(str(ROOT / ".venv" / "bin" / "python"))
        layout = Path(__file__).with_name("layout.py")
        script = Path(folder, "run.sh")
        here = shlex.quote(str(ROOT))
        script.write_text(
            f"PATH={_path()}\nexport PATH MIS_VM={line}\n"
            # A second way to the checkout: virtme-ng's own does not cache, and imports crawl.
            f"mount -t 9p -o {OPTIONS_9P} checkout {here}\n"
            f"ip link set lo up\ncd {here}\n"
            f"{python} -I {layout} {cgroups} && {{ {command}\n}}\n"
            f"echo $? >{told}\n"
        )
        argv = [
            *("vng", "--run", str(image), "--disable-kvm", "--user", "root"),
            *("--cpus", "1" if count else "2"),
            "--force-9p",  # what Debian 12 has as virtiofsd is not the one that virtme-ng can use
            *("--memory", memory, "--rwdir", folder, "--append", f"{LSM} panic=-1"),
            *(("--rwdir", str(share)) if share else ()),
            *(() if interactive else ("--verbose",)),  # without it the console is lost
            f"--qemu-opts={COUNTING if count else ACCELERATOR} "
            f"-fsdev local,id=checkout,path={ROOT},security_model=none,"
            "readonly=on,multidevs=remap -device virtio-9p-pci,fsdev=checkout,mount_tag=checkout",
            *("--", f"sh {script}"),
        ]
        with _process(argv, interactive) as process:
            try:
                console, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                console, _ = process.communicate()
                console = (console or b"") + f"\nvm: ended after {timeout:.0f} s".encode()
        text = (console or b"").decode(errors="replace")
        return Done(int(told.read_text()) if told.exists() else None, text)


@contextmanager
def _process(argv: list[str], interactive: bool) -> Iterator[subprocess.Popen[bytes]]:
    """``argv`` in a pid namespace of its own: when its first process ends, QEMU does too.

    setpriv makes that first process die with us (PR_SET_PDEATHSIG), even by SIGKILL.
    """
    namespace = ["unshare", "--fork", "--kill-child=KILL", "--pid"]
    if os.geteuid() != 0:
        namespace += ["--user", "--map-root-user"]
    pipe = None if interactive else subprocess.PIPE
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *namespace, *argv],
        stdin=None if interactive else subprocess.DEVNULL,
        stdout=pipe,
        stderr=subprocess.STDOUT if pipe else None,
        env={**os.environ, "PATH": _path()},
        start_new_session=not interactive,
    )
    try:
        yield process
    finally:
        if not interactive:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _path() -> str:
    """PATH with our virtual environment's tools and the administrator's."""
    mine = f"{Path(sys.executable).parent}:{ROOT / '.venv' / 'bin'}"
    return f"{mine}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _newest(line: str) -> str:
    """Release of the newest kernel that apt knows of ``line``, such as ``6.1.0-40-amd64``."""
    pattern = rf"linux-image-({re.escape(line)}\.[0-9][0-9.+~deb-]*-{ARCH}) "
    found = subprocess.run(
        ["apt-cache", "search", "--names-only", rf"^linux-image-{re.escape(line)}\..*-{ARCH}$"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    return max(re.findall(f"^{pattern}", found, re.MULTILINE), key=_key, default="")


def _key(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def _fetch(line: str, release: str) -> Path:
    """Download, unpack and index one kernel. Raises VmError."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="part-") as folder:
        package = f"linux-image-{release}"
        command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
        got = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if got.returncode and os.geteuid() == 0:  # a stale list names files that are gone
            subprocess.run(["apt-get", "-qq", "update"], capture_output=True, check=False)
            got = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        debs = list(Path(folder).glob("*.deb"))
        if got.returncode or not debs:
            raise VmError(f"cannot download {package}: {got.stderr.strip()[-300:]}")
        tree = Path(folder, "tree")
        tree.mkdir()
        excluded = [f"--exclude=./lib/modules/*/kernel/{name}" for name in UNWANTED]
        unpack = shlex.join(["dpkg-deb", "--fsys-tarfile", str(debs[0])])
        into = shlex.join(["tar", "-x", "-C", str(tree), *excluded, "./boot", "./lib"])
        for step in (f"{unpack} | {into}", shlex.join(["depmod", "-b", str(tree), release])):
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", step],
                env={**os.environ, "PATH": _path()},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise VmError(f"{step}: {done.stderr.strip()[-300:]}")
        target = CACHE / line / release
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        tree.rename(target)
        return target / "boot" / f"vmlinuz-{release}"


def main() -> int:
    """The command line; see the module's first words."""
    words = argparse.ArgumentParser(description="Debian kernels in QEMU, with this machine's files")
    words.add_argument("what", choices=("shell", "run", "fetch"))
    words.add_argument("line", nargs="?", default=LINES[-1], choices=LINES)
    words.add_argument("--cgroups", default="v2", choices=("v1", "v2", "hybrid"))
    words.add_argument("--memory", default="2G")
    words.add_argument("--count", action="store_true")
    before, after = sys.argv[1:], []
    if "--" in before:  # argparse does not take "--" behind optional words
        before, after = before[: before.index("--")], before[before.index("--") + 1 :]
    given = words.parse_args(before)
    if reason := missing():
        print(f"vm: {reason}", file=sys.stderr)
        return 120
    try:
        if given.what == "fetch":
            for line in LINES:
                print(kernel(line))
            return 0
        shell = given.what == "shell"
        command = "bash -i" if shell else shlex.join(after or ["true"])
        done = run(
            given.line, command, cgroups=given.cgroups, memory=given.memory,
            interactive=shell, timeout=86400 if shell else 1200, count=given.count,
        )  # fmt: skip
    except VmError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 121
    print(done.console, end="")
    return 125 if done.code is None else done.code


if __name__ == "__main__":
    sys.exit(main())
