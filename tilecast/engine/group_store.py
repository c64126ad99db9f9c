"""What a group of ranks talks through: the launcher's key-value store, and how failures are written into it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from tilecast import errors
from tilecast.canonical import canonical_json
from tilecast.errors import AgreementError, TilecastError

logger = logging.getLogger(__name__)


class KeyValueStore(Protocol):
    """The part of torch.distributed's stores that a group uses."""

    def set(self, key: str, value: str | bytes, /) -> None:
        """Set a key."""
        ...

    def get(self, key: str, /) -> bytes:
        """Return a key's value, waiting for the key."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all the keys are set."""
        ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set a key if it is unset and `expected` is empty; return its value."""
        ...

    def delete_key(self, key: str, /) -> bool:
        """Delete a key."""
        ...

    def clone(self) -> Self:
        """Return another connection to the same store."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended the group: the name of an exception class of `errors`, and its message."""

    kind: str
    text: str

    def to_bytes(self) -> bytes:
        """Return it as a store's value."""
        return canonical_json({"kind": self.kind, "text": self.text}).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> Failure:
        """Return what `to_bytes` gave."""
        value = json.loads(data)
        return cls(str(value["kind"]), str(value["text"]))

    def error(self) -> TilecastError:
        """Return the error that every rank raises."""
        kind = getattr(errors, self.kind, TilecastError)
        if not (isinstance(kind, type) and issubclass(kind, TilecastError)):
            kind = TilecastError
        return kind(self.text)


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn a lost connection to the store into an AgreementError."""
    try:
        yield
    except RuntimeError as error:
        # The message is the same on all ranks, so it leaves out torch's own text with its ports.
        raise AgreementError("the ranks' store is gone, so rank 0 or the launcher ended; start all again") from error


@contextmanager
def suppressed() -> Iterator[None]:
    """Ignore failures of the store, and of ranks, where this rank is about to end anyway."""
    try:
        yield
    except (RuntimeError, TilecastError) as error:
        logger.debug("ignored while ending: %s", error)


def first_line(error: BaseException) -> str:
    """Return an error's first line of text, its class's name where it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
