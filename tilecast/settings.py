"""The only reader of environment variables, and the grammar of token counts and of TM_GEMM_TUNE."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from tilecast.errors import UsageError
from tilecast.problem import MAX_DIMENSION

T = TypeVar("T")

MISSES = ("default", "error", "tune")
POLICIES = ("reproducible", "fastest")
MAX_TOKEN_COUNTS = 1000
MAX_TOKENS = MAX_DIMENSION

DEFAULT_SEQUENCE = "1,2,4,8-16-8,16-64-16,8192"
"""TurboMind's default sequence, with the decode batches below 8 that it leaves out."""

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")

IGNORED_TUNE_KEYS = ("max_splits", "top_splits", "max_waves", "swizzle", "clusters")
"""Keys of TurboMind's grammar that steer parts of its own kernels; accepted, and without effect here."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What TM_GEMM_TUNE asks for.

    `tokens` are the token counts to tune for. The others are None where the variable does not say: `max_time_ms`
    is the time spent on samples of one candidate (TurboMind's max_time, which counts milliseconds), `top_k` how
    many candidates the cost model lets through to measuring (0: all), `min_iter` and `max_iter` the samples per
    candidate. `ignored` names keys that were given and have no effect.
    """

    tokens: tuple[int, ...]
    max_time_ms: float | None = None
    top_k: int | None = None
    min_iter: int | None = None
    max_iter: int | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What a launcher such as torchrun told this process: its place among the ranks, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The environment variables, parsed.

    `import_from` (a path or SQLAlchemy URL), `export_to` and `record_to` (paths) are None where unset, and so is
    `routing`: a routing profile's name, or a file of recorded counts.
    `sandbox` has candidates measured in a process of their own.
    `cache_dir` holds compiled kernels and the default store; nothing here creates it.
    """

    cache_dir: Path
    import_from: str | None = None
    export_to: str | None = None
    record_to: str | None = None
    tune: TuneSettings | None = None
    miss: str = "default"
    warn_cache_miss: bool = False
    policy: str = "reproducible"
    routing: str | None = None
    sandbox: bool = True

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the process's environment, or the mapping given. An empty value counts as unset.

        Raises UsageError that names the variable, its value and what is expected.
        """
        values = _Variables(os.environ if environ is None else environ)
        return cls(
            import_from=values.get("TM_GEMM_IMPORT"),
            export_to=values.get("TM_GEMM_EXPORT"),
            record_to=values.get("TM_GEMM_RECORD"),
            tune=values.parsed("TM_GEMM_TUNE", parse_tune),
            miss=values.choice("TM_GEMM_MISS", MISSES),
            warn_cache_miss=values.flag("TM_GEMM_WARN_CACHE_MISS"),
            policy=values.choice("TM_GEMM_POLICY", POLICIES),
            routing=values.get("TM_GEMM_ROUTING"),
            sandbox=values.flag("TM_GEMM_SANDBOX", True),
            cache_dir=_cache_dir(values),
        )


def launcher(environ: Mapping[str, str] | None = None) -> Launcher | None:
    """Return what the launcher set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or None without one.

    Raises UsageError when only a part is set or a value is out of range.
    """
    values = _Variables(os.environ if environ is None else environ)
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if values.get("RANK") is None and values.get("WORLD_SIZE") is None:
        return None
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not set while others of {', '.join(names)} are; start with torchrun")
    world_size = values.integer("WORLD_SIZE", 1, 1 << 16)
    rank = values.integer("RANK", 0, world_size - 1)
    return Launcher(
        rank=rank,
        world_size=world_size,
        local_rank=rank if values.get("LOCAL_RANK") is None else values.integer("LOCAL_RANK", 0, world_size - 1),
        master_addr=values.get("MASTER_ADDR") or "",
        master_port=values.integer("MASTER_PORT", 0, 65535),
    )


