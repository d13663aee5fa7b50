"""Rules over paths: specificity, sets, wildcards; and the bytes the file guard reads."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mis_run.file_rules import Effect, Rule, compile_rules, expand, resolved
from mis_run.guards import marks
from mis_run.linux import elf, fanotify, mountinfo


def judge(path: str, *, allow: tuple[str, ...] = (), deny: tuple[str, ...] = ()) -> str:
    rules = [Rule(p, Effect.ALLOW, p) for p in allow]
    rules += [Rule(p, Effect.DENY, f"deny {p}") for p in deny]
    return compile_rules(rules).judge(path).text


@pytest.mark.parametrize(
    ("path", "allow", "deny", "wanted"),
    [
        ("/usr/bin/cc", ("/usr/**",), (), "/usr/**"),
        ("/usr", ("/usr/**",), (), "/usr/**"),
        ("/usrlocal", ("/usr/**",), (), "default"),
        ("/etc/passwd", (), (), "default"),
        # a folder names what lies below it
        ("/etc/ssl/private/key", ("/etc/**",), ("/etc/ssl/private",), "deny /etc/ssl/private"),
        # more characters before the first wildcard
        ("/home/kim/work/a", ("/home/kim/work/**",), ("/home/*",), "/home/kim/work/**"),
        ("/home/kim/.ssh/id", ("/**",), ("/home/*",), "deny /home/*"),
        ("/root/.cache/x", ("/root/**",), ("/root",), "/root/**"),
        ("/etc/shadow-", ("/etc/**",), ("/etc/shadow*",), "deny /etc/shadow*"),
        ("/etc/s", ("/etc/**",), ("/etc/s*",), "deny /etc/s*"),
        # floating ones beat folders, and are beaten by the very path
        ("/w/a/.env", ("/w/a/**",), ("**/.env",), "deny **/.env"),
        ("/w/a/.env", ("/w/a/.env",), ("**/.env",), "/w/a/.env"),
        ("/w/k.pem", ("/w/**",), ("*.pem",), "deny *.pem"),
        ("/w/.git/hooks/x", ("/w/**",), ("**/.git/hooks/**",), "deny **/.git/hooks/**"),
        ("/usr/bin/nc", ("/usr/**",), ("/**/bin/nc",), "deny /**/bin/nc"),
        ("/usr/bin/ncat", ("/usr/**",), ("/**/bin/nc",), "/usr/**"),
        # of equals the denial
        ("/a/b", ("/a/b",), ("/a/b",), "deny /a/b"),
        ("/a/b/c", ("/a/**",), ("/a/**",), "deny /a/**"),
        # * stays within a component, ** does not, ? and [] are one character
        ("/a/x/b", ("/a/*/b",), (), "/a/*/b"),
        ("/a/x/y/b", ("/a/*/b",), (), "default"),
        ("/a/x/y/b", ("/a/**/b",), (), "/a/**/b"),
        ("/a/b", ("/a/**/b",), (), "/a/**/b"),
        ("/a/b1", ("/a/b?",), (), "/a/b?"),
        ("/a/b/", ("/a/b?",), (), "default"),
        ("/a/b2", ("/a/b[1-3]",), (), "/a/b[1-3]"),
        ("/a/b4", ("/a/b[!1-3]",), (), "/a/b[!1-3]"),
        ("/a/b[", ("/a/b[",), (), "/a/b["),
        ("/a/b\nc", ("/a/**",), (), "/a/**"),
    ],
)
def test_the_more_specific_rule_decides(
    path: str, allow: tuple[str, ...], deny: tuple[str, ...], wanted: str
) -> None:
    """Exact path, floating pattern, longest literal beginning; of equals the denial."""
    assert judge(path, allow=allow, deny=deny) == wanted
    assert judge(path, allow=allow[::-1], deny=deny[::-1]) == wanted


PATTERN = st.lists(st.sampled_from(["a", "b", "*", "**", "a*", "?", "[ab]", ".env"]), max_size=5)
PATH = st.lists(st.sampled_from(["a", "b", "ab", ".env", "x"]), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(PATH, st.lists(PATTERN), st.lists(PATTERN), st.randoms())
def test_order_never_matters(
    path: list[str], allow: list[list[str]], deny: list[list[str]], random: object
) -> None:
    """However rules are ordered the verdict is the same, and no more rules deny less."""
    made = [Rule("/" + "/".join(p), Effect.ALLOW, "allow") for p in allow]
    denied = [Rule("/" + "/".join(p), Effect.DENY, "deny") for p in deny]
    text = "/" + "/".join(path)
    forward = compile_rules([*made, *denied]).judge(text)
    backward = compile_rules([*denied[::-1], *made[::-1]]).judge(text)
    assert forward.allowed == backward.allowed
    if not compile_rules(made).judge(text).allowed:
        assert not forward.allowed


def test_links_are_followed_before_the_first_wildcard() -> None:
    """``/bin/**`` means what ``/bin`` leads to; floating patterns stay."""

    def resolve(path: str) -> str:
        return path.replace("/bin", "/usr/bin") if path.startswith("/bin") else path

    assert resolved("/bin/**", resolve) == "/usr/bin/**"
    assert resolved("/bin/py*", resolve) == "/usr/bin/py*"
    assert resolved("/bin/sh", resolve) == "/usr/bin/sh"
    assert resolved("**/bin", resolve) == "**/bin"
    assert resolved("/*/x", resolve) == "/*/x"


