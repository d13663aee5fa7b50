"""mis-run: run AI agents and untrusted tools in a guarded cgroup and container."""

__version__ = "0.1.0"