def lock_dir(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return TILECAST_LOCK_DIR, where tunings of a device wait for each other; None where unset.

    Raises UsageError where that is no folder.
    """
    chosen = _Variables(os.environ if environ is None else environ).get("TILECAST_LOCK_DIR")
    if chosen is None:
        return None
    folder = Path(chosen)
    if not folder.is_dir():
        raise UsageError(f"TILECAST_LOCK_DIR is {chosen!r:.200}, expected a folder that exists")
    return folder


def child_environment(changes: Mapping[str, str], without: Collection[str] = ()) -> dict[str, str]:
    """Return this process's environment with some variables changed or left out, for a process that it starts."""
    return {**{name: value for name, value in os.environ.items() if name not in without}, **changes}


def parse_tokens(text: str) -> tuple[int, ...]:
    """Return the ascending token counts of a sequence such as `8-16-8,16-64-16,8192`.

    A plain number is one count. An item `start-next-step` counts from start by step, and each time it lands on
    next, step and next double; it ends before the following item's start. The last item is a plain number, the
    maximum, and included. Items ascend. At most 1000 counts of at most 16777216. Raises UsageError.
    """
    return _generate(_items(text), text)


def parse_tune(text: str) -> TuneSettings | None:
    """Return what a value of TM_GEMM_TUNE asks for; None for `0`, `false`, `no` and `off`.

    `1`, `true`, `yes` and `on` give the defaults; otherwise `key=value` pairs joined by commas, lists in
    brackets: `seq=[8-16-8,16-64-16,8192],max_time=1,top_k=8`. A sequence of one number, and a lone number of
    at least 2, replaces the maximum of the default sequence. Raises UsageError.
    """
    word = text.strip().lower()
    if word in FALSE:
        return None
    if word in TRUE:
        return TuneSettings(tokens=DEFAULT_TOKENS)
    if word.isdigit():
        return TuneSettings(tokens=_default_up_to(word, text))
    given = _pairs(text)
    sequence = given.get("seq")
    return TuneSettings(
        tokens=DEFAULT_TOKENS if sequence is None else _sequence(sequence, text),
        max_time_ms=_optional(given, "max_time", _positive_float),
        top_k=_optional(given, "top_k", lambda key, value: _integer(key, value, 0, 1 << 20)),
        min_iter=_optional(given, "min_iter", lambda key, value: _integer(key, value, 1, 1 << 20)),
        max_iter=_optional(given, "max_iter", lambda key, value: _integer(key, value, 1, 1 << 20)),
        ignored=tuple(key for key in IGNORED_TUNE_KEYS if key in given),
    )


def _items(text: str) -> list[tuple[int, int, int]]:
    """Return (start, next, step) per item, (number, 0, 0) for a plain number; checks each and their order."""
    items: list[tuple[int, int, int]] = []
    for part in text.split(","):
        pieces = part.strip().split("-")
        if len(pieces) not in (1, 3):
            raise UsageError(f"token counts {text!r:.200}: {part!r:.40} is neither a number nor start-next-step")
        numbers = [_count(piece, part, text) for piece in pieces]
        start, following, step = numbers if len(numbers) == 3 else (numbers[0], 0, 0)
        if following and following < start:
            raise UsageError(
                f"token counts {text!r:.200}: in {part!r:.40} next is {following}, expected at least the start"
            )
        if items and start <= items[-1][0]:
            raise UsageError(
                f"token counts {text!r:.200}: {part!r:.40} does not start above {items[-1][0]}, items must ascend"
            )
        items.append((start, following, step))
    if items[-1][1]:
        raise UsageError(
            f"token counts {text!r:.200}: the last item is {part!r:.40}, expected a plain number, the maximum"
        )
    return items


def _generate(items: list[tuple[int, int, int]], text: str) -> tuple[int, ...]:
    counts: list[int] = []
    for (current, following, step), (end, _, _) in pairwise(items):
        if not step:
            counts.append(current)
            continue
        while current < end and len(counts) <= MAX_TOKEN_COUNTS:
            counts.append(current)
            if current == following:
                step, following = step * 2, following * 2
            current += step
    counts.append(items[-1][0])
    if len(counts) > MAX_TOKEN_COUNTS:
        raise UsageError(f"token counts {text!r:.200} are more than {MAX_TOKEN_COUNTS}, use larger steps")
    return tuple(counts)


def _default_up_to(number: str, text: str) -> tuple[int, ...]:
    last = _count(number, number, text)
    kept = [item for item in _items(DEFAULT_SEQUENCE)[:-1] if item[0] < last]
    return _generate([*kept, (last, 0, 0)], text)


def _sequence(value: str, text: str) -> tuple[int, ...]:
    inside = value[1:-1] if value[:1] in ("[", "(") else value
    return _default_up_to(inside.strip(), text) if inside.strip().isdigit() else parse_tokens(inside)


def _count(number: str, part: str, text: str) -> int:
    # The length bound keeps int() from working on a megabyte of digits.
    if number.isascii() and number.isdigit() and len(number) <= 10 and 1 <= int(number) <= MAX_TOKENS:
        return int(number)
    raise UsageError(f"token counts {text!r:.200}: {part!r:.40} holds {number!r:.20}, expected 1 to {MAX_TOKENS}")


def _pairs(text: str) -> dict[str, str]:
    known = ("seq", "max_time", "top_k", "min_iter", "max_iter", *IGNORED_TUNE_KEYS)
    given: dict[str, str] = {}
    for part in _split_outside_brackets(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise UsageError(f"{part!r:.40} in {text!r:.200} is not key=value; keys are {', '.join(known)}")
        if key not in known:
            raise UsageError(f"unknown key {key!r:.40} in {text!r:.200}, expected one of {', '.join(known)}")
        if key in given:
            raise UsageError(f"key {key!r:.40} is given twice in {text!r:.200}")
        given[key] = value
    return given


def _split_outside_brackets(text: str) -> list[str]:
    parts, closing = [""], ""
    for character in text:
        if character == "," and not closing:
            parts.append("")
            continue
        if character in "[(" and not closing:
            closing = "]" if character == "[" else ")"
        elif character in "[]()":
            if character != closing:
                raise UsageError(f"brackets in {text!r:.200} do not match")
            closing = ""
        parts[-1] += character
    if closing:
        raise UsageError(f"brackets in {text!r:.200} do not match, {closing!r} is missing")
    return parts


def _optional(given: dict[str, str], key: str, parse: Callable[[str, str], T]) -> T | None:
    return parse(key, given[key]) if key in given else None


def _integer(name: str, text: str, low: int, high: int) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high:
        return int(text)
    raise UsageError(f"{name} is {text!r:.40}, expected an integer from {low} to {high}")


def _positive_float(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} is {text!r:.40}, expected a number above 0")
    return value


class _Variables:
    """Environment variables by name; errors name the variable."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def get(self, name: str) -> str | None:
        return self._environ.get(name, "").strip() or None

    def parsed(self, name: str, parse: Callable[[str], T]) -> T | None:
        text = self.get(name)
        if text is None:
            return None
        try:
            return parse(text)
        except UsageError as error:
            raise UsageError(f"{name}={text:.200}: {error}") from error

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        text = self.get(name) or known[0]
        if text.lower() not in known:
            raise UsageError(f"{name} is {text!r:.40}, expected one of {', '.join(known)}")
        return text.lower()

    def flag(self, name: str, default: bool = False) -> bool:
        text = (self.get(name) or str(int(default))).lower()
        if text not in TRUE + FALSE:
            raise UsageError(f"{name} is {text!r:.40}, expected one of {', '.join(TRUE + FALSE)}")
        return text in TRUE

    def integer(self, name: str, low: int, high: int) -> int:
        return _integer(name, self.get(name) or "", low, high)


def _cache_dir(values: _Variables) -> Path:
    chosen, home = values.get("TILECAST_CACHE_DIR"), values.get("HOME")
    if chosen is not None:
        inside_home = chosen.startswith("~/") and home is not None
        return Path(f"{home}{chosen[1:]}" if inside_home else chosen)
    # The XDG specification: a relative path is invalid and to be ignored.
    shared = values.get("XDG_CACHE_HOME")
    if shared is not None and Path(shared).is_absolute():
        return Path(shared) / "tilecast"
    if home is not None:
        return Path(home) / ".cache" / "tilecast"
    try:
        return Path.home() / ".cache" / "tilecast"
    except RuntimeError:
        raise UsageError("no home folder is known; set TILECAST_CACHE_DIR to a folder for compiled kernels") from None


DEFAULT_TOKENS = parse_tokens(DEFAULT_SEQUENCE)
"""1, 2, 4, then 8, 16, 32, 48, 64, 96, 128, … 6144, 8192: what is tuned where nobody says otherwise."""