def test_explicit_rules_are_paths_that_somebody_wrote() -> None:
    """A set or a wildcard is not explicit; a checksum stays with its rule."""
    sets = {"@python": ("/usr/bin/python3*", "/usr/bin/pip"), "/x": ("/x",)}
    found = expand(
        ["@python", f"/x#sha256:{'A' * 64}"],
        Effect.ALLOW,
        sets=lambda text: sets[text],
        resolve=lambda path: path,
    )
    assert [(rule.pattern, rule.explicit, rule.sha256) for rule in found] == [
        ("/usr/bin/python3*", False, ""),
        ("/usr/bin/pip", False, ""),
        ("/x", True, "a" * 64),
    ]


MOUNTINFO = """\
30 1 0:40 / / rw - overlay overlay rw
31 30 8:1 /home/kim/work /home/kim/work rw - ext4 /dev/sda1 rw
32 31 8:1 /home/kim/work/.git/hooks /home/kim/work/.git/hooks ro - ext4 /dev/sda1 rw
33 30 0:41 / /proc rw - proc proc rw
34 30 0:42 / /dev rw - tmpfs tmpfs rw
35 34 0:43 / /dev/shm rw - tmpfs tmpfs rw
36 30 8:2 /a\\040b /data\\040x rw - ext4 /dev/sda2 rw
"""


def test_mounts_are_read_as_the_kernel_writes_them() -> None:
    """Ids, points with spaces, and which of them are judged."""
    found = mountinfo.parse(MOUNTINFO)
    assert [mount.point for mount in found if marks.judged(mount)] == [
        *("/", "/home/kim/work", "/home/kim/work/.git/hooks", "/dev/shm", "/data x")
    ]
    assert found[-1].root == "/a b"


def test_an_object_at_two_places_is_noticed() -> None:
    """A mount of the same place is not ambiguous; the same folder elsewhere is."""
    assert marks.ambiguous(mountinfo.parse(MOUNTINFO)) == frozenset()
    again = "37 30 8:1 /home/kim/work/sub /elsewhere rw - ext4 /dev/sda1 rw\n"
    assert marks.ambiguous(mountinfo.parse(MOUNTINFO + again)) == {"8:1"}
    whole = "38 30 8:2 / /disk rw - ext4 /dev/sda2 rw\n"
    assert marks.ambiguous(mountinfo.parse(MOUNTINFO + whole)) == {"8:2"}


def event(**changed: int) -> bytes:
    words = {"length": 24, "version": 3, "head": 24, "mask": fanotify.OPEN_PERM, "fd": -1, "pid": 7}
    words |= changed
    return struct.pack(
        "=IBBHQii",
        *(words["length"], words["version"], 0, words["head"], words["mask"]),
        *(words["fd"], words["pid"]),
    )


def test_events_are_parsed() -> None:
    """Two events in one read, the second an exec; an overflow carries no descriptor."""
    data = event(fd=1000) + event(mask=fanotify.Q_OVERFLOW)
    data += event(fd=1001, mask=fanotify.OPEN_EXEC_PERM, length=32) + b"moreinfo"
    assert [(one.fd, one.executes) for one in fanotify.parse(data)] == [(1000, False), (1001, True)]


@pytest.mark.parametrize("changed", [{"version": 2}, {"length": 3}, {"head": 3}, {"length": 0}])
def test_nonsense_is_told(changed: dict[str, int]) -> None:
    """Another version, or lengths that would never end, are refused."""
    with pytest.raises(fanotify.Garbled):
        list(fanotify.parse(event(**changed)))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_end(data: bytes) -> None:
    """Random bytes end in Garbled, whatever they follow."""
    with pytest.raises(fanotify.Garbled):
        # A length of 0 would be read for ever.
        list(fanotify.parse(event() + b"\x00" * 4 + data))


def test_programs_and_libraries(tmp_path: Path) -> None:
    """An executable names an interpreter or a fixed address, a library does not; text is neither;
    a broken header is a program, to be on the safe side."""

    def is_program(path: Path) -> bool:
        fd = os.open(path, os.O_RDONLY)
        try:
            return elf.is_program(fd)
        finally:
            os.close(fd)

    assert is_program(Path("/usr/bin/env"))
    assert is_program(Path(os.path.realpath("/proc/self/exe")))
    library = next(Path("/usr/lib").glob("*/libm.so.6"))
    assert not is_program(library)
    assert not is_program(Path("/etc/passwd"))
    broken = tmp_path / "broken"
    for length in (4, 10, 40, 60):
        broken.write_bytes(Path("/usr/bin/env").read_bytes()[:length])
        assert is_program(broken)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_any_header_is_judged(tail: bytes) -> None:
    """Whatever follows the magic number, there is an answer."""
    fd = os.memfd_create("elf")
    try:
        os.write(fd, elf.MAGIC + tail)
        assert elf.is_program(fd) in (True, False)
    finally:
        os.close(fd)
