"""What other threads want done in the thread that runs the passes, or in one that is gone when it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from tailor.errors import TailorError

T = TypeVar("T")


class Orders:
    """Orders in a row, for one thread that takes them; None among them is the last."""

    def __init__(self) -> None:
        self.closed = False
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._gate = threading.Lock()

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._queue.empty()

    def take(self) -> Callable[[], None] | None:
        """The next one, waited for."""
        return self._queue.get()

    def put(self, order: Callable[[], None] | None) -> None:
        """Have something done that nobody waits for; None: the end."""
        self._queue.put(order)

    def ask(self, order: Callable[[], T]) -> Future[T]:
        """Have something done, and its result told. Raises TailorError when nobody takes orders any more."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                _fulfil(future, order)

        with self._gate:
            if self.closed:
                raise closing()
            self._queue.put(run)
        return future

    def close(self) -> None:
        """Take no more."""
        with self._gate:
            self.closed = True


def in_thread(work: Callable[[], T]) -> T:
    """Run something in a thread that ends with it, and wait for it."""
    future: Future[T] = Future()
    threading.Thread(target=_fulfil, args=(future, work), name="loads", daemon=True).start()
    return future.result()


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def closing() -> TailorError:
    """What requests are told when the service ends."""
    return TailorError("the server is shutting down")
