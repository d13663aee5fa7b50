"""What the agent of the conformance table does: run by it, inside; no imports of ours.

    python3 conformance_acts.py ROWS.json RESULTS.json SCRATCH

Each row is [name, act, arguments]. A row runs in a child of its own, whose name (prctl) is the
row's, so that the record's events can be told apart. Its result is 0, an errno, or a word.
"""

import ctypes
import errno
import glob
import json
import mmap
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
TEMP = sys.argv[3] if sys.argv[3:] else ""


def call(number, *args):
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *values)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def me():
    with open("/proc/self/comm") as file:
        return file.read().strip()


def spare(suffix=""):
    """A path of this row alone."""
    return f"{TEMP}/{me()}{suffix}"


def ended(pid):
    """Raise what a child met, who told it by its exit code."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        raise OSError(errno.EINTR, f"signal {os.WTERMSIG(status)}")
    if code := os.WEXITSTATUS(status):
        raise OSError(code, os.strerror(code))


def child(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
            code = 0
        except OSError as error:
            code = error.errno
        os._exit(code)
    ended(pid)


# ---- to a file ------------------------------------------------------------------------------


def opened(path, flags=os.O_RDONLY):
    os.close(os.open(path, flags))


def flags(path, *names):
    value = 0
    for name in names:
        value |= getattr(os, name)
    opened(path, value)


def reopened(path):
    fd = os.open(path, os.O_PATH)
    opened(f"/proc/self/fd/{fd}")


def soft(path):
    os.symlink(path, spare())
    opened(spare())


def chain(path):
    os.symlink(path, spare("1"))
    os.symlink(spare("1"), spare("2"))
    opened(spare("2"))


def by_folder(path):
    folder, name = os.path.split(path)
    fd = os.open(folder, os.O_PATH)
    os.close(os.open(name, os.O_RDONLY, dir_fd=fd))


def openat2(path):
    how = (ctypes.c_uint64 * 3)(0, 0, 0)
    os.close(call(437, -100, os.fsencode(path), ctypes.byref(how), 24))


def spelled(path):
    folder, name = os.path.split(path)
    opened(f"{folder}//./../{os.path.basename(folder)}/{name}")


def rooted(path):
    opened(f"/proc/self/root{path}")


def from_cwd(path):
    os.chdir(os.path.dirname(path))
    opened(f"/proc/self/cwd/{os.path.basename(path)}")


def mapped(path):
    with open(path, "rb") as file:
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ).close()


def threaded(act):
    """Raise here what ``act`` raises in a thread."""
    met = []

    def run():
        try:
            act()
        except OSError as error:
            met.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if met:
        raise met[0]


def in_thread(path):
    threaded(lambda: opened(path))


def in_child(path):
    child(lambda: opened(path))


def in_orphan(path):
    """A double fork into a session of its own."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            try:
                opened(path)
                code = 0
            except OSError as error:
                code = error.errno
            os.write(writer, bytes([code]))
        os._exit(0)
    if code := os.read(reader, 1)[0]:
        raise OSError(code, os.strerror(code))


def by_program(path):
    """Another program reads it, executed under this row's name."""
    os.symlink("/bin/cat", spare())
    pid = os.posix_spawn(spare(), [spare(), path], {}, file_actions=[(os.POSIX_SPAWN_CLOSE, 2),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)])  # fmt: skip
    _, status = os.waitpid(pid, 0)
    if status:
        raise OSError(errno.EPERM, "cat failed")


def handed_over(path):
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        try:
            fd = os.open(path, os.O_RDONLY)
            socket.send_fds(theirs, [b"0"], [fd])
        except OSError as error:
            theirs.send(bytes([error.errno]))
        os._exit(0)
    data, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise OSError(data[0], "not opened")


def after_exec(path):
    """A descriptor to the folder is inherited, the program behind opens below it."""
    folder, name = os.path.split(path)
    fd = os.open(folder, os.O_PATH)
    os.set_inheritable(fd, True)
    child(lambda: os.close(os.open(f"/proc/self/fd/{fd}/{name}", os.O_RDONLY)))


# ---- to a place -----------------------------------------------------------------------------


def truncated(path):
    os.truncate(path, 1)


def mode(path):
    os.chmod(path, 0o640)


def owner(path):
    os.chown(path, os.getuid(), os.getgid())


def times(path):
    os.utime(path, (1e9, 1e9))


def listed(path):
    os.listdir(path)


def facts(path):
    os.stat(path)


def asked(path):
    if not os.access(path, os.R_OK):
        raise OSError(errno.EACCES, "access")


def watched(path):
    fd = libc.inotify_init()
    if libc.inotify_add_watch(fd, os.fsencode(path), 2) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def made(folder):
    opened(f"{folder}/{me()}", os.O_CREAT | os.O_WRONLY)


def made_named(folder, suffix):
    opened(f"{folder}/{me()}{suffix}", os.O_CREAT | os.O_WRONLY)


def folder_made(folder):
    os.mkdir(f"{folder}/{me()}")


def fifo(folder):
    os.mkfifo(f"{folder}/{me()}")


def linked(folder):
    os.symlink("x", f"{folder}/{me()}")


def bound(folder):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{folder}/{me()}")


def device(folder):
    os.mknod(f"{folder}/{me()}", 0o600 | 0o020000, os.makedev(1, 3))


def unlinked(path):
    os.unlink(path)


def folder_removed(path):
    os.rmdir(path)


def renamed(path):
    os.rename(path, f"{path}-{me()}")


def hard_then_read(path, folder):
    os.link(path, f"{folder}/{me()}")
    opened(f"{folder}/{me()}")


