"""The agent's network without its guards: NAT, isolation, switches, leftovers.

Each test is a machine of its own: a child process in a fresh network namespace, with its own
nftables, switches and interfaces, so that nothing here touches, or depends on, the real one.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mis_run import namespace, network, network_detect, nft, shared
from mis_run.errors import SetupError
from mis_run.linux import libc, programs
from mis_run.model import NetMode, NetPlan

pytestmark = pytest.mark.root

HERE4, THERE4 = "198.18.5.1", "198.18.5.2"
HERE6, THERE6 = "2001:db8:5::1", "2001:db8:5::2"
PORT = 7001


def on_a_machine(test: Callable[[], None]) -> Callable[[Path], None]:
    """Run the test in a child in a network namespace of its own."""

    @functools.wraps(test)
    def wrapped(tmp_path: Path) -> None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(60)
                libc.unshare(libc.CLONE_NEWNET)
                namespace.loopback_up()
                shared.NET = tmp_path / "net"
                write("ipv4/ip_forward", "0")  # a new namespace inherits the machine's
                test()
                code = 0
            except BaseException:  # noqa: BLE001 - a child has no other way to tell
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, "see the traceback on stderr"

    wrapped.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        lambda tmp_path: None
    )
    return wrapped


def run_id() -> str:
    return secrets.token_hex(4)


def plan(*allow: str, mode: str = "guarded", ipv6: bool = False, own: str = HERE4) -> NetPlan:
    return NetPlan(
        mode=NetMode(mode),
        ipv6=ipv6,
        allow=allow,
        listen=(),
        resolvers=(),
        host_addresses=(own,),
    )


@contextmanager
def agent(a_plan: NetPlan, name: str = "") -> Iterator[network.Link]:
    name = name or run_id()
    with network.reserve(a_plan, name) as held, network.create(a_plan, name, held) as link:
        assert link is not None
        link.ifindex()
        yield link


def sh(text: str, netns: int | None = None) -> str:
    """Run commands, one a line, perhaps inside a namespace; their output."""

    def run() -> str:
        done = subprocess.run(
            ["bash", "-ec", text], capture_output=True, text=True, check=False, timeout=20
        )
        assert done.returncode == 0, f"{text}: {done.stderr}"
        return done.stdout

    return namespace.within(netns, run) if netns is not None else run()


def serve(netns: int | None, port: int = PORT, address: str = "::") -> None:
    """Echo servers, TCP and UDP, that answer with the address they saw."""

    def make() -> list[socket.socket]:
        made = []
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            sock = socket.socket(socket.AF_INET6, kind)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((address, port))
            made.append(sock)
        made[0].listen(64)
        return made

    stream, dgram = namespace.within(netns, make) if netns is not None else make()

    def streams() -> None:
        while True:
            client, peer = stream.accept()
            client.sendall(peer[0].encode())
            client.close()

    def datagrams() -> None:
        while True:
            _, peer = dgram.recvfrom(100)
            dgram.sendto(peer[0].encode(), peer)

    for body in (streams, datagrams):
        threading.Thread(target=body, daemon=True).start()


def ask(netns: int, address: str, *, port: int = PORT, udp: bool = False) -> str | None:
    """The peer address that the server saw; None when nothing came back within half a second."""

    def client() -> str | None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        with socket.socket(family, kind) as sock, suppress(OSError):
            sock.settimeout(0.5)
            sock.connect((address, port))
            if udp:
                sock.send(b"x")
            return sock.recv(100).decode().removeprefix("::ffff:")
        return None

    return namespace.within(netns, client)


@contextmanager
def elsewhere() -> Iterator[int]:
    """A second host, reached through this machine; it has no route to the agents' addresses."""
    netns = namespace.make()
    try:
        sh(
            f"""ip link add out0 type veth peer name eth0 netns /proc/{os.getpid()}/fd/{netns}
            ip addr add {HERE4}/24 dev out0
            ip addr add {HERE6}/64 dev out0 nodad
            ip link set out0 up"""
        )
        sh(
            f"""ip addr add {THERE4}/24 dev eth0
            ip addr add {THERE6}/64 dev eth0 nodad
            ip link set eth0 up""",
            netns,
        )
        serve(netns)
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        while ask(here, THERE6) is None:  # the first neighbour discovery takes a second
            pass
        os.close(here)
        yield netns
    finally:
        os.close(netns)


def read(path: str) -> str:
    return Path("/proc/sys/net", path).read_text().strip()


