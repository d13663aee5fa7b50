"""What the verifier had to do for each program of the kernel plane, and what libbpf warns of.

Loads the objects once more, beside those of the plane, attaches nothing and pins nothing.  As root,
where the BPF LSM works: in the test VM.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from ctypes import c_char_p, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mis_run.build import built
from mis_run.guards import lsm_plane
from mis_run.linux import bpf_pins, libbpf

STATISTICS = 4  # BPF_LOG_STATS, kernel/bpf/verifier.c: the numbers alone
ROOM = 4096


class Work(NamedTuple):
    """Instructions that were walked, and states that were kept to compare with."""

    instructions: int
    states: int


def examine() -> tuple[Mapping[str, Work], list[str]]:
    """(hook → work, warnings) of all objects. Raises OSError."""
    library = libbpf._bpf()
    set_level = library._number("bpf_program__set_log_level", c_void_p, c_uint32)
    set_room = library._number("bpf_program__set_log_buf", c_void_p, c_char_p, c_size_t)
    found = {}
    with library.warnings() as said, ExitStack() as stack:
        for name in lsm_plane.OBJECTS:
            handle = library.open(str(built(name)).encode(), None)
            stack.callback(library.close, handle)
            logs = {}
            for one, hook in bpf_pins.choose(handle).items():
                logs[hook] = ctypes.create_string_buffer(ROOM)
                set_level(one, STATISTICS)
                set_room(one, ctypes.cast(logs[hook], c_char_p), ROOM)
            library.load(handle)
            found |= {hook: _work(log.value.decode()) for hook, log in logs.items()}
    return found, said


def _work(log: str) -> Work:
    instructions = re.search(r"processed (\d+) insns", log)
    states = re.search(r"total_states (\d+)", log)
    if not instructions or not states:
        raise ValueError(f"the verifier's words are others than we know: {log!r}")
    return Work(int(instructions[1]), int(states[1]))