def moved_then_read(path, folder):
    os.rename(path, f"{folder}/{me()}")
    opened(f"{folder}/{me()}")


def exchanged_then_read(path, other):
    call(316, -100, os.fsencode(path), -100, os.fsencode(other), 2)
    opened(other)


def moved_into_then_read(path, folder):
    """What is allowed moves to where nothing is."""
    os.rename(path, f"{folder}/{me()}")
    opened(f"{folder}/{me()}")


# ---- races ----------------------------------------------------------------------------------


def raced(flip, paths, rounds):
    """Read ``paths`` while a thread does ``flip``, both ``rounds`` times at least; whether a secret
    was read."""
    stop, over = time.monotonic() + 8, threading.Event()
    seen = {"secret": 0, "open": 0, "refused": 0}
    sys.setswitchinterval(0.0001)  # else one of them may be through before the other begins

    def flips():
        done = 0
        while (done < rounds or sum(seen.values()) < rounds) and time.monotonic() < stop:
            flip()
            done += 1
        over.set()

    thread = threading.Thread(target=flips)
    thread.start()
    while not over.is_set():
        for path in paths:
            try:
                with open(path) as file:
                    seen["secret" if file.read(6) == "SECRET" else "open"] += 1
            except PermissionError:
                seen["refused"] += 1
    thread.join()
    return "leaked" if seen["secret"] else "refused" if seen["refused"] else "never"


def link_race(allowed, denied, rounds):
    """A link that flips between the two."""
    name = spare("race")
    os.symlink(allowed, name)

    def flip():
        for target in (denied, allowed):
            os.symlink(target, f"{name}.next")
            os.rename(f"{name}.next", name)

    return raced(flip, [name], rounds)


def rename_race(allowed, denied, rounds):
    """Two names exchanged again and again."""

    def flip():
        with suppress(OSError):  # where the exchange itself is refused there is no race left
            call(316, -100, os.fsencode(allowed), -100, os.fsencode(denied), 2)

    return raced(flip, [allowed, denied], rounds)


def many(path, count):
    """Children that all try at once; 0 when one got through."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                opened(path)
                os._exit(0)
            except OSError as error:
                os._exit(error.errno)
        pids.append(pid)
    met = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
    if met != {0}:
        raise OSError(max(met), "refused")


# ---- programs -------------------------------------------------------------------------------


def executed(path, *argv):
    child(lambda: os.execv(path, [path, *argv]))


def spawned(path):
    ended(os.posix_spawn(path, [path], {}))


def by_fd(path):
    fd = os.open(path, os.O_PATH)
    pointers = (ctypes.c_char_p * 2)(b"x", None)
    nothing = (ctypes.c_char_p * 1)(None)
    child(lambda: call(322, fd, b"", pointers, nothing, 0x1000))


def by_proc_fd(path):
    fd = os.open(path, os.O_PATH)
    os.set_inheritable(fd, True)
    executed(f"/proc/self/fd/{fd}")


def soft_executed(path):
    os.symlink(path, spare())
    executed(spare())


def hard_executed(path, folder):
    os.link(path, f"{folder}/{me()}")
    executed(f"{folder}/{me()}")


def moved_executed(path, folder):
    os.rename(path, f"{folder}/{me()}")
    executed(f"{folder}/{me()}")


def copy_executed(path, folder):
    shutil.copy(path, f"{folder}/{me()}")
    os.chmod(f"{folder}/{me()}", 0o755)
    executed(f"{folder}/{me()}")


def loaded(path):
    executed(glob.glob("/lib64/ld-*.so*")[0], path)


def interpreted(path, folder):
    script = f"{folder}/{me()}.sh"
    with open(script, "w") as file:
        file.write(f"#!{path}\n")
    os.chmod(script, 0o755)
    executed(script)


def from_memory(path):
    with open(path, "rb") as file:
        data = file.read()
    fd = call(319, b"x", 0)
    os.write(fd, data)
    executed(f"/proc/self/fd/{fd}")


def in_thread_executed(path):
    threaded(lambda: executed(path))


# ---- sockets and calls ----------------------------------------------------------------------


def sock(family, kind, protocol=0):
    socket.socket(family, kind, protocol).close()


def connected(family, kind, address):
    with socket.socket(family, kind) as one:
        one.settimeout(1)
        one.connect((address, 9))


def sent(family, address):
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        one.sendto(b"x", (address, 9))


def listening(family, address, port):
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.bind((address, port))


def abstract():
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        one.bind(f"\0{me()}")
        one.listen()
        two.connect(f"\0{me()}")


def syscall(number, *args):
    buffer = ctypes.create_string_buffer(256)
    call(number, *(buffer if a == "buffer" else a for a in args))


def traced_child():
    pid = os.fork()
    if pid == 0:
        time.sleep(5)
        os._exit(0)
    try:
        call(101, 16, pid, 0, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def signalled(pid):
    os.kill(pid, 0)


def child_signalled():
    pid = os.fork()
    if pid == 0:
        time.sleep(5)
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)


def written(path, text):
    with open(path, "w") as file:
        file.write(text)


# ---- one row after the other ----------------------------------------------------------------


def run(name, act, args):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        libc.prctl(15, name.encode(), 0, 0, 0)
        try:
            result = globals()[act](*args) or 0
        except OSError as error:
            result = error.errno
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(said) if said else f"signal {status & 127}"


def main(rows, results):
    with open(rows) as file:
        todo = json.load(file)
    done = {name: run(name, act, args) for name, act, args in todo}
    with open(results, "w") as file:
        json.dump(done, file)


if __name__ == "__main__":
    main(*sys.argv[1:3])