def write(path: str, value: str) -> None:
    Path("/proc/sys/net", path).write_text(value)


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def remainder() -> dict[str, Any]:
    """All that could be left of an agent."""
    return {
        "interfaces": [name for name in interfaces() if name.startswith("mis")],
        "files": sorted(path.name for path in shared.NET.iterdir() if path.name != "lock"),
        "ruleset": sh("nft list ruleset"),
        "forward": (read("ipv4/ip_forward"), read("ipv6/conf/all/forwarding")),
    }


def services() -> set[str]:
    """Agents that may reach services of the host: those with a chain, and a jump to it."""
    chains = set(re.findall(r"chain (mis-\w+) ", sh("nft list table inet mis")))
    jumps = set(re.findall(r'"(mis-\w+)" : jump', sh("nft list map inet mis local")))
    assert chains == jumps
    return chains


NOTHING = {"interfaces": [], "files": [], "ruleset": "", "forward": ("0", "0")}


@on_a_machine
def test_a_namespace_that_lives_on_keeps_no_interface() -> None:
    """As a connection with unsent bytes keeps one. The control: nobody else deletes it."""
    real, asked = network._run, []

    def refuse(argv: list[str], *_: Any, **__: Any) -> None:
        asked.append(argv)

    for delete in (False, True):
        name = run_id()
        with agent(plan(), name) as link:
            kept = os.open(link.path, os.O_RDONLY)
            network._run = real if delete else refuse
        network._run = real
        assert (f"mis-{name}" in interfaces()) != delete
        os.close(kept)
        end = time.monotonic() + 5
        while f"mis-{name}" in interfaces() and time.monotonic() < end:
            time.sleep(0.01)
    assert len(asked) == 1


@on_a_machine
def test_no_network_means_loopback_only() -> None:
    """Mode none has a working loopback and nothing else, and shares nothing."""
    with network.create(plan(mode="none"), run_id(), network.Reserved(0, [])) as link:
        assert link is not None
        names = sh("ip -o link | cut -d: -f2", link.netns).split()
        serve(link.netns)
        assert names == ["lo"]
        assert ask(link.netns, "127.0.0.1") == "127.0.0.1"
    assert not shared.NET.exists()


@on_a_machine
def test_a_host_elsewhere_is_reached_by_nat() -> None:
    """TCP and UDP over IPv4 and IPv6 arrive with this machine's address; without the table none."""
    with elsewhere(), agent(plan(ipv6=True)) as link:
        for there, here in ((THERE4, HERE4), (THERE6, HERE6)):
            assert ask(link.netns, there) == here
            assert ask(link.netns, there, udp=True) == here
        sh("nft delete table inet mis")  # the control: no NAT, no way back
        for there in (THERE4, THERE6):
            assert ask(link.netns, there) is None
            assert ask(link.netns, there, udp=True) is None


@on_a_machine
def test_without_ipv6_there_is_none() -> None:
    """A plan without IPv6 leaves no IPv6 address on either side, loopback included."""
    with elsewhere(), agent(plan()) as link:
        assert sh("ip -6 -o addr", link.netns) == ""
        assert sh(f"ip -6 -o addr show dev {link.interface}") == ""
        assert ask(link.netns, THERE6) is None
        assert ask(link.netns, THERE4) == HERE4
        assert read("ipv6/conf/all/forwarding") == "0"


@on_a_machine
def test_the_host_serves_an_agent_only_what_is_allowed() -> None:
    """A service of the host is reached through a rule for its very port; overlaps are fine."""
    allowed = plan(f"{HERE4}:7001/tcp", f"{HERE4}:7000-7001/tcp", f"{HERE4}:7001")
    with elsewhere(), agent(plan()) as other, agent(allowed) as link:
        for port in (7001, 7002):
            serve(None, port, f"::ffff:{HERE4}")
        assert ask(link.netns, HERE4)
        assert ask(link.netns, HERE4, udp=True)
        assert ask(link.netns, HERE4, port=7002) is None
        for netns in (other.netns, link.netns):
            gateway = sh("ip route show default | cut -d' ' -f3", netns).strip()
            serve(None, PORT, f"::ffff:{gateway}")
            assert ask(netns, gateway) is None  # our end of its link is the host's too
        assert ask(other.netns, HERE4) is None
        sh("nft flush chain inet mis input")  # the control: it is this rule that refused
        assert ask(other.netns, HERE4)


