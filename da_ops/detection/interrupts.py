"""Ctrl-C at a moment when it does no harm."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done, and then raises KeyboardInterrupt; a third one does
    not wait.

    An exception in the midst of the block could be lost in a callback of fork, come out of
    torch.save as another error, or leave a queue's reader waiting. Processes that are forked in the
    block ignore Ctrl-C: their parent ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    pressed: list[int] = []
    process = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) == 3 and os.getpid() == process:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
