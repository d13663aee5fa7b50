"""The named sets of profiles (``@secrets``) and the resolution of patterns at plan time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mis_run.dataclass import dataclass
from mis_run.errors import UsageError, nearest


@dataclass(frozen=True)
class Set:
    """Patterns under one name. ``$HOME``, ``$WORKSPACE`` and ``~`` are filled in at plan time."""

    description: str
    patterns: tuple[str, ...]


SETS: Mapping[str, Set] = {
    "workspace": Set("the agent's working directory", ("$WORKSPACE/**",)),
    "scratch": Set(
        "places whose content is thrown away", ("/tmp/**", "/var/tmp/**", "/dev/shm/**", "$HOME/**")
    ),
    "system": Set(
        "programs, libraries and public configuration of the system",
        ("/usr/**", "/bin/**", "/sbin/**", "/lib/**", "/lib64/**", "/opt/**", "/nix/**", "/etc/**")
        + ("/var/lib/**", "/var/cache/**", "/proc/**", "/sys/**", "/dev/**", "/run/mis/**"),
    ),
    "system-libs": Set(
        "shared libraries only", ("/lib/**", "/lib64/**", "/usr/lib/**", "/usr/lib64/**")
    ),
    "python": Set(
        "Python and its packages",
        ("/usr/bin/python3*", "/usr/bin/pip*", "/usr/lib/python3*/**", "/usr/local/bin/python3*")
        + ("/usr/local/bin/pip*", "/usr/local/lib/python3*/**"),
    ),
    "git": Set("git", ("/usr/bin/git*", "/usr/lib/git-core/**", "/usr/share/git-core/**")),
    "compilers": Set(
        "C, C++, Rust and Go compilers and make",
        ("/usr/bin/*gcc*", "/usr/bin/*g++*", "/usr/bin/cc", "/usr/bin/c++", "/usr/bin/cpp*")
        + ("/usr/bin/clang*", "/usr/bin/ld*", "/usr/bin/*-ld*", "/usr/bin/as", "/usr/bin/*-as")
        + ("/usr/bin/ar", "/usr/bin/make", "/usr/bin/cmake", "/usr/bin/ninja", "/usr/bin/cargo")
        + ("/usr/bin/rustc", "/usr/bin/go", "/usr/lib/gcc/**", "/usr/libexec/gcc/**"),
    ),
    "node": Set(
        "Node.js and npm",
        ("/usr/bin/node*", "/usr/bin/npm", "/usr/bin/npx", "/usr/local/bin/node")
        + ("/usr/local/bin/npm", "/usr/local/bin/npx", "/usr/lib/node_modules/**")
        + ("/usr/local/lib/node_modules/**",),
    ),
    "lolbins": Set(
        "living-off-the-land binaries: ordinary tools that exfiltrate, fetch or debug",
        tuple(
            f"/**/bin/{name}"
            for name in "nc ncat netcat socat curl wget ssh scp sftp telnet ftp gdb strace ltrace "
            "tcpdump nmap busybox rsync dig nslookup".split()
        ),
    ),
    "secrets": Set(
        "homes, keys, credentials, password hashes, and the sockets of the host's services",
        ("/root", "/home/*")
        + ("/etc/shadow*", "/etc/gshadow*", "/etc/sudoers", "/etc/sudoers.d", "/etc/ssh/*_key")
        + ("/etc/ssl/private", "/etc/krb5.keytab", "/etc/kubernetes", "/etc/rancher")
        + ("/etc/docker", "/etc/wireguard", "/etc/NetworkManager/system-connections")
        + ("/etc/netplan", "/etc/ppp", "/etc/machine-id", "/etc/crypttab", "/etc/exports")
        + ("/etc/fstab", "/etc/rndc.key", "/etc/bind/rndc.key", "/etc/postgresql")
        + ("/var/lib/docker", "/var/lib/containerd", "/var/lib/containers", "/var/lib/kubelet")
        + ("/var/lib/postgresql", "/var/lib/mysql", "/var/lib/redis", "/var/lib/cloud")
        + ("/var/lib/NetworkManager", "/var/lib/sss", "/var/lib/systemd", "/var/lib/private")
        + ("/var/log", "/var/spool", "/var/mail", "/var/backups", "/var/cache/sss")
        + ("/boot", "/mnt", "/media", "/srv", "/lost+found", "/data"),
    ),
}


def expand(patterns: Iterable[str], facts: Mapping[str, str]) -> tuple[str, ...]:
    """Patterns with sets, ``~`` and ``$NAME`` replaced, each once, in order.

    ``facts`` has HOME and WORKSPACE and whatever else may be named.  Raises UsageError for a set or
    a variable that does not exist.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern.startswith("@"):
            for inner in expand(named(pattern).patterns, facts):
                found[inner] = None
            continue
        found[_fill(pattern, facts)] = None
    return tuple(found)


def named(reference: str) -> Set:
    """The set behind ``@name``. Raises UsageError with the nearest name."""
    name = reference.removeprefix("@")
    if name not in SETS:
        near = nearest(name, SETS)
        hint = f"did you mean @{near}?" if near else f"sets: {', '.join(sorted(SETS))}"
        raise UsageError(f"unknown set {reference!r}", hint=hint)
    return SETS[name]


def _fill(pattern: str, facts: Mapping[str, str]) -> str:
    if pattern == "~" or pattern.startswith("~/"):
        pattern = f"$HOME{pattern[1:]}"
    parts = pattern.split("/")
    for index, part in enumerate(parts):
        if part.startswith("$"):
            name = part[1:]
            if name not in facts:
                raise UsageError(
                    f"pattern {pattern!r}: ${name} is not known", hint="use $HOME or $WORKSPACE"
                )
            parts[index] = facts[name].rstrip("/") if index == 0 else facts[name].strip("/")
    return "/".join(parts) or "/"
