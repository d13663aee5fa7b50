"""Who the agent is in an image: ``USER`` of the image or ``--user``, by the image's own passwd.

Pure: the files' texts were read when the image was unpacked (`cache`).  As Docker
reads them, with two differences: root only when somebody asks for it on the command line, or is
root and the image does not say otherwise; and no supplementary groups.
"""

from __future__ import annotations

from mis_run.dataclass import dataclass, replace
from mis_run.errors import UsageError
from mis_run.model import Image, User

MOST_ID = 2**32 - 2
UNKNOWN = -1


@dataclass(frozen=True)
class Accounts:
    """An image's ``/etc/passwd`` and ``/etc/group``; empty where it has none."""

    passwd: str
    group: str


def user(image: Image, asked: str | None, accounts: Accounts | None, caller: User) -> User:
    """The agent's user; ``accounts`` is None while the image is not unpacked.

    ``caller`` is who called mis-run, as `host.caller` says.  Raises UsageError for a user that the
    image does not have.
    """
    spec = asked or image.user
    option = "--user" if asked else f"image {image.name}: USER"
    if spec:
        found = _find(spec, option, accounts)
        if asked or found.uid:
            return found
    # Root of the image would be the host's root for the workspace: docs/decisions/images.md.
    own = _find(f"{caller.uid}:{caller.gid}", option, accounts or Accounts("", ""))
    return replace(own, home=caller.home) if own.home == "/" else own


def _find(spec: str, option: str, accounts: Accounts | None) -> User:
    name, colon, group = spec.partition(":")
    number = _number(name)
    if accounts is None:
        # A number is the one thing that is known without looking.
        known = _number(group) if group else number
        uid, gid = (UNKNOWN if one is None else one for one in (number, known))
        return User(uid, gid, (), name, "/")
    entry = _entry(accounts.passwd, name, number, 7)
    if entry is None and number is None:
        raise UsageError(
            f"{option} {spec!r:.80}: the image has no such user",
            hint="use a number: --user UID:GID",
        )
    own, main, home = number, number, "/"
    if entry is not None:
        name, own, main = entry[0], _number(entry[2]), _number(entry[3])
        home = entry[5] if entry[5].startswith("/") else "/"
    if colon:
        main = _number(group)
        if main is None and (line := _entry(accounts.group, group, None, 4)):
            main = _number(line[2])
    if own is None or main is None:
        raise UsageError(f"{option} {spec!r:.80}: no such user or group in the image")
    return User(own, main, (), name, home)


def _entry(text: str, name: str, number: int | None, fields: int) -> list[str] | None:
    """The first line of passwd(5) or group(5) for a name or, where given, a number."""
    for line in text.splitlines():
        parts = line.split(":")
        if len(parts) < fields or "\0" in line:
            continue
        if parts[0] == name or (number is not None and _number(parts[2]) == number):
            return parts
    return None


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) > MOST_ID:
        return None
    return int(text)
