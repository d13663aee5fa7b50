"""libbpf.so.1 through ctypes: open, load, attach, maps, ring buffer. Prototypes once, one errcheck.

Programs are attached the old way (BPF_PROG_ATTACH), not by links: an attachment then lives exactly
as long as the cgroup and survives our SIGKILL, with nothing pinned.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path

from mis_run.errors import SetupError
from mis_run.hints import Any

# linux/bpf.h, stable ABI.
BPF_F_ALLOW_MULTI = 1 << 1
BPF_F_LOCK = 4  # of an update: under the value's spin lock
XDP_FLAGS_SKB_MODE = 1 << 1
XDP_FLAGS_DRV_MODE = 1 << 2
ATTACH_TYPES = {
    "ingress": 0,
    "egress": 1,
    "sock_create": 2,
    "bind4": 8,
    "bind6": 9,
    "connect4": 10,
    "connect6": 11,
    "sendmsg4": 14,
    "sendmsg6": 15,
}

_Print = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)
_Sample = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, ctypes.c_size_t)


class _Library:
    """libbpf with its prototypes; made on first use, since most commands need no BPF."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise SetupError("libbpf.so.1 is missing", hint="apt-get install libbpf1") from error
        self._libc = ctypes.CDLL(None)
        self.open = self._pointer("bpf_object__open_file", c_char_p, c_void_p)
        self.find_program = self._pointer("bpf_object__find_program_by_name", c_void_p, c_char_p)
        self.find_map = self._pointer("bpf_object__find_map_by_name", c_void_p, c_char_p)
        self.ring_new = self._pointer("ring_buffer__new", c_int, _Sample, c_void_p, c_void_p)
        self.load = self._number("bpf_object__load", c_void_p)
        self.close = self._nothing("bpf_object__close", c_void_p)
        self.program_fd = self._number("bpf_program__fd", c_void_p)
        self.map_fd = self._number("bpf_map__fd", c_void_p)
        self.attach = self._number("bpf_prog_attach", c_int, c_int, c_int, c_uint32)
        self.update = self._number("bpf_map_update_elem", c_int, c_char_p, c_char_p, c_uint64)
        self.delete = self._number("bpf_map_delete_elem", c_int, c_char_p)
        self.lookup = self._number("bpf_map_lookup_elem", c_int, c_char_p, c_char_p)
        self.xdp_attach = self._number("bpf_xdp_attach", c_int, c_int, c_uint32, c_void_p)
        self.ring_fd = self._number("ring_buffer__epoll_fd", c_void_p)
        self.ring_consume = self._number("ring_buffer__consume", c_void_p)
        self.ring_free = self._nothing("ring_buffer__free", c_void_p)
        self.cpus = self._number("libbpf_num_possible_cpus")
        self._lib.libbpf_set_print.restype = c_void_p
        self._lib.libbpf_set_print(None)

    @contextmanager
    def warnings(self) -> Iterator[list[str]]:
        """What libbpf warns of meanwhile; the verifier's reason is in the last lines.

        It calls us for every line of debugging too, hundreds of times for an object, and each call
        waits for the interpreter; so it is silent but here.
        """
        said: list[str] = []

        def hear(level: int, form: bytes, arguments: int) -> int:
            if level == 0:  # LIBBPF_WARN
                buffer = ctypes.create_string_buffer(4096)
                self._libc.vsnprintf(buffer, 4096, form, c_void_p(arguments))
                said.append(buffer.value.decode(errors="replace"))
                del said[:-40]
            return 0

        callback = _Print(hear)
        self._lib.libbpf_set_print(callback)
        try:
            yield said
        finally:
            self._lib.libbpf_set_print(None)

    def _pointer(self, name: str, *argtypes: Any) -> Callable[..., int]:
        return self._function(name, c_void_p, argtypes, lambda result: not result)

    def _number(self, name: str, *argtypes: Any) -> Callable[..., int]:
        return self._function(name, c_int, argtypes, lambda result: result < 0)

    def _nothing(self, name: str, *argtypes: Any) -> Callable[..., int]:
        return self._function(name, None, argtypes, lambda _: False)

    def _function(
        self, name: str, restype: Any, argtypes: Sequence[Any], failed: Callable[[Any], bool]
    ) -> Callable[..., int]:
        function = getattr(self._lib, name)
        function.restype = restype
        function.argtypes = list(argtypes)

        def errcheck(result: Any, _: Any, arguments: tuple[Any, ...]) -> Any:
            if failed(result):
                # libbpf 1.x returns -errno from numbers and sets errno for pointers.
                code = -result if isinstance(result, int) and result < 0 else ctypes.get_errno()
                shown = ", ".join(repr(a)[:60] for a in arguments)
                raise OSError(code, f"{name}({shown}): {os.strerror(code)}")
            return result

        function.errcheck = errcheck
        return function  # type: ignore[no-any-return]


