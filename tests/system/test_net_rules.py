"""The agent's network, act by act, against a host that is really elsewhere.

Every denial has its control: the same act to the allowed port of the same host works.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import HOST4, HOST6, OTHER_PORT, PORT, TestHost, host_elsewhere, run, start

from mis_run.guards import scope

pytestmark = pytest.mark.root

ACT = """
import os, socket, sys, threading, time
act, family, address, port, word = sys.argv[1:6]
family, port = {"4": socket.AF_INET, "6": socket.AF_INET6}[family], int(port)
def tcp():
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(3)
        sock.connect((address, port))
        sock.sendall(word.encode())
        return sock.recv(100)
def udp():
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.sendto(word.encode(), (address, port))
        return sock.recv(100)
def udp_connected():
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.connect((address, port))
        sock.send(word.encode())
        return sock.recv(100)
def raw():
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP) as sock:
        sock.sendto(b"x", (address, 0))
    return b"echo "
def routed():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        # Segment routing (RFC 8754) by way of a host that no rule allows; needs no privilege.
        hop = socket.inet_pton(socket.AF_INET6, "2001:db8:77::3")
        header = bytes([0, 4, 4, 1, 1, 0, 0, 0]) + bytes(16) + hop
        sock.setsockopt(socket.IPPROTO_IPV6, 57, header)  # IPV6_RTHDR
        print("routed")
        sock.sendto(word.encode(), (address, port))
        return b"echo "
def connected_with_ancillary_data():
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.connect((address, port))
        sock.sendmsg([word.encode()], [(socket.IPPROTO_IP, socket.IP_TOS, bytes(4))])
        return sock.recv(100)
def mapped():
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.settimeout(3)
        sock.connect(("::ffff:" + address, port))
        sock.sendall(word.encode())
        return sock.recv(100)
def grandchild():
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(0.2)
            try:
                os.write(writer, tcp())
            except OSError as error:
                os.write(writer, str(error).encode())
        os._exit(0)
    answer = os.read(reader, 100)
    if not answer.startswith(b"echo"):
        raise OSError(1, answer.decode())
    return answer
def thread():
    found = []
    def body():
        try:
            found.append(tcp())
        except OSError as error:
            found.append(error)
    one = threading.Thread(target=body)
    one.start()
    one.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]
try:
    answer = globals()[act]()
except OSError as error:
    print("refused", error)
    sys.exit(7)
print("answer", answer)
sys.exit(0 if answer.startswith(b"echo") else 8)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestHost]:
    with host_elsewhere(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "act.py").write_text(ACT)
    return folder


ALLOW = ("--allow-net", f"{HOST4}:{PORT}", "--allow-net", f"[{HOST6}]:{PORT}")
ACTS = ("tcp", "udp", "udp_connected", "grandchild", "thread")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("family", ["4", "6"])
def test_rules_hold(act: str, family: str, elsewhere: TestHost, workspace: Path) -> None:
    """An allowed destination answers; another port of the same host is denied with an event."""
    address = HOST4 if family == "4" else HOST6
    base = ("/usr/bin/python3", "act.py", act, family, address)
    allowed = run(*base, str(PORT), f"allowed-{act}{family}", cwd=workspace, options=ALLOW)
    assert allowed.code == 0, (allowed.out, allowed.err)
    assert f"allowed-{act}{family}" in elsewhere.got()

    denied = run(*base, str(OTHER_PORT), f"denied-{act}{family}", cwd=workspace, options=ALLOW)
    assert denied.code == 7, (denied.out, denied.err)
    assert "not permitted" in denied.out
    assert f"denied-{act}{family}" not in elsewhere.got()
    events = denied.denied("net.")
    assert any(str(OTHER_PORT) in event["subject"]["destination"] for event in events), events
    assert all(event.get("comm") for event in events), events


