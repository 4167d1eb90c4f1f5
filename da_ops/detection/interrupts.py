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

    Raised in the midst of it, it would be lost in a callback of fork, come out of torch.save as
    another error, or leave a queue's reader waiting. Processes that are forked in the block do not
    heed Ctrl-C at all: they are their parent's to end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where Python delivers no signals, and lets none be handled
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