_library: _Library | None = None


def _bpf() -> _Library:
    global _library
    if _library is None:
        _library = _Library()
    return _library


class Object:
    """A loaded BPF object; `close` frees what nothing else (an attachment, a map fd) holds."""

    def __init__(self, path: Path) -> None:
        """Open and load. Raises SetupError with the verifier's last lines."""
        self._object: int | None = None
        try:
            self._load(path)
        except OSError:
            self.close()
            with _bpf().warnings() as said:  # once more, to hear why
                try:
                    self._load(path)
                except OSError as error:
                    self.close()
                    words = f"{error.strerror}\n{''.join(said)[-1500:]}".rstrip()
                    raise SetupError(
                        f"cannot load {path.name}: {words}", hint="mis doctor"
                    ) from error

    def _load(self, path: Path) -> None:
        self._object = _bpf().open(str(path).encode(), None)
        _bpf().load(self._object)

    def close(self) -> None:
        """Release the object."""
        if self._object is not None:
            _bpf().close(self._object)
            self._object = None

    def program(self, name: str) -> int:
        """Descriptor of a program, owned by the object."""
        return _bpf().program_fd(_bpf().find_program(self._object, name.encode()))

    def map(self, name: str) -> Map:
        """A map by name."""
        return Map(_bpf().map_fd(_bpf().find_map(self._object, name.encode())))


class Map:
    """A map by descriptor; keys and values are bytes of the declared sizes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Insert or replace."""
        _bpf().update(self.fd, key, value, flags)

    def delete(self, key: bytes) -> None:
        """Remove; a key that is not there is fine."""
        try:
            _bpf().delete(self.fd, key)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def lookup(self, key: bytes, size: int) -> bytes | None:
        """The value, ``size`` bytes (per-CPU maps: of all CPUs together), or None."""
        value = ctypes.create_string_buffer(size)
        try:
            _bpf().lookup(self.fd, key, value)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw


class Ring:
    """A ring buffer's reading end."""

    def __init__(self, source: Map) -> None:
        self._samples: list[bytes] = []
        self._most = 0

        def sample(_: int, data: int, size: int) -> int:
            self._samples.append(ctypes.string_at(data, size))
            return 0 if len(self._samples) < self._most else -errno.EAGAIN

        self._keep = _Sample(sample)
        self._ring = _bpf().ring_new(source.fd, self._keep, None, None)

    def fileno(self) -> int:
        """Readable when there are samples."""
        return _bpf().ring_fd(self._ring)

    def drain(self, most: int) -> list[bytes]:
        """The oldest samples, at most so many; the others stay, and the ring stays readable."""
        self._most = most
        try:
            _bpf().ring_consume(self._ring)
        except OSError as error:
            if error.errno != errno.EAGAIN:  # ours: the sample is taken, the rest can wait
                raise
        found, self._samples = self._samples, []
        return found

    def close(self) -> None:
        """Release the ring."""
        _bpf().ring_free(self._ring)


def possible_cpus() -> int:
    """How many values a per-CPU map has."""
    return _bpf().cpus()


def attach_cgroup(cgroup_fd: int, program: int, kind: str) -> None:
    """Attach to a cgroup beside whatever is there (BPF_F_ALLOW_MULTI)."""
    _bpf().attach(program, cgroup_fd, ATTACH_TYPES[kind], BPF_F_ALLOW_MULTI)


def attach_xdp(ifindex: int, program: int) -> str:
    """Attach to an interface, in the driver if it can, else generic; returns which."""
    try:
        _bpf().xdp_attach(ifindex, program, XDP_FLAGS_DRV_MODE, None)
    except OSError:
        _bpf().xdp_attach(ifindex, program, XDP_FLAGS_SKB_MODE, None)
        return "generic"
    return "driver"


def detach_xdp(ifindex: int, mode: str) -> None:
    """Take off what `attach_xdp` attached in that mode. Raises OSError."""
    flags = XDP_FLAGS_DRV_MODE if mode == "driver" else XDP_FLAGS_SKB_MODE
    _bpf().xdp_attach(ifindex, -1, flags, None)
