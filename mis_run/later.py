"""One function in a thread of its own, its result fetched later: what waits for the kernel or for
another process costs nothing while we do something else (ctypes and waiting release the GIL)."""

from __future__ import annotations

import _thread  # `threading` would have us wait until the thread has begun
from collections.abc import Callable

from mis_run.hints import Generic, TypeVar

T = TypeVar("T")


class Later(Generic[T]):
    """Starts at once; `result` waits and raises what the function raised."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._running = _thread.allocate_lock()
        self._running.acquire()
        _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            self._error = error
        finally:
            self._running.release()

    def wait(self) -> None:
        """Wait without raising, before undoing what the function did."""
        with self._running:
            return

    def result(self) -> T:
        """What the function returned, once it has."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result[0]