def test_mapped_address_is_judged_as_ipv4(elsewhere: TestHost, workspace: Path) -> None:
    """``::ffff:a.b.c.d`` meets the rule of a.b.c.d: allowed on its port, denied on another."""
    base = ("/usr/bin/python3", "act.py", "mapped", "6", HOST4)
    assert run(*base, str(PORT), "mapped", cwd=workspace, options=ALLOW).code == 0
    assert run(*base, str(OTHER_PORT), "mapped", cwd=workspace, options=ALLOW).code == 7


@pytest.mark.parametrize("family", ["4", "6"])
def test_raw_socket_is_denied(family: str, elsewhere: TestHost, workspace: Path) -> None:
    """A raw socket is refused with an event even to root and to an allowed host."""
    address = HOST4 if family == "4" else HOST6
    base = ("/usr/bin/python3", "act.py", "raw", family, address, str(PORT), "raw")
    done = run(*base, cwd=workspace, options=(*ALLOW, "--user", "0"))
    assert done.code == 7, (done.out, done.err)
    assert done.denied("net.socket"), done.events


def test_dns_to_another_server_is_denied(elsewhere: TestHost, workspace: Path) -> None:
    """A DNS server of the agent's own choice gets nothing; the event names it."""
    base = ("/usr/bin/python3", "act.py", "udp", "4", HOST4, "53", "exfil")
    done = run(*base, cwd=workspace, options=ALLOW)
    assert done.code == 7
    assert "exfil" not in elsewhere.got()
    assert any(":53" in event["subject"]["destination"] for event in done.denied("net."))


def test_without_the_guard_the_same_acts_work(elsewhere: TestHost, workspace: Path) -> None:
    """The control of all of the above: in audit mode every destination answers, and is counted."""
    for family, address in (("4", HOST4), ("6", HOST6)):
        rule = ("--allow-net", f"{HOST4}:1", "--allow-net", f"[{HOST6}]:1")
        base = ("/usr/bin/python3", "act.py", "tcp", family, address, str(OTHER_PORT), "audit")
        done = run(*base, cwd=workspace, options=("--profile", "trace", *rule))
        assert done.code == 0, (done.out, done.err)
        assert [e["verdict"] for e in done.denied("net.connect")] == ["audit"], done.events


def test_host_services_cannot_be_reached(elsewhere: TestHost, workspace: Path) -> None:
    """A service on the host is out of reach even under a rule for everywhere, unless named."""
    import threading

    host = "198.18.77.1"  # this machine's own address on the test link
    with socket.create_server((host, 0)) as service:
        port = service.getsockname()[1]

        def echo() -> None:
            client, _ = service.accept()
            with client:
                client.sendall(b"echo " + client.recv(100))

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        base = ("/usr/bin/python3", "act.py", "tcp", "4", host, str(port), "host")
        wide = run(*base, cwd=workspace, options=("--allow-net", f"0.0.0.0/0:{port}"))
        assert wide.code == 7, wide.out
        assert any("host itself" in event["rule"] for event in wide.denied("net."))
        named = run(*base, cwd=workspace, options=("--allow-net", f"{host}:{port}"))
        assert named.code == 0, (named.out, named.err)
        thread.join(5)


def test_network_none_has_only_loopback(elsewhere: TestHost, workspace: Path) -> None:
    """Without a network there is no route out, and loopback inside still works."""
    base = ("/usr/bin/python3", "act.py", "tcp", "4", HOST4, str(PORT), "none")
    assert run(*base, cwd=workspace, options=("--net", "none")).code == 7
    script = (
        "import socket; a = socket.create_server(('127.0.0.1', 0)); "
        "socket.create_connection(a.getsockname()); print('loopback')"
    )
    done = run("/usr/bin/python3", "-c", script, cwd=workspace, options=("--net", "none"))
    assert (done.code, done.out) == (0, "loopback\n"), done.err


def test_network_host_is_guarded_at_the_cgroup(elsewhere: TestHost, workspace: Path) -> None:
    """In host mode the same rules hold without a namespace: allowed port yes, other no."""
    base = ("/usr/bin/python3", "act.py", "tcp", "4", HOST4)
    options = ("--net", "host", *ALLOW)
    assert run(*base, str(PORT), "hostmode", cwd=workspace, options=options).code == 0
    assert run(*base, str(OTHER_PORT), "hostmode", cwd=workspace, options=options).code == 7


