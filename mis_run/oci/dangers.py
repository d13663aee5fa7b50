"""What would hand a container the host, however well it is guarded: refused, or listed as allowed.

Pure but for looking at what a volume's source is.  ``operator.LOOSENINGS`` has the names under
which an operator can allow each.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from mis_run import startup
from mis_run.errors import UsageError
from mis_run.hints import Any
from mis_run.oci.operator import LOOSENINGS
from mis_run.oci.spec import Spec
from mis_run.oci.words import FILE

MEMORY = frozenset({(1, 1), (1, 2), (1, 4)})  # /dev/mem, /dev/kmem, /dev/port: admin-guide/devices
# Whole trees that are the host, or hold every service's socket; exactly these, not what lies below.
WHOLE = frozenset(
    {"/", "/boot", "/dev", "/etc", "/home", "/proc", "/root", "/run", "/sys", "/usr", "/var"}
    | {"/var/lib", "/var/run", "/var/lib/docker", "/var/lib/containerd", "/var/lib/containers"}
    | {"/run/docker", "/run/containerd", "/run/crio", "/run/podman", "/run/systemd"}
)
BELOW = ("/proc", "/sys/kernel", "/sys/fs", "/run/mis", "/etc/mis", "/var/log/mis")


def check(spec: Spec, allowed: Collection[str]) -> None:
    """Raise UsageError for the first danger that is not in ``allowed``."""
    if spec.shares("mount"):
        raise UsageError("this container has no mount namespace of its own")
    for name, what in found(spec):
        if name not in allowed:
            raise UsageError(
                f"refused: {what}; mis-run does not guard {LOOSENINGS[name]}",
                hint=f'the operator can allow it in {FILE}: allow = ["{name}"]',
            )


def found(spec: Spec) -> Iterator[tuple[str, str]]:
    """(name of a loosening, what of this container needs it)."""
    for rule in spec.at("linux.resources.devices", []):
        if why := _device(rule):
            yield why
    for kind in ("pid", "ipc"):
        if spec.shares(kind):
            yield f"host-{kind}", f"the container would be in the host's {kind} namespace"
    for mount in spec.at("mounts", []):
        if source := _volume(mount):
            yield "host-paths", f"the volume {source}"


def _device(rule: Mapping[str, Any]) -> tuple[str, str] | None:
    """A rule of the devices cgroup that gives more than a device for users."""
    access = str(rule.get("access") or "rwm")
    if rule.get("allow") is not True or access == "m":
        return None  # making a node opens nothing by itself
    kind, major, minor = rule.get("type") or "a", rule.get("major"), rule.get("minor")
    if kind == "a" or major in (None, -1):
        return "privileged", "the container is privileged: it may use every device"
    if kind == "b" or (kind == "c" and (major, minor) in MEMORY):
        return "devices", f"the device {kind} {major}:{minor}"
    return None


def _volume(mount: Mapping[str, Any]) -> str | None:
    """The source of a bind mount that shows what no volume should; None for a harmless one."""
    options = mount.get("options") or []
    source = mount.get("source")
    if not isinstance(source, str) or not isinstance(options, list):
        return None
    if mount.get("type") != "bind" and not {"bind", "rbind"} & {str(option) for option in options}:
        return None
    path = os.path.realpath(source)
    if path in WHOLE or any(path == top or path.startswith(f"{top}/") for top in BELOW):
        return path
    if "ro" not in options and any(_overlap(path, str(top)) for top in startup.ours()):
        return f"{path}, where mis-run itself lies"  # its root is the host's next start
    try:
        if stat.S_ISSOCK(Path(path).stat().st_mode):
            return f"{path} (a socket)"
    except (OSError, ValueError):  # the runtime will say so
        return None
    return None


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")
