"""The base seccomp profile of every container: an allow-list, everything else EPERM.

Semantics follow moby's default profile (what ``docker run`` gives without privileges), written
as data.  Only the native architecture is listed, so 32-bit and x32 entry points are refused by
the filter itself.  Calls that the escape guard wants to see are left out here (``notify``).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from mis_run.hints import Any

ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}

ALLOWED = frozenset(
    """
    accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown
    clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat
    dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd
    eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir
    fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork
    fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait
    futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents
    getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid
    getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname
    getsockopt gettid gettimeofday getuid getxattr getxattrat inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup
    io_submit ioctl ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self lchown lgetxattr link linkat listen listxattr listxattrat llistxattr
    lremovexattr lseek lsetxattr lstat madvise map_shadow_stack membarrier memfd_create mincore
    mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify
    mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync
    munlock munlockall munmap nanosleep newfstatat open openat openat2 pause pidfd_open
    pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64
    preadv preadv2 process_mrelease pselect6 pwrite64 pwritev pwritev2 read readahead
    readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr
    removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity
    sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget
    semop semtimedop sendfile sendmmsg sendmsg sendto set_robust_list set_thread_area
    set_tid_address setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid
    setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr setxattrat shmat
    shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 socketpair splice stat statfs
    statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create
    timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
    timerfd_settime times tkill truncate umask uname unlink unlinkat uretprobe utime utimensat
    utimes vfork vmsplice wait4 waitid write writev
    """.split()
)

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, NETLINK_ROUTE = 1, 2, 10, 16, 0
CLONE_NEW_ANY = 0x7E020000  # CLONE_NEWNS|CGROUP|UTS|IPC|USER|PID|NET, linux/sched.h
ENOSYS = 38


def _argument(index: int, value: int, op: str, mask: int | None = None) -> dict[str, Any]:
    if mask is None:
        return {"index": index, "value": value, "op": f"SCMP_CMP_{op}"}
    return {"index": index, "value": mask, "valueTwo": value, "op": f"SCMP_CMP_{op}"}


def _allow(name: str, *arguments: dict[str, Any]) -> dict[str, Any]:
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": list(arguments)}


def conditional() -> list[dict[str, Any]]:
    """Calls allowed by their arguments: only registers are compared, never memory."""
    return [
        *(_allow("socket", _argument(0, family, "EQ")) for family in (AF_UNIX, AF_INET, AF_INET6)),
        _allow("socket", _argument(0, AF_NETLINK, "EQ"), _argument(2, NETLINK_ROUTE, "EQ")),
        _allow("clone", _argument(0, 0, "MASKED_EQ", CLONE_NEW_ANY)),
        # Its own limits only: prlimit(2) of another process asks for nothing but the same user, and
        # our init has it.
        _allow("prlimit64", _argument(0, 0, "EQ")),
        # What moby allows: PER_LINUX, PER_LINUX32, UNAME26, both, and asking.
        *(
            _allow("personality", _argument(0, value, "EQ"))
            for value in (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
        ),
        # clone3's flags lie in memory, so it cannot be judged: libc falls back to clone.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
    ]


def profile(
    notify: Sequence[dict[str, Any]] = (), *, left_out: Collection[str] = ()
) -> dict[str, Any]:
    """The OCI ``linux.seccomp`` object.

    ``notify`` are complete rules of the escape guard; calls in ``left_out`` are governed by those
    rules alone.
    """
    rules = [{"names": sorted(ALLOWED - set(left_out)), "action": "SCMP_ACT_ALLOW"}]
    rules += [rule for rule in conditional() if rule["names"][0] not in left_out]
    found: dict[str, Any] = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "syscalls": [*rules, *notify],
    }
    if architecture := ARCHITECTURES.get(os.uname().machine):
        found["architectures"] = [architecture]
    return found
