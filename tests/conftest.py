"""What all tests share: what cannot run here is skipped with its reason, and fails in CI."""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest's own skips
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without root, or without a program that `run-tests` installs in CI, nothing was tested."""
    in_ci = os.environ.get("CI") == "true"
    for mark in item.iter_markers("skipif"):
        reason = mark.kwargs.get("reason", "")
        if in_ci and True in mark.args and "is not installed" in reason:
            pytest.fail(f"in CI this must run: {reason}")
    if item.get_closest_marker("root") is None or os.geteuid() == 0:
        return
    if in_ci:
        pytest.fail("CI must run as root")
    pytest.skip("needs root: sudo ./run-tests")
