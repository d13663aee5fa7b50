"""Who a thread is: facts of /proc for events. Best effort, since it may have ended meanwhile."""

from __future__ import annotations


def who(thread: int) -> tuple[int, str]:
    """(process id, command name) of a thread; the number itself and ``""`` when it is gone."""
    process, comm = thread, ""
    if thread == 0:
        return 0, ""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            head = file.read(512)
    except OSError:
        return thread, ""
    for line in head.splitlines():
        key, _, value = line.partition(b":\t")
        if key == b"Name":
            comm = value.decode("utf-8", "backslashreplace")
        elif key == b"Tgid" and value.strip().isdigit():
            process = int(value)
    return process, comm
