"""The virtual machine is what the other tests take it for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def test_kernel_line() -> None:
    """The kernel is of the line that the machine was started for."""
    release = os.uname().release
    assert release.startswith(os.environ["MIS_VM"] + "."), release


def test_bpf_lsm_is_active() -> None:
    """The BPF LSM is on, so LSM programs can be attached here."""
    assert "bpf" in Path("/sys/kernel/security/lsm").read_text().split(",")


@pytest.mark.parametrize("cgroup_host", ["v1", "v2", "hybrid"], indirect=True)
def test_cgroup_host(cgroup_host: str) -> None:
    """A host with only v1, only v2 and both kinds of cgroups can be had for a test."""
    kinds = {
        line.partition(" - ")[2].split(" ")[0]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    } & {"cgroup", "cgroup2"}
    expected = {"v1": {"cgroup"}, "v2": {"cgroup2"}, "hybrid": {"cgroup", "cgroup2"}}
    assert kinds == expected[cgroup_host]
    if cgroup_host != "v2":
        assert Path("/sys/fs/cgroup/pids/cgroup.procs").exists()
