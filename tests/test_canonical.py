from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilecast.canonical import canonical_json, digest, fields_of
from tilecast.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_round_trip(value: Any) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(max_size=4), st.integers(), max_size=6))
def test_the_order_of_keys_does_not_count(value: dict[str, int]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


def test_the_form_is_pinned() -> None:
    value = {"b": [1, 2.5, None, True], "a": "µ\n", "c": {"z": 1e300, "y": 0.1}}
    assert canonical_json(value) == '{"a":"\\u00b5\\n","b":[1,2.5,null,true],"c":{"y":0.1,"z":1e+300}}'
    assert digest(value) == "2cdca0bc830f2c50e6fc3bfe1128f7fa6fefbd75106b3bb3b71dfe58f71c58dc"


def test_numbers_that_look_alike_are_different_values() -> None:
    assert len({digest(1), digest(1.0), digest(True), digest("1")}) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {"a": [math.nan]}])
def test_what_json_has_no_number_for(value: Any) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(value)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object()])
def test_what_json_has_no_form_for(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_fields_of() -> None:
    expected: dict[str, Any] = {"n": int, "x": (float, int, type(None)), "on": bool}
    for value in ({"n": 1, "x": 1.5, "on": True}, {"n": -1, "x": 2, "on": False}, {"n": 0, "x": None, "on": True}):
        assert fields_of(value, expected, "thing") is value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "thing: expected an object, got list"),
        (None, "thing: expected an object, got NoneType"),
        ({"n": 1}, r"missing fields \['on', 'x'\]"),
        ({"n": 1, "x": 1.0, "on": True, "y": 2}, r"unknown fields \['y'\]"),
        ({"n": 1.0, "x": 1.0, "on": True}, "field 'n' is 1.0, expected integer"),
        ({"n": True, "x": 1.0, "on": True}, "field 'n' is True, expected integer"),
        ({"n": None, "x": 1.0, "on": True}, "field 'n' is None"),
        ({"n": 1, "x": "1", "on": True}, "field 'x' is '1', expected number or integer or null"),
        ({"n": 1, "x": True, "on": True}, "field 'x' is True"),
        ({"n": 1, "x": 1.0, "on": 1}, "field 'on' is 1, expected boolean"),
    ],
)
def test_fields_of_refuses(value: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        fields_of(value, {"n": int, "x": (float, int, type(None)), "on": bool}, "thing")
