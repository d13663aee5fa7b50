"""Seccomp filters for tests: compiled by libseccomp as OCI runtimes do, interpreted, installed."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from mis_run.linux import abi, libc

ALLOW, NOTIFY, ERRNO, KILL = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
_OPERATORS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
PR_SET_NO_NEW_PRIVS = 38
Program = list[tuple[int, int, int, int]]


class _Compare(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_uint),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def library() -> ctypes.CDLL:
    """libseccomp, which runc and crun bring along; skips the test where it is missing."""
    try:
        found = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp.so.2 is not installed")
    found.seccomp_init.restype = ctypes.c_void_p
    return found


def compiled(rules: Sequence[dict[str, Any]], default: int = ERRNO | 1) -> Program:
    """``rules`` (OCI) as the BPF program that a runtime would install."""
    lib = library()
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(default)))
    for rule in rules:
        action = {"ALLOW": ALLOW, "NOTIFY": NOTIFY, "ERRNO": ERRNO}[rule["action"][9:]]
        action |= rule.get("errnoRet", 0)
        if action == default:
            continue  # as runc does: libseccomp refuses it
        args = rule.get("args", [])
        assert len({arg["index"] for arg in args}) == len(args), "runc would make them alternatives"
        array = (_Compare * max(1, len(args)))(
            *(
                _Compare(a["index"], _OPERATORS[a["op"][9:]], a["value"], a.get("valueTwo", 0))
                for a in args
            )
        )
        for name in rule["names"]:
            number = lib.seccomp_syscall_resolve_name(name.encode())
            if number == -1:  # __NR_SCMP_ERROR: newer than the library, left to the default
                continue
            result = lib.seccomp_rule_add_array(
                context, ctypes.c_uint32(action), number, len(args), array
            )
            assert result == 0, (name, args, os.strerror(-result))
    with tempfile.TemporaryFile() as file:
        assert lib.seccomp_export_bpf(context, file.fileno()) == 0
        file.seek(0)
        data = file.read()
    lib.seccomp_release(context)
    return list(struct.iter_unpack("=HBBI", data))


def interpret(program: Program, number: int, arch: int, args: Sequence[int]) -> int:
    """The action that ``program`` returns for one call: classic BPF as the kernel runs it."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *args)
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= value
        elif code == 0x05:  # BPF_JMP | BPF_JA
            at += value
        elif code == 0x06:  # BPF_RET | BPF_K
            return value
        else:
            compare = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }
            at += if_true if compare[code] else if_false


def install(program: Program) -> int:
    """Give the calling process ``program`` for good; returns its listener."""
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    fprog = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(fprog)
    call = ctypes.CDLL(None, use_errno=True).syscall
    found = call(abi.number("seccomp"), 1, 8, pointer)
    if found < 0:
        raise OSError(ctypes.get_errno(), "seccomp(SET_MODE_FILTER, NEW_LISTENER)")
    return int(found)


def attempt(name: str, *args: int) -> int:
    """Make one call; its errno, 0 for success."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    values = [ctypes.c_long(value) for value in (*args, *[0] * (6 - len(args)))]
    return ctypes.get_errno() if call(ctypes.c_long(abi.number(name)), *values) < 0 else 0


@contextmanager
def caged(
    program: Program, act: Callable[[socket.socket], object]
) -> Iterator[tuple[int, socket.socket, int]]:
    """A child under ``program`` running ``act(peer)``: (listener, other end of peer, pid).

    The child is killed and reaped on the way out; it cannot outlive the test.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            libc.prctl(libc.PR_SET_PDEATHSIG, 9)
            listener = install(program)
            socket.send_fds(theirs, [b"listener"], [listener])
            os.close(listener)
            theirs.recv(16)
            act(theirs)
            os._exit(0)
        finally:
            os._exit(1)
    theirs.close()
    listener = -1
    try:
        _, fds, _, _ = socket.recv_fds(ours, 64, 1)
        listener = fds[0]
        ours.send(b"go")
        yield listener, ours, pid
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        ours.close()
        if listener >= 0:
            os.close(listener)
