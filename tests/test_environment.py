from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given

from tests.strategies import environments
from tilecast.canonical import canonical_json
from tilecast.environment import Environment, cpu_environment, kernel_source_digest
from tilecast.errors import InputError

HERE = Environment(
    device_kind="cpu", device="A CPU", arch="x86_64", features="avx2,fma", units=2, llc_bytes=1 << 25,
    kernel_source="0" * 64, torch="2.13.0", compiler="0.50.0", threads=2,
)  # fmt: skip


def test_the_digest_is_pinned() -> None:
    assert HERE.digest == "c5ca81e08aba9cfbf57727e54157d2b4925a0799272e86d51f9df53209fc4a45"


@given(environments())
def test_environment_survives_its_json(environment: Environment) -> None:
    again = Environment.from_json(json.loads(canonical_json(environment.to_json())))
    assert again == environment
    assert again.digest == environment.digest


@given(environments(), environments())
def test_comparison_is_complete(here: Environment, there: Environment) -> None:
    mismatches = here.compare(there)
    assert {m.field for m in mismatches} == {
        f.name for f in fields(here) if getattr(here, f.name) != getattr(there, f.name)
    }
    hard = [m.hard for m in mismatches]
    assert hard == sorted(hard, reverse=True)
    assert here.accepts(there) == there.accepts(here) == (not any(hard))


def test_an_environment_accepts_itself() -> None:
    assert HERE.compare(HERE) == ()
    assert HERE.accepts(HERE)


@pytest.mark.parametrize(
    ("changes", "hard"),
    [
        ({"device_kind": "cuda"}, True),
        ({"device": "Another CPU"}, True),
        ({"arch": "aarch64"}, True),
        ({"features": "avx2"}, True),
        ({"units": 4}, True),
        ({"kernel_source": "1" * 64}, True),
        ({"llc_bytes": 1}, False),
        ({"threads": 1}, False),
        ({"driver": "550"}, False),
        ({"system": "Linux"}, False),
        ({"torch": "2.13.1"}, False),
        ({"torch": "2.13.0+cpu"}, False),
        ({"torch": "2.14.0"}, True),
        ({"torch": "3.13.0"}, True),
        ({"compiler": "0.50.1"}, False),
        ({"compiler": "0.5.0"}, True),
        ({"compiler": "absent"}, True),
    ],
)
def test_which_fields_are_hard(changes: dict[str, Any], hard: bool) -> None:
    there = replace(HERE, **changes)
    (mismatch,) = HERE.compare(there)
    assert mismatch.hard is hard
    assert HERE.accepts(there) is not hard
    ((name, value),) = changes.items()
    assert str(mismatch) == f"{name}: here {str(getattr(HERE, name))!r}, there {str(value)!r}"


def test_json_of_another_shape_is_refused() -> None:
    good = HERE.to_json()
    for bad in ({**good, "units": "2"}, {**good, "extra": 1}, {**good, "units": True}, [], {}):
        with pytest.raises(InputError, match="environment"):
            Environment.from_json(bad)


def test_this_machine() -> None:
    here = cpu_environment()
    assert here == cpu_environment()
    assert (here.device_kind, here.kernel_source) == ("cpu", kernel_source_digest("cpu"))
    assert here.units >= 1
    assert here.llc_bytes > 0
    assert here.device
    assert Environment.from_json(here.to_json()) == here


def test_kernel_sources_of_devices_differ() -> None:
    assert len(kernel_source_digest("cpu")) == 64
    assert kernel_source_digest("cpu") != kernel_source_digest("cuda")
