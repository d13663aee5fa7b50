"""Structs, words and numbers that Python and BPF share are the same on both sides."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mis_run import table
from mis_run.build import BUILT, ROOT
from mis_run.guards import lsm_abi
from mis_run.guards import net_layout as net

LAYOUTS = {
    "mis_key": net.KEY,
    "mis_port": net.PORT,
    "mis_settings": net.SETTINGS,
    "mis_counter": net.COUNTER,
    "mis_net_event": net.EVENT,
    "mis_place": lsm_abi.PLACE,
    "mis_rule": lsm_abi.RULE,
    "mis_agent": lsm_abi.AGENT,
    "mis_state": lsm_abi.STATE,
    "mis_plane": lsm_abi.PLANE,
    "mis_lsm_event": lsm_abi.EVENT,
}


@pytest.fixture(scope="module")
def btf() -> dict[int, dict[str, Any]]:
    """The types of abi.bpf.o by number."""
    argv = ["bpftool", "-j", "btf", "dump", "file", str(BUILT / "abi.bpf.o")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return {one["id"]: one for one in json.loads(done.stdout)["types"]}


def find(btf: dict[int, dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(one for one in btf.values() if one["kind"] == kind and one["name"] == name)


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


def fields(form: str) -> list[int]:
    """The same of a struct format: 4H is four fields, 16s is one."""
    found = []
    for count, letter in re.findall(r"(\d*)([A-Za-z])", form):
        size = 8 * struct.calcsize(f"={letter}")
        found += [size * int(count or 1)] if letter == "s" else [size] * int(count or 1)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, btf: dict[int, dict[str, Any]]) -> None:
    """Same size, same sequence of field sizes, no hidden padding."""
    one = find(btf, "STRUCT", name)
    assert LAYOUTS[name].size == one["size"] == sum(bits(btf, one["id"])) // 8
    assert fields(LAYOUTS[name].format) == bits(btf, one["id"])


def test_entry(btf: dict[int, dict[str, Any]]) -> None:
    """An entry is its head and exactly MOST_PORTS ports."""
    size = net.ENTRY.size + table.MOST_PORTS * net.PORT.size
    assert find(btf, "STRUCT", "mis_entry")["size"] == size


def test_acts(btf: dict[int, dict[str, Any]]) -> None:
    """Every act has its word, in the order of the enum."""
    values = find(btf, "ENUM", "mis_act")["values"]
    names = [value["name"].removeprefix("MIS_ACT_").lower() for value in values[:-1]]
    different = {
        "device_node": "mknod",
        "perf": "perf_event_open",
        "uring": "io_uring",
    }
    assert [different.get(name, name) for name in names] == list(lsm_abi.ACTS)


def defines() -> dict[str, int]:
    text = Path(ROOT / "bpf" / "mis.h").read_text()
    return {
        name: int(number, 0)
        for name, number in re.findall(r"#define (MIS_\w+) (0x[0-9a-f]+|\d+)", text)
    }


def test_numbers() -> None:
    """Rights, flags and special rules have the same numbers on both sides."""
    header = defines()
    for right in lsm_abi.Right:
        assert header[f"MIS_{right.name}"] == right
    for rule in lsm_abi.RuleFlag:
        assert header[f"MIS_{rule.name}"] == rule
    for agent in lsm_abi.AgentFlag:
        assert header[f"MIS_{agent.name}"] == agent
    assert {value for name, value in header.items() if "_RULE_" in name} == set(lsm_abi.WORDS)
    assert header["MIS_PATH"] == lsm_abi.PATH