@on_a_machine
def test_services_of_an_agent_go_with_it() -> None:
    """The host services allowed to one agent are forgotten while another goes on."""
    with elsewhere(), agent(plan()):
        with agent(plan(f"{HERE4}:7001")) as link:
            assert services() == {link.interface}
        assert services() == set()


@on_a_machine
def test_agents_are_kept_apart() -> None:
    """No packet goes from one agent to another; with the rule away it does."""
    with agent(plan(ipv6=True)) as one, agent(plan(ipv6=True)) as two:
        serve(two.netns)
        assert two.address6 is not None
        assert ask(one.netns, two.address4) is None
        assert ask(one.netns, two.address6) is None
        sh("nft flush chain inet mis forward")
        assert ask(one.netns, two.address4)
        assert ask(one.netns, two.address6)


@on_a_machine
def test_nobody_calls_an_agent() -> None:
    """A host elsewhere that knows the way cannot open a connection to an agent."""
    with elsewhere() as there, agent(plan()) as link:
        serve(link.netns)
        sh(f"ip route add 10.213.0.0/16 via {HERE4}", there)
        assert ask(there, link.address4) is None
        sh("nft flush chain inet mis forward")
        assert ask(there, link.address4)


@on_a_machine
def test_a_foreign_source_address_goes_nowhere() -> None:
    """What an agent sends from an address that is not of the pool is not forwarded."""
    with elsewhere() as there, agent(plan()) as link:
        sh("ip addr add 198.18.6.9/32 dev eth0", link.netns)
        sh(f"ip route add 198.18.6.9 via {HERE4}", there)
        sh(f"ip route add 198.18.6.9 dev {link.interface}")  # rp_filter has no objection then

        def client() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(0.5)
                sock.bind(("198.18.6.9", 0))
                sock.sendto(b"x", (THERE4, PORT))
                with suppress(TimeoutError):
                    return bool(sock.recv(100))
            return False

        sh(f"ip neigh add 198.18.6.9 lladdr {network.MAC_AGENT} dev {link.interface}")
        assert namespace.within(link.netns, client) is False
        sh("nft flush chain inet mis forward")
        assert namespace.within(link.netns, client) is True


@on_a_machine
def test_neighbours_are_permanent() -> None:
    """Both ends know each other without asking, in both families; no router is listened to."""
    with agent(plan(ipv6=True)) as link:
        inside = sh("ip neigh", link.netns).splitlines()
        outside = sh(f"ip neigh show dev {link.interface}").splitlines()
        assert len(inside) == len(outside) == 2
        assert all("PERMANENT" in line for line in inside + outside)
        assert read(f"ipv6/conf/{link.interface}/accept_ra") == "0"
        assert sh("cat /proc/sys/net/ipv6/conf/eth0/accept_ra", link.netns) == "0\n"


@on_a_machine
def test_switches_are_put_back() -> None:
    """Forwarding, and all that the kernel turns along with it, is as before the first agent."""
    sh("ip link add forwards type veth; ip link add plain type veth")
    write("ipv4/conf/all/accept_redirects", "0")
    write("ipv4/conf/forwards/forwarding", "1")
    write("ipv6/conf/forwards/forwarding", "1")
    write("ipv6/conf/plain/accept_ra", "1")
    files = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"]
    for family, switch in (
        ("ipv4", "forwarding"),
        ("ipv6", "forwarding"),
        ("ipv4", "accept_redirects"),
        ("ipv6", "accept_ra"),
    ):
        for name in ("all", "default", "forwards", "plain", "lo"):
            files.append(f"{family}/conf/{name}/{switch}")
    before = {path: read(path) for path in files}
    with agent(plan(ipv6=True)):
        assert read("ipv4/ip_forward") == read("ipv6/conf/all/forwarding") == "1"
        assert read("ipv6/conf/plain/accept_ra") == "2"
        with agent(plan(ipv6=True)):
            pass
        assert read("ipv4/ip_forward") == "1"
    assert {path: read(path) for path in files} == before


@on_a_machine
def test_a_machine_that_forwards_goes_on_forwarding() -> None:
    """A switch that was on is neither ours to close behind nor to turn off."""
    write("ipv4/ip_forward", "1")
    with agent(plan()):
        assert "nfproto" not in sh("nft list chain inet mis forward")
    assert read("ipv4/ip_forward") == "1"


