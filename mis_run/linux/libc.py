"""The few libc calls Python does not have: namespaces, mounts, prctl. One table, one errcheck.

Prototypes are set once, here; an error is an OSError whose message shows the call.
"""

from __future__ import annotations

import ctypes
import os

from mis_run.hints import Any

# Numbers from linux/sched.h, linux/mount.h and linux/prctl.h: part of the kernel's stable ABI.
CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _errcheck(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result < 0:
        number = ctypes.get_errno()
        shown = ", ".join(repr(argument) for argument in arguments)
        raise OSError(number, f"{function.__name__}({shown}): {os.strerror(number)}")
    return result


def function(name: str, *argtypes: Any) -> Any:
    """libc's function with its prototype, raising OSError where it returns a negative number."""
    # Not getattr: that is one object for everybody, with the prototypes of whoever came last.
    function: Any = _libc[name]
    function.argtypes = argtypes
    function.restype = ctypes.c_int
    function.errcheck = _errcheck
    return function


_text = ctypes.c_char_p
_unshare = function("unshare", ctypes.c_int)
_setns = function("setns", ctypes.c_int, ctypes.c_int)
_mount = function("mount", _text, _text, _text, ctypes.c_ulong, _text)
_umount2 = function("umount2", _text, ctypes.c_int)
_prctl = function("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)


_syscall = function("syscall", *[ctypes.c_long] * 4)
_syscall.restype = ctypes.c_long
_LANDLOCK_CREATE_RULESET, _LANDLOCK_VERSION = 444, 1
_BPF = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine, 321)


def unshare(flags: int) -> None:
    """unshare(2): move the calling thread into new namespaces."""
    _unshare(flags)


def setns(fd: int, kind: int = 0) -> None:
    """setns(2): move the calling thread into the namespace behind ``fd``."""
    _setns(fd, kind)


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2); empty strings are passed as they are, which the kernel ignores where unused."""
    _mount(source.encode(), os.fsencode(target), kind.encode(), flags, os.fsencode(data))


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _umount2(os.fsencode(target), flags)


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _prctl(option, value, 0, 0, 0)


def syscall(number: int, *arguments: Any) -> int:
    """syscall(2) with at least three arguments; those beyond must be ctypes' own."""
    return int(_syscall(number, *arguments))


def landlock_version() -> int:
    """The version of Landlock's ABI (landlock_create_ruleset(2)). Raises OSError without it."""
    return int(_syscall(_LANDLOCK_CREATE_RULESET, 0, 0, _LANDLOCK_VERSION))


def bpf(command: int, attributes: bytes) -> int:
    """bpf(2) with a packed ``union bpf_attr``; returns its result (often a descriptor)."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return int(_syscall(_BPF, command, ctypes.addressof(buffer), len(attributes)))
