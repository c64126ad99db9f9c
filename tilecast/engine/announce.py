"""One line about a start, which programs that configured no logging get to see, too."""

from __future__ import annotations

import logging


def announce(logger: logging.Logger, message: str, *args: object) -> None:
    """Log `message` at INFO; in a program without any logging, write it to standard error as warnings are.

    A program that gave `tilecast`'s loggers a level or a handler, or the root one a handler, decides for itself.
    """
    if logger.hasHandlers() or _leveled(logger):
        logger.info(message, *args)
        return
    if logger.manager.disable >= logging.INFO:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("tilecast: %(message)s"))
    handler.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, message, args, None))


def _leveled(logger: logging.Logger) -> bool:
    found: logging.Logger | None = logger
    while found is not None and found is not logging.root:
        if found.level != logging.NOTSET:
            return True
        found = found.parent
    return False