@on_a_machine
def test_this_machine_is_no_router_for_others() -> None:
    """Forwarding on for agents only: others are refused, but for an interface that forwarded."""
    third = namespace.make()
    with elsewhere() as there:
        sh(
            f"""ip link add lan0 type veth peer name eth0 netns /proc/{os.getpid()}/fd/{third}
            ip addr add 198.18.7.1/24 dev lan0
            ip link set lan0 up"""
        )
        sh(
            """ip addr add 198.18.7.2/24 dev eth0
            ip link set eth0 up
            ip route add default via 198.18.7.1""",
            third,
        )
        sh(f"ip route add 198.18.7.0/24 via {HERE4}", there)
        assert ask(third, THERE4) is None
        with agent(plan()) as link:
            assert ask(link.netns, THERE4)
            assert ask(third, THERE4) is None
            sh("nft flush chain inet mis forward")
            assert ask(third, THERE4)  # the control: only the rule kept it out
        write("ipv4/conf/lan0/forwarding", "1")
        write("ipv4/conf/out0/forwarding", "1")
        assert ask(third, THERE4)
        with agent(plan()):
            assert ask(third, THERE4)
        assert ask(third, THERE4)


@on_a_machine
def test_other_tables_are_not_touched() -> None:
    """The ruleset is byte for byte the same before and after; during a run ours is added."""
    sh(
        """nft add table inet firewall
        nft add chain inet firewall input '{ type filter hook input priority 0; policy accept; }'
        nft add rule inet firewall input tcp dport 22 counter accept
        nft add table ip mis
        nft add chain ip mis own"""
    )
    before = sh("nft list ruleset")
    with agent(plan(f"{HERE4}:80")):
        during = sh("nft list ruleset")
        assert during.startswith(before)
        assert "table inet mis" in during
    assert sh("nft list ruleset") == before


@on_a_machine
def test_a_flushed_table_comes_back() -> None:
    """A firewall that flushed everything is noticed by the next launch; an intact table is kept."""
    with elsewhere(), agent(plan()) as link:
        handle = sh("nft -a list chain inet mis forward")
        with agent(plan(f"{HERE4}:80")), agent(plan()):
            assert sh("nft -a list chain inet mis forward") == handle
        sh("nft flush ruleset")
        assert ask(link.netns, THERE4) is None
        with agent(plan()):
            assert ask(link.netns, THERE4)


@on_a_machine
def test_addresses_that_are_routed_elsewhere_are_not_taken() -> None:
    """Somebody else's part of the pool is left alone; all of it is refused; a wider one is fine."""
    sh(
        """ip link add vpn type veth
        ip link set vpn up
        ip route add 10.0.0.0/8 dev vpn
        ip route add 10.213.0.0/24 dev vpn
        ip -6 route add fd6d:6973:0:40::/63 dev vpn"""
    )
    with agent(plan()) as link:
        # Indices 0 to 63 lie in 10.213.0.0/24, 64 and 65 in fd6d:6973:0:40::/63.
        assert link.address4 == "10.213.1.10"
    sh("ip route add 10.213.0.0/16 dev vpn")
    with pytest.raises(SetupError) as refused, agent(plan()):
        pass
    assert "routed elsewhere" in refused.value.message
    assert refused.value.hint
    assert remainder() == NOTHING


@on_a_machine
def test_twenty_at_once() -> None:
    """Twenty processes in parallel have twenty addresses, all reach out, nothing is left."""
    with elsewhere():
        ready, said = os.pipe()
        go, told = os.pipe()
        children = []
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                os.close(told)
                code = 1
                try:
                    with agent(plan(ipv6=True, own=THERE4)) as link:
                        os.write(said, f"{link.address4} {link.address6}\n".encode())
                        os.read(go, 1)  # all are up
                        four, six = ask(link.netns, THERE4), ask(link.netns, THERE6)
                    code = 0 if (four, six) == (HERE4, HERE6) else 3
                except BaseException:  # noqa: BLE001 - a child has no other way to tell
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(pid)
        os.close(said)
        text = b""
        while text.count(b"\n") < 20 and (more := os.read(ready, 4096)):
            text += more
        os.close(told)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
    assert codes == [0] * 20
    assert len(set(text.split())) == 40
    assert remainder() == NOTHING


@on_a_machine
def test_a_killed_launcher_leaves_nothing_after_gc() -> None:
    """SIGKILL at any moment of create or undo; gc removes what is left, and a live run stays."""
    alive = run_id()
    with elsewhere(), agent(plan(f"{HERE4}:80", ipv6=True), alive) as link:
        left = 0
        for number in range(25):
            pid = os.fork()
            if pid == 0:
                with suppress(BaseException), agent(plan(f"{HERE4}:81", ipv6=True)):
                    pass
                os._exit(0)
            time.sleep(random.Random(number).uniform(0, 0.06))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            left += len(shared.indices()) - 1
            network.gc({alive})
            network.gc({alive})
            assert set(shared.indices().values()) == {alive}
            assert set(remainder()["interfaces"]) == {link.interface}
            assert services() == {link.interface}
            assert ask(link.netns, THERE4) == HERE4
        assert left > 0, "no kill hit anything"
    assert remainder() == NOTHING