@pytest.mark.parametrize("mode", ["guarded", "host"])
def test_source_routes_are_refused(mode: str, elsewhere: TestHost, workspace: Path) -> None:
    """A packet to an allowed host by way of another one is refused; in audit mode it is sent."""
    base = ("/usr/bin/python3", "act.py", "routed", "6", HOST6, str(PORT), "routed")
    done = run(*base, cwd=workspace, options=("--net", mode, *ALLOW))
    assert done.code == 7, (done.out, done.err)
    assert done.out.startswith("routed")
    shown = [event["subject"]["destination"] for event in done.denied("net.")]
    assert shown == ["[2001:db8:77::3]:0"], done.events
    audited = run(*base, cwd=workspace, options=("--profile", "trace", "--net", "host", *ALLOW))
    assert audited.code == 0, (audited.out, audited.err)
    assert [event["verdict"] for event in audited.denied("net.route")] == ["audit"]


@pytest.mark.parametrize("mode", ["guarded", "host"])
def test_ancillary_data_is_no_violation(mode: str, elsewhere: TestHost, workspace: Path) -> None:
    """A connected socket may send ancillary data to its peer, where a rule allows that."""
    base = ("/usr/bin/python3", "act.py", "connected_with_ancillary_data", "4", HOST4)
    options = ("--net", mode, *ALLOW)
    done = run(*base, str(PORT), "ancillary", cwd=workspace, options=options)
    assert done.code == 0, (done.out, done.err)
    assert not done.denied(), done.events
    assert run(*base, str(OTHER_PORT), "ancillary", cwd=workspace, options=options).code == 7


LISTENER = """
import socket, time
with socket.socket() as sock:
    sock.listen()
    print(sock.getsockname()[1], flush=True)
    time.sleep(20)
"""


@pytest.mark.parametrize(("listen", "heard"), [("loopback", False), ("*", True)])
def test_a_listener_without_a_port(
    listen: str, heard: bool, elsewhere: TestHost, workspace: Path
) -> None:
    """In host mode a listener that never asked for a port hears whom a listen rule allows."""

    profile = workspace / "profile.toml"
    profile.write_text(f'extends = "default"\n[network]\nmode = "host"\nlisten = ["{listen}"]\n')
    words = ("/usr/bin/python3", "-c", LISTENER)
    process = start(*words, cwd=workspace, options=("-p", "./profile.toml"))
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for address, expected in (("127.0.0.1", True), ("198.18.77.1", heard)):
            with socket.socket() as sock:
                sock.settimeout(0.5)
                assert (sock.connect_ex((address, port)) == 0) == expected
    finally:
        process.terminate()
        process.communicate(timeout=30)


ABSTRACT = """
import socket, sys
with socket.socket(socket.AF_UNIX) as own:
    own.bind("\\0mis-own-" + sys.argv[1])
    own.listen(1)
    for name in (sys.argv[1], "mis-own-" + sys.argv[1]):
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect("\\0" + name)
                print("connected")
            except OSError as error:
                print(error.strerror)
"""


def test_abstract_sockets_of_the_host(workspace: Path) -> None:
    """In host mode the agent reaches its own, and none of the host's; without a guard it does."""
    if not scope.supported()[scope.NAME].ok:
        pytest.skip("this kernel has no Landlock scopes")
    name = f"mis-test-{secrets.token_hex(8)}"
    argv = ("/usr/bin/python3", "-c", ABSTRACT, name)
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(f"\0{name}")
        service.listen(8)
        done = run(*argv, cwd=workspace, options=("--net", "host"))
        assert done.out.splitlines() == ["Operation not permitted", "connected"], done.err
        outside = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert outside.stdout.splitlines() == ["connected", "connected"]
