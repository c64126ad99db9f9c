"""What is kept once under its digest, as its canonical JSON: environments, layers and configs; and names in rows.

What does not fit raises InputError (or CacheError) that names the entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, cast

from tilecast.canonical import digest_of_text
from tilecast.errors import CacheError, InputError

NAME_LIMIT = 256
"""Characters of a routing profile's or numerics class's name."""


class Keyed(Protocol):
    """What is kept as its canonical JSON under its digest: environments, layers and configs."""

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        ...

    @property
    def canonical(self) -> str:
        """The canonical JSON form."""
        ...


T = TypeVar("T", bound=Keyed)


class Lookup(dict[str, T], Generic[T]):
    """Entries by digest, parsed and checked when first asked for, so that equal digests share one object."""

    def __init__(self, what: str, parse: Callable[[object], T], rows: Iterable[tuple[object, object]]) -> None:
        """Keep rows of `digest` and `fields`; `what` names the entries in messages."""
        super().__init__()
        self._what = what
        self._parse = parse
        self._texts: dict[object, object] = dict(rows)

    def unknown(self, digests: Iterable[object]) -> set[object]:
        """Return those digests that there is no entry of."""
        return set(digests) - self._texts.keys()

    def learn(self, other: Lookup[T]) -> None:
        """Take another's entries in; those parsed already are kept, since their digests say what they are."""
        self._texts |= other._texts

    def __missing__(self, digest: str) -> T:
        """Parse an entry; raises CacheError when it is absent, not canonical or not what its digest says."""
        if digest not in self._texts:
            raise CacheError(f"{self._what} {digest[:12]!r} is referred to but absent")
        found = self[digest] = self._checked(digest, self._texts[digest])
        return found

    def texts_of(self, digests: Iterable[str]) -> dict[str, str]:
        """Return entries' texts as they are, not looked into; raises CacheError for one that is absent."""
        found = {}
        for digest in set(digests):
            text = self._texts.get(digest)
            if not isinstance(text, str):
                raise CacheError(f"{self._what} {digest[:12]!r} is referred to but absent")
            if not text.isascii():
                raise CacheError(f"{self._what} {digest[:12]!r}: its fields are not canonical JSON")
            found[digest] = text
        return found

    def all(self) -> list[T]:
        """Return every entry, ordered by digest; raises CacheError."""
        if not all(isinstance(digest, str) for digest in self._texts):
            raise CacheError(f"{self._what}: a digest is not text")
        return [self[digest] for digest in sorted(cast(Iterable[str], self._texts))]

    def _checked(self, digest: str, text: object) -> T:
        try:
            entry = self._parse(parsed_json(text))
        except InputError as error:
            raise CacheError(f"{self._what} {digest[:12]!r}: {error}") from error
        if entry.canonical != text:
            raise CacheError(f"{self._what} {digest[:12]!r}: its fields are not canonical JSON")
        found = digest_of_text(entry.canonical)
        if found != digest:
            raise CacheError(f"{self._what} {digest[:12]!r}: its fields have digest {found[:12]}")
        vars(entry)["digest"] = digest  # Where the entry itself would keep it.
        return entry


Column = Sequence[Any]
"""The values of one column, of many rows."""


def all_of(kind: type, *columns: Column) -> bool:
    """Whether all values of columns, which are not empty, are of one type and no other that it includes."""
    return all(set(map(type, column)) == {kind} for column in columns)


def keyed_row(entry: Keyed) -> dict[str, Any]:
    """Return the row of an environment, layer or config."""
    return {"digest": entry.digest, "fields": entry.canonical}


def check_names(**names: str) -> None:
    """Raise CacheError for a name that no store can hold."""
    for what, name in names.items():
        if not name_fits(name):
            raise CacheError(f"{what} is {name[:40]!r}, expected at most {NAME_LIMIT} characters of plain text")


@lru_cache(maxsize=4096)
def name_fits(name: str) -> bool:
    """Whether every store can hold a name."""
    return "\0" not in name and len(name) <= NAME_LIMIT and has_utf8(name)


def has_utf8(text: str) -> bool:
    """Whether a text has a UTF-8 form; lone surrogates have none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parsed_json(text: object) -> object:
    """Return what a stored JSON text says. Raises CacheError."""
    if not isinstance(text, str):
        raise CacheError(f"expected JSON text, got {type(text).__name__}")
    try:
        value, end = DECODER.raw_decode(text)
        # White space may follow, which is rare; what else may not, this says.
        return value if end == len(text) else DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"not JSON: {error}") from error


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not a number here")


DECODER = json.JSONDecoder(parse_constant=_refuse)
"""Made once: `json.loads` makes one a call, which takes longer than parsing a config."""
