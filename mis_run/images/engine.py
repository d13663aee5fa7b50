"""A local engine's images, by the docker SDK: described, and saved when a layer is missing.

``DOCKER_HOST`` is honoured, so podman's socket will do.  Nothing is ever pulled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mis_run.errors import NotFound, SetupError
from mis_run.hints import Any
from mis_run.images import blobs, config, layout
from mis_run.images.unpack import MOST_BYTES, RESERVE
from mis_run.model import Image

TIMEOUT = 120.0  # seconds that an engine may think before it answers or sends on


def inspect(name: str) -> Image:
    """The image as the engine describes it. Raises NotFound, SetupError."""
    with _client() as client, _told(name):
        facts = client.inspect_image(name)
    data = {
        "os": facts.get("Os"),
        "architecture": facts.get("Architecture"),
        "rootfs": {"diff_ids": (facts.get("RootFS") or {}).get("Layers")},
        "config": facts.get("Config"),
    }
    return config.image(name, str(facts.get("Id")), data)


@contextmanager
def saved(image: Image, folder: Path) -> Iterator[layout.Found]:
    """The image as the engine saves it, in a file of ``folder``."""
    path, size = folder / "saved.tar", 0
    with _client() as client, _told(image.name), path.open("wb") as file:
        # By id: the name may lead to another image by now.
        for block in client.get_image(image.digest):
            size += len(block)
            disk = os.fstatvfs(file.fileno())
            if size > MOST_BYTES or disk.f_bavail * disk.f_frsize < RESERVE + len(block):
                raise SetupError(
                    f"image {image.name} is too big: {size} bytes so far, "
                    f"{disk.f_bavail * disk.f_frsize} are free in {folder}",
                    hint="mis image prune; or MIS_CACHE=FOLDER on a larger disk",
                )
            file.write(block)
    with blobs.archive(path) as archive:
        yield layout.find(archive, image.name, "")


@contextmanager
def _client() -> Iterator[Any]:
    """A connection to the engine. Raises SetupError."""
    try:
        import docker  # late: 150 ms, and most launches use no image
    except ImportError as error:
        raise SetupError(
            f"the docker SDK is not installed here: {error}",
            hint="pip install docker; without an engine: --image oci:FOLDER",
        ) from error
    try:
        client = docker.APIClient(timeout=TIMEOUT, version="auto", **docker.utils.kwargs_from_env())
    except (docker.errors.DockerException, OSError) as error:
        raise _unreachable(error) from error
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _told(name: str) -> Iterator[None]:
    """The engine's refusals as ours."""
    import docker.errors
    import requests

    try:
        yield
    except docker.errors.ImageNotFound as error:
        raise NotFound(
            f"image {name}: the engine does not have it",
            hint=f"docker pull {name}, or docker images",
        ) from error
    except docker.errors.APIError as error:
        raise SetupError(f"image {name}: {error.explanation or error!s:.300}") from error
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise _unreachable(error) from error


def _unreachable(error: BaseException) -> SetupError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FileNotFoundError | ConnectionError):
        cause = cause.__cause__ or cause.__context__
    reason = getattr(cause, "strerror", None) or f"{error!s:.200}"
    return SetupError(
        f"no engine answers: {reason}",
        hint="start one (systemctl start docker), name it (DOCKER_HOST=unix:///PATH), or use an "
        "image that needs none: --image oci:FOLDER",
    )
