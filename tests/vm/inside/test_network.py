"""The agent's network on Debian's kernels: tests of tests/system that have only this meaning there.

6.12 refuses nftables rules that newer and older kernels take, so the real table is made and used.
"""

from test_network_plumbing import (  # noqa: F401 - pytest collects them from here
    test_agents_are_kept_apart,
    test_services_of_an_agent_go_with_it,
    test_the_host_serves_an_agent_only_what_is_allowed,
)
