"""Typed reading of a config.json: every refusal names the field, the value seen and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tilecast.errors import ModelError
from tilecast.problem import MAX_DIMENSION

Names = tuple[str, ...]
"""Names one field goes by, most usual first; a dot steps into a nested object."""

_ABSENT = object()


class Fields:
    """The fields of one parsed config, read by name.

    A field may go by several names in the files of one family; where more than one is there, they must agree.
    A JSON null counts as absent. Every method raises ModelError.
    """

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        """Read from `values`; `what` begins every message."""
        self._values = values
        self.what = what

    def error(self, text: str) -> ModelError:
        """Return an error about this config."""
        return ModelError(f"{self.what}: {text}")

    def has(self, *names: str) -> bool:
        """Whether the field is there under any of its names."""
        return any(self._look_up(name) is not _ABSENT for name in names)

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null, for the families that tell null from absent."""
        return self._raw(name) is None

    def get(self, *names: str) -> Any:
        """Return a field of any type, or None where it is absent."""
        found = {name: value for name in names if (value := self._look_up(name)) is not _ABSENT}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise self.error("fields disagree: " + ", ".join(f"{name}={value!r}" for name, value in found.items()))
        return values[0] if values else None

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_DIMENSION) -> int:
        """Return an integer from `low` to `high`; an absent field gives the default, without one an error."""
        value = self.get(*names)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"field {' or '.join(names)} is missing, expected an integer from {low} to {high}")
        return self._checked(" or ".join(names), value, low, high)

    def integers(self, *names: str, layers: int) -> list[int]:
        """Return one integer of at least 1 for each layer; the field is an integer or a list of that length."""
        value = self.get(*names)
        if not isinstance(value, list):
            return [self.integer(*names)] * layers
        if len(value) != layers:
            raise self.error(f"field {names[0]} has {len(value)} entries, expected one for each of {layers} layers")
        return [self._checked(f"{names[0]}[{index}]", entry, 1, MAX_DIMENSION) for index, entry in enumerate(value)]

    def indices(self, *names: str) -> list[int] | None:
        """Return a list of layer indices, or None where the field is absent."""
        value = self.get(*names)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.error(f"field {names[0]} is {value!r}, expected a list of layer indices")
        return [self._checked(f"{names[0]}[{at}]", entry, 0, MAX_DIMENSION) for at, entry in enumerate(value)]

    def number(self, *names: str, default: float) -> float:
        """Return a finite number."""
        value = self.get(*names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"field {names[0]} is {value!r}, expected a number")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        """Return true or false."""
        value = self.get(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"field {names[0]} is {value!r}, expected true or false")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        """Return a string; an absent field gives the default, without one an error."""
        value = self.get(*names)
        if value is None:
            value = default
        if not isinstance(value, str):
            seen = "missing" if value is None else repr(value)
            raise self.error(f"field {' or '.join(names)} is {seen}, expected a string")
        return value

    def _look_up(self, name: str) -> Any:
        value = self._raw(name)
        return _ABSENT if value is None else value

    def _raw(self, name: str) -> Any:
        value: Any = self._values
        for part in name.split("."):
            if not isinstance(value, Mapping):
                return _ABSENT
            value = value.get(part, _ABSENT)
        return value

    def _checked(self, name: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(f"field {name} is {value!r}, expected an integer from {low} to {high}")
        return value
