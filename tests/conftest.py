"""What all tests share: tests marked ``root`` are skipped without root, and fail in CI."""

from __future__ import annotations

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Say why a test cannot run here; in CI that is a failure, not a skip."""
    if item.get_closest_marker("root") is None or os.geteuid() == 0:
        return
    if os.environ.get("CI") == "true":
        pytest.fail("CI must run as root")
    pytest.skip("needs root: sudo ./run-tests")
