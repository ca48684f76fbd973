"""The first Ctrl-C (or SIGTERM) asks a run to stop after its step; a second one stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tailor.errors import InterruptedRunError, TerminatedRunError


class StopRequest:
    """`signal` is the number of the signal that came, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def stop_if_asked(self, save: Callable[[], None], message: str, hint: str) -> None:
        """When a signal came, `save` what it takes to resume and raise InterruptedRunError.

        After SIGTERM it is a TerminatedRunError.
        """
        if self.signal is None:
            return
        save()
        kind = TerminatedRunError if self.signal == signal.SIGTERM else InterruptedRunError
        raise kind(message, hint=hint)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block. Outside the main thread nothing can be caught: no request comes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
