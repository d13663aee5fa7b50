"""The launches of `test_runtimes` on a host with cgroup v2 only."""

from test_runtimes import (  # noqa: F401 - tests and fixtures
    clean_workspace,
    each_runtime,
    test_a_runtime_that_sends_nothing,
    test_emergency,
    test_every_guard,
    test_heartbeat,
    test_signals,
    test_terminal,
    test_the_launcher_is_killed,
)
