"""Ranks inside torch.distributed's own collectives, where nobody polls the group: a thread does it for them.

A collective of gloo or NCCL that waits for a rank which failed elsewhere waits until its timeout. While a block is
watched, a thread looks for failures and silence of the others; the block then ends with the shared error as soon as
its collective breaks, and where it does not break, `on_stuck` is told.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tilecast.engine.group import Group
from tilecast.errors import AgreementError, TilecastError

POLL_S = 0.5
GRACE_S = 5.0
"""How long a rank may stay in its collective after another has failed, before it counts as stuck."""

STUCK_EXIT_CODE = 5
"""What the command line ends with where ranks do not agree."""

LOST_S = 15.0
"""How long a rank whose connection broke waits to hear from the group what happened to the other one."""

CONNECTION_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "process group")


@contextmanager
def together(group: Group, on_stuck: Callable[[TilecastError], None] | None = None) -> Iterator[None]:
    """Run a block that uses torch.distributed's collectives, so that any rank's error or death ends it on all.

    Raises the shared error. `on_stuck` is called, on a thread, with that error where the block has not ended within
    GRACE_S seconds of it; by default it is `end_process`.
    """
    if group.world_size == 1:
        yield
        return
    ended = threading.Event()
    told = on_stuck or end_process
    watcher = threading.Thread(target=_watch, args=(group, ended, told), name="tilecast-watch", daemon=True)
    watcher.start()
    try:
        with group.guard():
            try:
                yield
            except TilecastError:
                raise
            except RuntimeError as error:
                if is_connection_error(error):
                    _hear_who_was_lost(group)
                raise
    finally:
        ended.set()
        watcher.join(2 * POLL_S)


def is_connection_error(error: BaseException) -> bool:
    """Whether an error says that a collective lost another rank."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION_WORDS)


def _hear_who_was_lost(group: Group) -> None:
    """Raise what the group knows of a lost rank, once it does; AgreementError when it does not learn of it."""
    deadline = time.monotonic() + LOST_S
    while time.monotonic() < deadline:
        group.check()
        time.sleep(0.05)
    raise AgreementError("the connection between ranks broke, so one ended; start all ranks again")


def end_process(error: TilecastError) -> None:
    """End this process with STUCK_EXIT_CODE, as NCCL's watchdog does with one whose collective cannot end.

    Nothing interrupts a thread inside a collective of gloo: it would wait for the rank that failed until its timeout.
    """
    sys.stderr.write(f"tilecast: stuck in a collective after another rank failed, so this one ends: {error}\n")
    sys.stderr.flush()
    os._exit(STUCK_EXIT_CODE)


def _watch(group: Group, ended: threading.Event, on_stuck: Callable[[TilecastError], None]) -> None:
    while not ended.wait(POLL_S):
        try:
            group.check()
        except TilecastError as error:
            if not ended.wait(GRACE_S):
                on_stuck(error)
            return
