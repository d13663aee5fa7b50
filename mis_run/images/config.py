"""An image's configuration as `Image`: checked to the last value, since its maker may be hostile.

Pure.  Fields: OCI image specification 1.1 (config.md), which Docker's own have too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from mis_run.errors import SetupError
from mis_run.hints import Any
from mis_run.model import Image

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MOST_LAYERS = 127  # Docker's own limit; one mount(2) takes a page of options
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
"""Machine names of uname(2) by their names in images (Go's), where they differ."""


def machine() -> str:
    """This machine's architecture as images name it."""
    name = os.uname().machine
    return ARCHITECTURES.get(name, name)


def image(name: str, digest: str, data: object) -> Image:
    """``data`` is the configuration of the image that the user called ``name``; ``digest`` its own.

    Raises SetupError for one that is malformed or for another machine.
    """

    def wrong(what: str) -> SetupError:
        return SetupError(f"image {name}: its configuration is broken: {what}")

    if not isinstance(data, dict):
        raise wrong("not an object")
    system, arch = data.get("os", "linux"), data.get("architecture", "")
    if (system, arch) != ("linux", machine()):
        raise elsewhere(name, [{"os": system, "architecture": arch}])
    rootfs = data.get("rootfs")
    layers: Any = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not _texts(layers) or not all(DIGEST.fullmatch(layer) for layer in layers):
        raise wrong("rootfs.diff_ids is no list of sha256 digests")
    if not 0 < len(layers) <= MOST_LAYERS:
        raise wrong(f"{len(layers)} layers (from 1 to {MOST_LAYERS} are possible)")
    inner = {} if data.get("config") is None else data["config"]
    if not isinstance(inner, dict):
        raise wrong("config is no object")
    lists: dict[str, tuple[str, ...]] = {}
    for key in ("Env", "Entrypoint", "Cmd"):
        value = inner.get(key) or []
        if not _texts(value):
            raise wrong(f"config.{key} is no list of texts")
        lists[key] = tuple(value)
    words = {key: inner.get(key) or "" for key in ("User", "WorkingDir")}
    for key, value in words.items():
        if not _texts([value]):
            raise wrong(f"config.{key} is no text")
    return Image(
        name=name,
        digest=digest,
        layers=tuple(layers),
        user=words["User"],
        env=tuple(_variable(text, wrong) for text in lists["Env"]),
        entrypoint=lists["Entrypoint"],
        command=lists["Cmd"],
        workdir=_folder(words["WorkingDir"], wrong),
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, str) and "\0" not in t for t in value)


def _variable(text: str, wrong: Any) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not name or not given:
        raise wrong(f"config.Env has {text!r:.80}")
    return name, value


def _folder(text: str, wrong: Any) -> str:
    """Absolute and normal. A link in it is followed by the kernel, inside the container."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise wrong(f"config.WorkingDir is {text!r:.80}")
    return "/" + "/".join(parts)


def elsewhere(name: str, platforms: Sequence[Mapping[str, Any]]) -> SetupError:
    """The error for an image that is for other machines only."""
    found = {f"{one.get('os')!s:.40}/{one.get('architecture')!s:.40}" for one in platforms}
    return SetupError(
        f"image {name} is for {', '.join(sorted(found)[:9])}, this machine is linux/{machine()}",
        hint=f"get the one for this machine: docker pull --platform linux/{machine()} NAME",
    )


def platform(descriptor: Mapping[str, Any]) -> bool:
    """Whether an index's entry is for this machine; one that does not say may be."""
    found = descriptor.get("platform")
    if not isinstance(found, dict):
        return True
    return (found.get("os"), found.get("architecture")) == ("linux", machine())
