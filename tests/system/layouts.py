"""Images as files, made by hand: OCI layouts and archives, good ones and bad ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mis_run.images import config

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def entry(name: str, data: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One member; ``facts`` are TarInfo's attributes."""
    member = tarfile.TarInfo(name)
    member.mode = 0o755 if facts.get("type") == tarfile.DIRTYPE else 0o644
    for key, value in facts.items():
        setattr(member, key, value)
    if "size" not in facts:
        member.size = len(data)
    return member, data


def folder(name: str, **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.DIRTYPE, **facts)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hardlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def tar_of(root: Path) -> bytes:
    """A folder as a layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(root, arcname=".")
    return out.getvalue()


class Layout:
    """An OCI layout in a folder; its attributes may be changed before `write`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes, kind: str = "") -> dict[str, Any]:
        """Store a blob; its descriptor."""
        digest = sha(data)
        (self.path / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    def object(self, data: Any, kind: str = "") -> dict[str, Any]:
        return self.blob(json.dumps(data).encode(), kind)

    def add(
        self,
        layers: Iterable[bytes],
        settings: Mapping[str, Any] | None = None,
        *,
        tag: str = "",
        arch: str = "",
        compress: bool = True,
    ) -> dict[str, Any]:
        """An image of these tars, in the index; its descriptor."""
        tars = list(layers)
        data = {
            "os": "linux",
            "architecture": arch or config.machine(),
            "config": dict(settings or {}),
            "rootfs": {"type": "layers", "diff_ids": [sha(one) for one in tars]},
        }
        found = [
            self.blob(gzip.compress(one, mtime=0), f"{LAYER}+gzip")
            if compress
            else self.blob(one, LAYER)
            for one in tars
        ]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": found}
        manifest["config"] = self.object(data, "application/vnd.oci.image.config.v1+json")
        descriptor = self.object(manifest, MANIFEST)
        descriptor["platform"] = {"os": "linux", "architecture": data["architecture"]}
        if tag:
            descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
        self.manifests.append(descriptor)
        self.write()
        return descriptor

    def write(self) -> None:
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.manifests}
        (self.path / "index.json").write_text(json.dumps(index))

    def archive(self, path: Path) -> Path:
        """The same in one tar."""
        path.write_bytes(tar_of(self.path))
        return path

    def saved(self, path: Path, name: str) -> Path:
        """The first image as `docker save` wrote it before Docker 25 (and still loads)."""
        manifest = json.loads(self.read(self.manifests[0]))
        settings = self.read(manifest["config"])
        members = []
        files = []
        for number, one in enumerate(manifest["layers"]):
            data = self.read(one)
            files.append(f"{number}/layer.tar")
            members.append(entry(files[-1], gzip.decompress(data) if data[:1] == b"\x1f" else data))
        config_name = f"{sha(settings).removeprefix('sha256:')}.json"
        listed = [{"Config": config_name, "RepoTags": [name], "Layers": files}]
        members += [
            entry(config_name, settings),
            entry("manifest.json", json.dumps(listed).encode()),
        ]
        path.write_bytes(tar(members))
        return path

    def read(self, descriptor: Mapping[str, Any]) -> bytes:
        """A blob's bytes."""
        return (
            self.path / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")
        ).read_bytes()
