"""``--image`` → the image's description at once, and its blobs when they are needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from mis_run.dataclass import dataclass
from mis_run.errors import SetupError
from mis_run.host import Caller
from mis_run.images import accounts, blobs, cache, layout, words
from mis_run.images.accounts import Accounts
from mis_run.model import Image, Options


@dataclass(frozen=True)
class Source:
    """An image that was found. ``fetch`` opens its blobs; its argument is a folder for files that
    may be needed on the way."""

    image: Image
    fetch: Callable[[Path], AbstractContextManager[layout.Found]]


def find(text: str) -> Source:
    """The image that ``text`` names. Raises UsageError, NotFound, SetupError."""
    wanted = words.read(text)
    if wanted.kind is words.Kind.ENGINE:
        from mis_run.images import engine

        image = engine.inspect(wanted.name)
        return Source(image, lambda folder: engine.saved(image, folder))

    @contextmanager
    def fetch(_: Path = Path()) -> Iterator[layout.Found]:
        if wanted.kind is words.Kind.LAYOUT:
            yield layout.find(blobs.Folder(wanted.path), wanted.text, wanted.tag)
            return
        with blobs.archive(wanted.path) as archive:
            yield layout.find(archive, wanted.text, wanted.tag)

    with fetch() as found:
        return Source(found.image, fetch)


def prepare(options: Options, called: Caller, *, unpack: bool) -> tuple[Image, Caller]:
    """The image of ``--image`` and the agent's user in it; unpacked unless that is only planned."""
    assert options.image is not None
    source = find(options.image)
    users = unpacked(source) if unpack else cache.accounts(source.image)
    user = accounts.user(source.image, options.user, users, called.user)
    return source.image, Caller(user, called.environ)


def unpacked(source: Source) -> Accounts:
    """Have the whole image in the cache, unpacked; its users. Raises SetupError."""
    image = source.image
    cache.prepare()
    if (known := cache.accounts(image)) is not None:
        cache.touch(image)
        return known
    with cache.filling() as partial:
        if (known := cache.accounts(image)) is not None:  # by another launch, while we waited
            return known
        print(f"mis-run: unpacking image {image.name}", file=sys.stderr)
        with source.fetch(partial) as found:
            if found.image.layers != image.layers:
                raise SetupError(f"image {image.name} changed while it was read", hint="try again")
            return cache.fill(found, partial)
