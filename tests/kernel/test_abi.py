"""Structs that Python and BPF share have the same size and fields on both sides."""

from __future__ import annotations

import json
import struct
import subprocess
from typing import Any

import pytest

from mis_run import table
from mis_run.build import BUILT
from mis_run.guards import net_layout as net

LAYOUTS = {
    "mis_key": net.KEY,
    "mis_port": net.PORT,
    "mis_settings": net.SETTINGS,
    "mis_counter": net.COUNTER,
    "mis_net_event": net.EVENT,
}


@pytest.fixture(scope="module")
def btf() -> dict[int, dict[str, Any]]:
    """The types of abi.bpf.o by number."""
    argv = ["bpftool", "-j", "btf", "dump", "file", str(BUILT / "abi.bpf.o")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return {one["id"]: one for one in json.loads(done.stdout)["types"]}


def find(btf: dict[int, dict[str, Any]], name: str) -> dict[str, Any]:
    return next(one for one in btf.values() if one["kind"] == "STRUCT" and one["name"] == name)


def bits(btf: dict[int, dict[str, Any]], number: int) -> list[int]:
    """The sizes of the scalars in a type, in bits, arrays of bytes as one piece."""
    one = btf[number]
    if one["kind"] in ("TYPEDEF", "CONST", "VOLATILE"):
        return bits(btf, one["type_id"])
    if one["kind"] == "ARRAY":
        inner = bits(btf, one["type_id"])
        return [8 * one["nr_elems"]] if inner == [8] else inner * one["nr_elems"]
    if one["kind"] == "STRUCT":
        return [size for member in one["members"] for size in bits(btf, member["type_id"])]
    return [8 * one["size"]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, btf: dict[int, dict[str, Any]]) -> None:
    """Same size, same sequence of field sizes, no hidden padding."""
    one = find(btf, name)
    layout = LAYOUTS[name]
    assert layout.size == one["size"]
    fields = [8 * struct.calcsize(f"={count}{letter}") for count, letter in _fields(layout.format)]
    assert fields == bits(btf, one["id"])


def _fields(form: str) -> list[tuple[str, str]]:
    """(count, letter) of each field of a struct format: 4H is four, 16s is one."""
    found, count = [], ""
    for letter in form.lstrip("="):
        if letter.isdecimal():
            count += letter
        elif letter == "s":
            found.append((count, letter))
            count = ""
        else:
            found += [("1", letter)] * int(count or 1)
            count = ""
    return found


def test_entry(btf: dict[int, dict[str, Any]]) -> None:
    """An entry is its head and exactly MOST_PORTS ports."""
    size = net.ENTRY.size + table.MOST_PORTS * net.PORT.size
    assert find(btf, "mis_entry")["size"] == size
