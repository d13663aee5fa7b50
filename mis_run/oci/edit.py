"""The engine's configuration with ours in it: what a guarded container differs in. Pure but for
looking up which hidden and protected paths exist.

Only ever stricter: lists grow, limits fall, and what the engine set and we do not know stays.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from mis_run import bundle, host_sockets, masks
from mis_run.dataclass import dataclass
from mis_run.hints import Any
from mis_run.model import Limits, NetMode, Plan
from mis_run.oci import seccomp_merge
from mis_run.oci.spec import Spec

RESOLV_CONF = "/etc/resolv.conf"
HOOK = "mis-oci-hook"
SWAP = (
    Path("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"),
    Path("/sys/fs/cgroup/cgroup.controllers"),
)
"""One of them is there when the kernel accounts swap: v1 with it, or v2."""


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What the supervisor made and the configuration has to name."""

    listener: Path  # where the OCI runtime sends seccomp-notify descriptors
    resolv_conf: Path | None  # the container's, when it asks our resolver
    info: Path  # what the container is told about itself
    sealed: bool  # memory files will not be executable
    swap: bool  # whether the kernel accounts swap for a cgroup


def apply(spec: Spec, plan: Plan, inside: Inside) -> dict[str, Any]:
    """The configuration to hand to the OCI runtime. Raises UsageError for an unmergeable filter."""
    data: dict[str, Any] = copy.deepcopy(dict(spec.data))
    data.setdefault("process", {})["noNewPrivileges"] = True
    linux = data.setdefault("linux", {})
    filter_ = seccomp_merge.merge(
        spec.at("linux.seccomp"), enforce=plan.profile.enforce, sealed=inside.sealed
    )
    linux["seccomp"] = {**filter_, "listenerPath": str(inside.listener)}
    linux["resources"] = limited(linux.get("resources") or {}, plan.limits, swap=inside.swap)
    mounts = list(data.get("mounts") or [])
    if inside.resolv_conf is not None:
        mounts = [mount for mount in mounts if mount.get("destination") != RESOLV_CONF]
        mounts.append(bundle.bound(inside.resolv_conf, RESOLV_CONF, "ro", "rprivate", folder=False))
    mounts.append(bundle.bound(inside.info, bundle.INFO, "ro", "rprivate"))
    pins, readonly = _protected(plan, mounts)
    data["mounts"] = [*mounts, *pins]
    if data.get("hooks"):
        data["hooks"] = without_our_hook(data["hooks"])
    linux["maskedPaths"] = _union(
        linux.get("maskedPaths"),
        [*bundle.MASKED_PATHS, *bundle.MASKED_FROM_ROOT, *_hidden(spec, plan)],
    )
    linux["readonlyPaths"] = _union(linux.get("readonlyPaths"), [*bundle.READONLY_PATHS, *readonly])
    return data


def without_our_hook(hooks: Mapping[str, Any]) -> dict[str, Any]:
    """The hooks of each stage without `hook`'s: the runtime guards more than that could.

    What is malformed stays as it is, for the OCI runtime to refuse.
    """

    def ours(one: Any) -> bool:
        return isinstance(one, dict) and PurePosixPath(str(one.get("path"))).name == HOOK

    return {
        stage: [one for one in found if not ours(one)] if isinstance(found, list) else found
        for stage, found in hooks.items()
    }


def uses_our_resolver(plan: Plan) -> bool:
    """Whether we answer names: wherever there is a guarded network that is not the host's."""
    return plan.network.mode is NetMode.GUARDED


def _union(old: list[str] | None, new: list[str]) -> list[str]:
    return list(dict.fromkeys([*(old or []), *new]))


# ---- limits ---------------------------------------------------------------------------------


def limited(resources: Mapping[str, Any], limits: Limits, *, swap: bool) -> dict[str, Any]:
    """``linux.resources`` with no limit above the profile's; lower ones of the engine stay."""
    found: dict[str, Any] = {**resources}
    if limits.memory is not None:
        memory = dict(found.get("memory") or {})
        memory["limit"] = _lower(memory.get("limit"), limits.memory)
        if limits.swap is not None and swap:
            # "swap" is memory and swap together, and may not be less than the memory limit.
            both = _lower(memory.get("swap"), limits.memory + limits.swap)
            memory["swap"] = max(both, memory["limit"])
        if (reserved := memory.get("reservation")) and reserved > memory["limit"]:
            memory["reservation"] = memory["limit"]
        found["memory"] = memory
    if limits.pids is not None:
        found["pids"] = {"limit": _lower((found.get("pids") or {}).get("limit"), limits.pids)}
    if limits.cpus is not None:
        cpu = dict(found.get("cpu") or {})
        period = cpu.get("period") or bundle.PERIOD
        ours = max(bundle.SHORTEST, int(limits.cpus * period))
        cpu |= {"period": period, "quota": _lower(cpu.get("quota"), ours)}
        found["cpu"] = cpu
    return found


def _lower(given: object, ours: int) -> int:
    """The engine's limit if it is one and lower; 0, -1 and nothing mean "none" to engines."""
    if isinstance(given, int) and 0 < given < ours:
        return given
    return ours


# ---- paths ----------------------------------------------------------------------------------


def _hidden(spec: Spec, plan: Plan) -> list[str]:
    """What the profile's ``files.deny`` names and is there, in the image and in its volumes; and
    sockets of the host's services in volumes."""
    found = {*masks.find_all(str(spec.root), plan.masked)}
    volumes: dict[str, str] = {}
    for mount in spec.at("mounts", []):
        source, target = mount.get("source"), mount.get("destination")
        if _is_bind(mount) and isinstance(source, str) and isinstance(target, str):
            found |= {*masks.inside(source, target, plan.masked)}
            volumes[target] = source
    return sorted(found | {*host_sockets.inside(volumes)} - volumes.keys())


def _protected(plan: Plan, mounts: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(mounts, read-only paths) that keep ``files.protect`` as it is.

    Inside a volume every folder on the way is mounted on itself, so that none can be renamed and
    made anew (`bundle._pinned`); in the image's own layer a read-only path is enough, for what is
    written there is thrown away.
    """
    volumes = {
        str(mount.get("destination")).rstrip("/"): str(mount.get("source"))
        for mount in mounts
        if _is_bind(mount)
    }
    pins: dict[str, dict[str, Any]] = {}
    for path in plan.protected:
        above = [str(parent) for parent in PurePosixPath(path).parents]
        volume = next((parent for parent in above if parent in volumes), None)
        if "*" in path or volume is None:
            continue
        source = Path(volumes[volume] + path.removeprefix(volume))
        top = os.path.realpath(volumes[volume])
        if not source.exists() or os.path.realpath(source) != top + path.removeprefix(volume):
            continue  # a link would lead the mount elsewhere
        for parent in above[: above.index(volume)]:
            pins.setdefault(
                parent,
                bundle.bound(
                    volumes[volume] + parent.removeprefix(volume), parent, "rw", "rprivate"
                ),
            )
        pins[path] = bundle.bound(source, path, "ro", "rprivate", folder=source.is_dir())
    ordered = sorted(pins.values(), key=lambda mount: mount["destination"].count("/"))
    return ordered, [path for path in plan.protected if "*" not in path]


def _is_bind(mount: Mapping[str, Any]) -> bool:
    return mount.get("type") == "bind" or bool({"bind", "rbind"} & {*(mount.get("options") or [])})
