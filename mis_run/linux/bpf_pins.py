"""BPF objects that outlive us: programs attached to LSM hooks, links and maps pinned in a bpffs.

Builds on `libbpf`, which has the loading of objects that live and die with one run.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ctypes import (
    addressof,
    byref,
    c_bool,
    c_char_p,
    c_int,
    c_uint32,
    c_void_p,
    create_string_buffer,
)
from functools import cache
from pathlib import Path

from mis_run.errors import SetupError
from mis_run.linux import libbpf, libc, mountinfo

RINGBUF = 27  # enum bpf_map_type
BATCH = 4096  # entries read by one call
_KIND_FUNC = 12  # BTF_KIND_FUNC
_LSM, _LSM_MAC = 29, 27  # BPF_PROG_TYPE_LSM, BPF_LSM_MAC


class _Functions:
    """What `libbpf` does not need of the library; prototypes once, its errcheck."""

    def __init__(self) -> None:
        lib = libbpf._bpf()
        self.next_map = lib._function(
            "bpf_object__next_map", c_void_p, (c_void_p, c_void_p), lambda _: False
        )
        self.next_program = lib._function(
            "bpf_object__next_program", c_void_p, (c_void_p, c_void_p), lambda _: False
        )
        self.map_name = _text("bpf_map__name", lib)
        self.program_name = _text("bpf_program__name", lib)
        self.section = _text("bpf_program__section_name", lib)
        self.pin_at = lib._number("bpf_map__set_pin_path", c_void_p, c_char_p)
        self.set_autoload = lib._number("bpf_program__set_autoload", c_void_p, c_bool)
        self.autoload = lib._function("bpf_program__autoload", c_bool, (c_void_p,), lambda _: False)
        self.program_fd = lib._number("bpf_program__fd", c_void_p)
        self.attach = lib._pointer("bpf_program__attach_lsm", c_void_p)
        self.pin_link = lib._number("bpf_link__pin", c_void_p, c_char_p)
        self.destroy_link = lib._number("bpf_link__destroy", c_void_p)
        self.btf = lib._pointer("btf__load_vmlinux_btf")
        self.btf_find = lib._number("btf__find_by_name_kind", c_void_p, c_char_p, c_uint32)
        self.btf_free = lib._nothing("btf__free", c_void_p)
        self.get = lib._number("bpf_obj_get", c_char_p)
        self.create = lib._number(
            "bpf_map_create", c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p
        )
        self.info = lib._number("bpf_obj_get_info_by_fd", c_int, c_void_p, c_void_p)
        self.lookup_batch = lib._number(
            *("bpf_map_lookup_batch", c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
            c_void_p,
        )


def _text(name: str, lib: libbpf._Library) -> Callable[[int], bytes]:
    return lib._function(name, c_char_p, (c_void_p,), lambda _: False)  # type: ignore[return-value]


@cache
def _functions() -> _Functions:
    return _Functions()


def hooks(names: list[str]) -> dict[str, int]:
    """LSM hooks of the running kernel among ``names``, each with the BTF id of its function."""
    bpf = _functions()
    btf = bpf.btf()
    found = {}
    try:
        for name in names:
            try:
                found[name] = bpf.btf_find(btf, f"bpf_lsm_{name}".encode(), _KIND_FUNC)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
    finally:
        bpf.btf_free(btf)
    return found


def load_and_pin(path: Path, maps: Path, links: Path) -> dict[str, str]:
    """Load an object, attach each program to its hook, pin all; returns program → hook.

    Maps that are pinned in ``maps`` already are shared with the objects before.  Programs that are
    optional (a section that begins with ``?``) are left out where the kernel lacks the hook.
    Raises SetupError; what was pinned until then is the caller's to remove.
    """
    bpf, base = _functions(), libbpf._bpf()
    with ExitStack() as stack:
        said = stack.enter_context(base.warnings())
        try:
            handle = base.open(str(path).encode(), None)
            stack.callback(base.close, handle)
            for one in _each(bpf.next_map, handle):
                bpf.pin_at(one, bytes(maps / bpf.map_name(one).decode()))
            programs = choose(handle)
            base.load(handle)
            done = {}
            for one, hook in programs.items():
                name = bpf.program_name(one).decode()
                link = bpf.attach(one)
                stack.callback(bpf.destroy_link, link)
                bpf.pin_link(link, bytes(links / name))
                done[name] = hook
        except OSError as error:
            words = f"{error.strerror}\n{''.join(said)[-1500:]}".rstrip()
            raise SetupError(f"cannot attach {path.name}: {words}", hint="mis doctor") from error
        return done


def choose(handle: int) -> dict[int, str]:
    """The programs of an opened object whose hook this kernel has, each with the hook; of the
    others the optional ones will not be loaded, and for the rest loading will fail."""
    bpf = _functions()
    programs = {
        one: bpf.section(one).decode().partition("/")[2] for one in _each(bpf.next_program, handle)
    }
    known = hooks(list(programs.values()))
    for one, hook in programs.items():
        if not bpf.autoload(one):
            bpf.set_autoload(one, hook in known)
    return {one: hook for one, hook in programs.items() if hook in known}


def _each(following: Callable[..., int], handle: int) -> Iterator[int]:
    one = following(handle, None)
    while one:
        yield one
        one = following(handle, one)


def try_lsm() -> None:
    """Load ``return 0`` as an LSM program; nothing is attached. Raises OSError."""
    hook = hooks(["file_open"]).get("file_open")
    if hook is None:
        raise OSError(errno.ENOTSUP, "this kernel has no LSM hooks for BPF (CONFIG_BPF_LSM)")
    code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
    buffer = create_string_buffer(code)
    licence = create_string_buffer(b"GPL")
    # union bpf_attr: type, count, insns, licence, log (4, 4, 8), version, flags, name, ifindex,
    # expected_attach_type, BTF (4, 4, 8, 4, 4, 8, 4), attach_btf_id.
    attributes = struct.pack(
        "=IIQQIIQII16sIIIIQIIQII",
        *(_LSM, 2, addressof(buffer), addressof(licence)),
        *(0, 0, 0, 0, 0, b"mis_probe", 0, _LSM_MAC),
        *(0, 0, 0, 0, 0, 0, 0, hook),
    )
    os.close(libc.bpf(5, attributes))


class PinnedMap(libbpf.Map):
    """A map by its pin, or made here; close it."""

    def __init__(self, path: Path) -> None:
        super().__init__(_functions().get(bytes(path)))

    def close(self) -> None:
        """Release the descriptor."""
        os.close(self.fd)

    def items(self) -> dict[bytes, bytes]:
        """All entries of a hash; while others change it some may be missing."""
        bpf = _functions()
        about, size = (c_uint32 * 5)(), c_uint32(20)  # struct bpf_map_info, its beginning
        bpf.info(self.fd, about, byref(size))
        _, _, key, value, most = about
        most = min(most, BATCH)
        keys, values = create_string_buffer(most * key), create_string_buffer(most * value)
        found: dict[bytes, bytes] = {}
        after = c_uint32()  # where the next call goes on; only a hash has so short a one
        start, ended = None, False
        while not ended:
            count = c_uint32(most)
            try:
                bpf.lookup_batch(self.fd, start, byref(after), keys, values, byref(count), None)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                ended = True  # with the last of them
            got = _cut(keys.raw, key, count.value), _cut(values.raw, value, count.value)
            found.update(zip(*got, strict=True))
            start = byref(after)
        return found


def _cut(raw: bytes, size: int, count: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, count * size, size)]


class MappedArray(PinnedMap):
    """An array map (BPF_F_MMAPABLE) whose values are read and written as words of eight bytes.

    A word is stored by one instruction, so a program that runs meanwhile sees the old or the new.
    """

    def __init__(self, path: Path, entries: int, size: int) -> None:
        super().__init__(path)
        self._words = size // 8
        length = -(-entries * size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(self.fd, length)
        self._view = memoryview(self._memory).cast("Q")

    def close(self) -> None:
        """Release the mapping and the descriptor."""
        self._view.release()
        self._memory.close()
        super().close()

    def read(self, index: int) -> bytes:
        """A value."""
        at = index * self._words
        return self._view[at : at + self._words].tobytes()

    def write(self, index: int, value: bytes) -> None:
        """Change a value: the words that differ, from the last to the first."""
        at = index * self._words
        words = struct.unpack(f"={self._words}Q", value)
        for offset in reversed(range(self._words)):
            if self._view[at + offset] != words[offset]:
                self._view[at + offset] = words[offset]


def make_ring(size: int) -> int:
    """Descriptor of a new ring buffer of ``size`` bytes."""
    return _functions().create(RINGBUF, b"mis_ring", 0, 0, size, None)


def mount(point: Path) -> None:
    """Mount a bpffs at ``point`` unless there is one."""
    if any((m.point, m.kind) == (str(point), "bpf") for m in mountinfo.read()):
        return
    libc.mount("bpf", str(point), "bpf", libc.MS_NOSUID | libc.MS_NODEV)