@on_a_machine
def test_gc_after_the_last_one_was_killed() -> None:
    """With no run left, gc takes down the table and restores the switches; twice is fine."""
    with elsewhere():
        for number in range(15):
            pid = os.fork()
            if pid == 0:
                with suppress(BaseException), agent(plan(ipv6=True)):
                    pass
                os._exit(0)
            time.sleep(random.Random(number).uniform(0, 0.06))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            network.gc(set())
            assert remainder() == NOTHING
            assert network.gc(set()) == []


@on_a_machine
def test_gc_waits_for_what_a_killed_launcher_started() -> None:
    """A launcher's ``nft`` outlives it for a moment: gc comes after it, not before."""
    slow = Path(shared.NET.parent, "bin")
    slow.mkdir()
    real = shutil.which("nft")
    (slow / "nft").write_text(f'#!/bin/sh\ncase "$*" in *-f*) sleep 0.7;; esac\nexec {real} "$@"\n')
    (slow / "nft").chmod(0o755)
    pid = os.fork()
    if pid == 0:
        programs.FOLDERS = f"{slow}:{programs.FOLDERS}"
        with suppress(BaseException), agent(plan(ipv6=True)):
            pass
        os._exit(0)
    time.sleep(0.4)  # its nft has begun
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert sh("nft list ruleset") == ""
    network.gc(set())
    time.sleep(0.7)
    assert remainder() == NOTHING


@on_a_machine
def test_gc_knows_its_own_names() -> None:
    """An interface of somebody else whose name begins like ours is not removed."""
    with agent(plan()):
        pass
    sh("ip link add mis-adventure type veth; ip link add mis-0badcafe type veth")
    assert network.gc(set()) == ["mis-0badcafe"]
    assert "mis-adventure" in interfaces()


@on_a_machine
def test_what_fails_halfway_is_undone() -> None:
    """A create whose commands fail raises, and leaves nothing."""
    name = run_id()
    with ExitStack() as stack:
        sh(f"ip link add mis-{name} type veth")  # the name is taken
        with pytest.raises(SetupError):
            stack.enter_context(agent(plan(), name))
    found = remainder()
    sh(f"ip link del mis-{name} 2>/dev/null || true")
    assert found["files"] == []
    assert found["ruleset"] == ""
    assert found["forward"] == ("0", "0")


@on_a_machine
def test_a_read_only_switch_is_named() -> None:
    """Where forwarding cannot be turned on, the message has the sysctl and a way around."""
    libc.unshare(libc.CLONE_NEWNS)
    sh("mount --make-rprivate /; mount --bind /proc/sys /proc/sys")
    sh("mount -o remount,bind,ro /proc/sys")
    with pytest.raises(SetupError) as refused, agent(plan()):
        pass
    assert "Read-only file system" in refused.value.message
    assert "sysctl -w net.ipv" in refused.value.hint
    assert remainder() == NOTHING


@on_a_machine
def test_the_doctor_finds_a_table_that_drops() -> None:
    """Another table's forward policy drop is found, and the command named makes agents work."""
    assert network_detect.diagnose()["forwarding"].ok
    sh(
        """nft add table ip filter
        nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'"""
    )
    found = network_detect.diagnose()["forwarding"]
    assert not found.ok
    with elsewhere(), agent(plan()) as link:
        assert ask(link.netns, THERE4) is None
        sh(found.fix)
        assert ask(link.netns, THERE4)


@on_a_machine
def test_supported_tries() -> None:
    """The three mechanisms are found here; without nft the missing program is named."""
    assert {name: found.ok for name, found in network_detect.supported().items()} == {
        "netns": True,
        "veth": True,
        "nftables": True,
        "ipv6": True,
    }
    write("ipv6/conf/all/disable_ipv6", "1")
    programs.FOLDERS = "/nonexistent"
    found = network_detect.supported()
    assert not found["ipv6"].ok
    assert "nft" in found["nftables"].detail
    with pytest.raises(SetupError) as missing:
        nft.install({})
    assert "nftables" in missing.value.hint
