"""The process in which a sandboxed measurer runs; `sandbox.py` starts it and feeds it one call at a time."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch


class _Forward(logging.Handler):
    """Sends log records to the parent, between the answers."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection
        self._owner = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; one of another thread would come between the parts of an answer."""
        if threading.get_ident() == self._owner:
            self._connection.send(("log", record.name, record.levelno, record.getMessage()))


def _end_with_parent() -> None:
    """End this process and its children when standard input does: the parent holds its other end."""
    while os.read(0, 1 << 10):
        pass
    os.killpg(0, signal.SIGKILL)


def _error(error: Exception) -> tuple[str, str, str, bool]:
    return "error", type(error).__name__, str(error), isinstance(error, MemoryError)


def serve(connection: Connection) -> None:
    """Make the measurer and answer calls until the connection ends."""
    start: dict[str, Any] = connection.recv()
    logging.getLogger().addHandler(_Forward(connection))
    try:
        torch.set_num_threads(start["threads"])
        if start["device"] is not None:
            torch.cuda.set_device(start["device"])
        measurer = pickle.loads(start["factory"])()
    except Exception as error:  # The parent raises it under the same name.
        connection.send(_error(error))
        return
    connection.send(("ok", None))
    while True:
        try:
            method, arguments, keywords = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, ...] = ("ok", getattr(measurer, method)(*arguments, **keywords))
        except Exception as error:  # Whatever a kernel raises is evidence about it, for the parent to judge.
            answer = _error(error)
        connection.send(answer)


def main(handle: int) -> None:
    """Serve on an inherited socket."""
    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Connection(handle) as connection:
        serve(connection)


if __name__ == "__main__":
    main(int(sys.argv[1]))
