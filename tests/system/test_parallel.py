"""Twenty agents at once: each has its own address and its own rules, none disturbs another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import HOST4, PORT, host_elsewhere, start
from leftovers import snapshot

pytestmark = pytest.mark.root
AGENTS = 20

TALK = """
import re, socket, subprocess, sys, time
address = re.search(r"inet (10[.]\\S+)/", subprocess.run(["ip", "-4", "addr", "show", "eth0"],
    capture_output=True, text=True).stdout)[1]
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as sock:
    sock.sendall(sys.argv[3].encode())
    answer = sock.recv(100).decode()
print(address, answer, flush=True)
sys.stdin.readline()  # all of them are up at once
"""


def test_twenty_agents_at_once(tmp_path: Path) -> None:
    """Twenty parallel launches all reach the allowed host, with twenty different addresses."""
    before = snapshot()
    with host_elsewhere(tmp_path) as host:
        agents = []
        for number in range(AGENTS):
            folder = tmp_path / f"w{number}"
            folder.mkdir()
            words = ("/usr/bin/python3", "-c", TALK, HOST4, str(PORT), f"agent-{number}")
            options = ("--allow-net", f"{HOST4}:{PORT}", "--memory", "256M")
            agents.append(start(*words, cwd=folder, options=options))
        lines = [agent.stdout.readline() for agent in agents if agent.stdout]
        outputs = [agent.communicate("go\n", timeout=120) for agent in agents]
        assert [agent.returncode for agent in agents] == [0] * AGENTS, outputs
        assert sorted(host.got()) == sorted(f"agent-{number}" for number in range(AGENTS))
    addresses = set()
    for number, line in enumerate(lines):
        found = re.fullmatch(r"(\S+) echo agent-(\d+)\n", line)
        assert found, line
        assert found[2] == str(number)
        addresses.add(found[1])
    assert len(addresses) == AGENTS
    assert snapshot() == before


LISTEN = """
import re, socket, subprocess, threading, time
mine = re.search(r"inet (10[.]\\S+)/", subprocess.run(["ip", "-4", "addr", "show", "eth0"],
    capture_output=True, text=True).stdout)[1]
server = socket.create_server(("0.0.0.0", 8000))
print(mine, flush=True)
while True:
    server.accept()[0].close()
"""

REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 8000), timeout=2)
except OSError as error:
    print("refused", error.errno)
else:
    print("REACHED")
"""


def test_agents_cannot_reach_each_other(tmp_path: Path) -> None:
    """One agent cannot connect to another's listening port, even under a rule for everywhere."""
    options = ("--allow-net", "0.0.0.0/0", "--profile", "python-agent")
    listener = start("/usr/bin/python3", "-c", LISTEN, cwd=tmp_path, options=options)
    try:
        assert listener.stdout is not None
        address = listener.stdout.readline().strip()
        assert address.startswith("10.")
        other = start("/usr/bin/python3", "-c", REACH, address, cwd=tmp_path, options=options)
        out, err = other.communicate(timeout=30)
        assert out.startswith("refused 1"), (out, err)
    finally:
        listener.terminate()
        listener.wait(20)
