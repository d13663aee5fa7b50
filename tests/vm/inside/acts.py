"""Programs, or how they begin, that several tests here run as agents."""

OPENING = """
import os, sys
for _ in sys.stdin:
    code = 0
    try:
        os.close(os.open(sys.argv[1], os.O_RDONLY))
    except OSError as error:
        code = error.errno
    print(code, flush=True)
"""
"""Opens its argument once for each line that it reads, and prints what it met."""

TRIED = """
import ctypes, errno, os, socket, subprocess, sys
def tried(name, act):
    try:
        act()
    except OSError as error:
        print(name, errno.errorcode[error.errno])
    else:
        print(name, "OK")
"""
"""What a program begins with that prints how each of its acts ended."""
