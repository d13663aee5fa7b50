"""Names in rules: the agent's resolver, against a DNS server on the test host."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import HOST4, HOST6, PORT, TestHost, host_elsewhere, run, wait_for

pytestmark = pytest.mark.root

# Answers from a file that the test may rewrite: "NAME ADDRESS TTL" lines.
DNS = """
import ipaddress, pathlib, socket, sys
import dns.message, dns.rdatatype, dns.rrset
zone = pathlib.Path(sys.argv[1])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("198.18.77.2", 5353))
print("ready", flush=True)
while True:
    data, peer = sock.recvfrom(4096)
    query = dns.message.from_wire(data)
    question = query.question[0]
    response = dns.message.make_response(query)
    for line in zone.read_text().splitlines():
        name, address, ttl = line.split()
        kind = "A" if ipaddress.ip_address(address).version == 4 else "AAAA"
        asked = str(question.name).rstrip("."), dns.rdatatype.to_text(question.rdtype)
        if (name, kind) == asked:
            rrset = dns.rrset.from_text(question.name, int(ttl), "IN", kind, address)
            response.answer.append(rrset)
    sock.sendto(response.to_wire(), peer)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[TestHost]:
    with host_elsewhere(tmp_path) as host:
        zone = tmp_path / "zone"
        zone.write_text(
            f"api.example {HOST4} 5\napi.example {HOST6} 5\nrebind.example 198.18.77.1 5\n"
            "rebind.example 169.254.169.254 5\n"
        )
        log = tmp_path / "dns.log"
        argv = ["ip", "netns", "exec", host.name, sys.executable, "-c", DNS, str(zone)]
        with log.open("w") as out:
            server = subprocess.Popen(argv, stdout=out)
        try:
            wait_for(lambda: "ready" in log.read_text())
            yield host
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "profile.toml").write_text(
        'extends = "default"\n[network]\nresolvers = ["198.18.77.2:5353"]\n'
    )
    (folder / "profile.toml").chmod(0o644)
    return folder


TALK = """
import socket, sys
for family, kind, _, _, address in socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=1):
    with socket.socket(family, kind) as sock:
        sock.settimeout(5)
        sock.connect(address)
        sock.sendall(b"by-name")
        print(address[0], sock.recv(100).decode())
"""


def talk(name: str, *options: str, cwd: Path, port: int = PORT) -> object:
    words = ("/usr/bin/python3", "-c", TALK, name, str(port))
    return run(*words, cwd=cwd, options=("-p", "./profile.toml", *options))


def test_an_allowed_name_is_reached_by_name(elsewhere: TestHost, workspace: Path) -> None:
    """The agent resolves the allowed name and reaches its address and port; no other name."""
    done = talk("api.example", "--allow-net", f"api.example:{PORT}", cwd=workspace)
    assert done.code == 0, (done.out, done.err)  # type: ignore[attr-defined]
    assert f"{HOST4} echo by-name" in done.out  # type: ignore[attr-defined]
    other = talk("other.example", "--allow-net", f"api.example:{PORT}", cwd=workspace)
    assert other.code != 0  # type: ignore[attr-defined]
    names = [e["subject"]["name"] for e in other.denied("net.resolve")]  # type: ignore[attr-defined]
    assert "other.example" in names


def test_a_name_allows_only_its_port(elsewhere: TestHost, workspace: Path) -> None:
    """The rule's port holds for the addresses of its name."""
    done = talk("api.example", "--allow-net", f"api.example:{PORT}", cwd=workspace, port=7002)
    assert done.code != 0  # type: ignore[attr-defined]
    assert done.denied("net.connect")  # type: ignore[attr-defined]


def test_the_address_is_not_allowed_before_it_was_resolved(
    elsewhere: TestHost, workspace: Path
) -> None:
    """Without asking for the name, its address is a destination like any other."""
    done = talk(HOST4, "--allow-net", f"api.example:{PORT}", cwd=workspace)
    assert done.code != 0  # type: ignore[attr-defined]


def test_rebinding_is_refused(elsewhere: TestHost, workspace: Path) -> None:
    """A name that points at the host or at metadata gets no address, and an event says why."""
    done = talk("rebind.example", "--allow-net", f"rebind.example:{PORT}", cwd=workspace)
    assert done.code != 0  # type: ignore[attr-defined]
    told = [e for e in done.events if e["kind"] == "net.unresolved"]  # type: ignore[attr-defined]
    assert {e["subject"]["address"] for e in told} == {"198.18.77.1", "169.254.169.254"}


def test_a_name_may_point_where_a_rule_points(elsewhere: TestHost, workspace: Path) -> None:
    """A rule for the host's own address lets a name point there, to the port of that rule only."""
    import socket

    with socket.create_server(("198.18.77.1", 0)) as service:
        port = service.getsockname()[1]
        named = ("--allow-net", "rebind.example", "--allow-net", f"198.18.77.1:{port}")
        options = ("-p", "./profile.toml", *named)
        code = (
            "import socket, sys; print(socket.gethostbyname('rebind.example')); "
            "socket.create_connection(('rebind.example', int(sys.argv[1])), 2)"
        )
        base = ("/usr/bin/python3", "-c", code)
        done = run(*base, str(port), cwd=workspace, options=options)
        assert (done.code, done.out) == (0, "198.18.77.1\n"), (done.out, done.err)
        other = run(*base, "22", cwd=workspace, options=options)
        assert other.code != 0
        assert other.denied("net.connect"), other.events


def test_audit_mode_resolves_every_name(
    elsewhere: TestHost, workspace: Path, tmp_path: Path
) -> None:
    """Without enforcement a name that no rule has is resolved and told; with it it is refused."""
    with (tmp_path / "zone").open("a") as zone:
        zone.write(f"other.example {HOST4} 5\n")
    rule = ("--allow-net", f"api.example:{PORT}")
    refused = talk("other.example", *rule, cwd=workspace)
    assert refused.code != 0  # type: ignore[attr-defined]
    with (workspace / "profile.toml").open("a") as profile:
        profile.write("[mode]\nenforce = false\n")
    done = talk("other.example", *rule, cwd=workspace)
    assert done.code == 0, (done.out, done.err)  # type: ignore[attr-defined]
    told = done.denied("net.resolve")  # type: ignore[attr-defined]
    assert {(e["subject"]["name"], e["verdict"]) for e in told} == {("other.example", "audit")}


REFRESH = """
import socket, sys, time
seen = []
end = time.monotonic() + 12
while time.monotonic() < end and len(seen) < 2:
    address = socket.getaddrinfo("moving.example", 7001, socket.AF_INET, type=1)[0][4]
    if address[0] not in seen:
        seen.append(address[0])
        print(address[0], flush=True)
    time.sleep(0.3)
"""


def test_a_name_that_moves_is_followed(
    elsewhere: TestHost, workspace: Path, tmp_path: Path
) -> None:
    """After its TTL the name is resolved again and the agent learns the new address."""
    import threading

    zone = tmp_path / "zone"
    zone.write_text("moving.example 198.18.77.9 1\n")

    def move() -> None:
        time.sleep(2.5)
        zone.write_text(f"moving.example {HOST4} 1\n")

    thread = threading.Thread(target=move)
    thread.start()
    options = ("-p", "./profile.toml", "--allow-net", f"moving.example:{PORT}")
    done = run("/usr/bin/python3", "-c", REFRESH, cwd=workspace, options=options)
    thread.join()
    assert done.out.split() == ["198.18.77.9", HOST4], (done.out, done.err)
