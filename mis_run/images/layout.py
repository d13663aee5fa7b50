"""An image in files: OCI image layout (image-layout.md 1.1), or what `docker save` wrote before it.

Every blob is read only after its digest and size were compared with what names it; layers, which
are read once, while they are unpacked (`layer`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from mis_run.dataclass import dataclass
from mis_run.errors import NotFound, SetupError
from mis_run.hints import Any
from mis_run.images import blobs, config
from mis_run.model import Image

MOST_NESTED = 4  # indexes in indexes
NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")


@dataclass(frozen=True)
class Layer:
    """One layer: ``diff`` is the digest of its tar; of the blob it is in, name, digest and size in
    bytes where those are known."""

    diff: str
    name: str
    digest: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Found:
    """An image and where its layers are, lowest first."""

    image: Image
    layers: tuple[Layer, ...]
    blobs: blobs.Blobs


def find(source: blobs.Blobs, name: str, tag: str) -> Found:
    """The image called ``tag`` (any, where there is only one). Raises SetupError, NotFound."""
    reader = _Reader(source, name)
    there = source.names()
    if "index.json" in there:
        return reader.image(reader.chosen(reader.document("index.json"), tag))
    if "manifest.json" in there:
        return reader.saved(tag)
    raise SetupError(
        f"{source.where}: no image is here: neither index.json nor manifest.json",
        hint="an OCI layout comes from: skopeo copy … oci:FOLDER, buildah push … oci:FOLDER, or "
        "docker save -o FILE NAME for --image archive:FILE",
    )


class _Reader:
    def __init__(self, source: blobs.Blobs, name: str) -> None:
        self._blobs, self._name = source, name

    def _wrong(self, what: str) -> SetupError:
        return SetupError(f"{self._blobs.where}: broken image: {what}")

    def document(self, name: str) -> dict[str, Any]:
        """A file that is one JSON object."""
        return self._dict(self._json(name, blobs.text(self._blobs, name)), name)

    def _json(self, name: str, text: bytes) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"{name} is not JSON ({error!s:.60})") from None

    def _dict(self, value: object, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(f"{name} is no object")
        return value

    def _blob(self, descriptor: object, what: str) -> tuple[str, str, int]:
        """Name, digest and size of the blob that a descriptor names."""
        found = self._dict(descriptor, what)
        digest, size = found.get("digest"), found.get("size")
        if not isinstance(digest, str) or not config.DIGEST.fullmatch(digest):
            raise self._wrong(f"{what} has the digest {digest!r:.90}; only sha256 is known")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise self._wrong(f"{what} has the size {size!r:.40}")
        return f"blobs/sha256/{digest.partition(':')[2]}", digest, size

    def _verified(self, descriptor: object, what: str) -> tuple[str, dict[str, Any]]:
        """The digest of a small blob, and the object that it is."""
        name, digest, size = self._blob(descriptor, what)
        if size > blobs.MOST_TEXT:
            raise self._wrong(f"{what} has {size} bytes")
        text = blobs.text(self._blobs, name)
        if len(text) != size or f"sha256:{hashlib.sha256(text).hexdigest()}" != digest:
            raise self._wrong(f"{what} is not what its digest says ({digest})")
        return digest, self._dict(self._json(what, text), what)

    def chosen(self, index: dict[str, Any], tag: str) -> dict[str, Any]:
        """The descriptor of the manifest for this tag and this machine."""
        there = [self._dict(one, "an entry of the index") for one in _list(index, "manifests")]
        if tag:
            tagged = [one for one in there if tag in _names(one)]
            if not tagged:
                known = ", ".join(sorted({name for one in there for name in _names(one)}))
                raise NotFound(
                    f"{self._blobs.where}: no image is called {tag!r}",
                    hint=f"there are: {known:.300}" if known else "leave the tag out: none has one",
                )
            there = tagged
        for _ in range(MOST_NESTED):
            ours = [one for one in there if config.platform(one)]
            if there and not ours:
                raise config.elsewhere(self._name, [one["platform"] for one in there])
            there = ours
            if len({json.dumps(one.get("digest")) for one in there}) > 1:
                several = sorted({name for one in there for name in _names(one)})
                raise NotFound(
                    f"{self._blobs.where}: several images are here",
                    hint=f"name one: {self._name}:TAG, with a TAG of {', '.join(several):.300}",
                )
            if not there:
                raise NotFound(f"{self._blobs.where}: the index names no image")
            kind = str(there[0].get("mediaType"))
            if "index" not in kind and "manifest.list" not in kind:
                return there[0]
            _, inner = self._verified(there[0], "an index")
            there = [self._dict(one, "an entry of the index") for one in _list(inner, "manifests")]
        raise self._wrong(f"more than {MOST_NESTED} indexes in each other")

    def image(self, descriptor: dict[str, Any]) -> Found:
        """The image of a manifest."""
        _, manifest = self._verified(descriptor, "the manifest")
        digest, data = self._verified(manifest.get("config"), "the configuration")
        image = config.image(self._name, digest, data)
        there = [self._blob(one, "a layer") for one in _list(manifest, "layers")]
        if len(there) != len(image.layers):
            raise self._wrong(f"{len(there)} layers, and digests of {len(image.layers)}")
        layers = (Layer(diff, *blob) for diff, blob in zip(image.layers, there, strict=True))
        return Found(image, tuple(layers), self._blobs)

    def saved(self, tag: str) -> Found:
        """The image of an archive of `docker save` before Docker 25, or of podman."""
        data = self._json("manifest.json", blobs.text(self._blobs, "manifest.json"))
        if not isinstance(data, list):
            raise self._wrong("manifest.json is no list")
        there = [self._dict(one, "an entry of manifest.json") for one in data]
        named = [one for one in there if tag in _tags(one)] if tag else there
        if len(named) != 1:
            tags = ", ".join(sorted({name for one in there for name in _tags(one)}))
            what = f"no image is called {tag!r}" if tag else f"{len(there)} images are here"
            raise NotFound(f"{self._blobs.where}: {what}", hint=f"there are: {tags:.300}")
        where, files = named[0].get("Config"), named[0].get("Layers")
        if not isinstance(where, str) or not isinstance(files, list):
            raise self._wrong("manifest.json names no configuration or no layers")
        text = blobs.text(self._blobs, where)
        digest = hashlib.sha256(text).hexdigest()
        if digest not in where:  # such files are named after their content
            raise self._wrong("the configuration is not what its name says")
        image = config.image(self._name, f"sha256:{digest}", self._json(where, text))
        if len(files) != len(image.layers) or not all(isinstance(one, str) for one in files):
            raise self._wrong(f"{len(files)} layers, and digests of {len(image.layers)}")
        pairs = zip(image.layers, files, strict=True)
        return Found(image, tuple(Layer(diff, name) for diff, name in pairs), self._blobs)


def _list(data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    return value if isinstance(value, list) else []


def _names(descriptor: dict[str, Any]) -> Iterator[str]:
    notes = descriptor.get("annotations")
    if isinstance(notes, dict):
        yield from (name for key in NAMES if isinstance(name := notes.get(key), str))


def _tags(entry: dict[str, Any]) -> list[str]:
    """``a/b:1`` is also just ``1``."""
    tags = [tag for tag in _list(entry, "RepoTags") if isinstance(tag, str)]
    return [*tags, *(tag.rpartition(":")[2] for tag in tags)]
