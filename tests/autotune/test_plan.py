from __future__ import annotations

from dataclasses import replace

import pytest

from tests.autotune.shared import HERE, LAYER
from tilecast.autotune.plan import make_plan
from tilecast.errors import InputError
from tilecast.problem import Bucket


def test_equal_layers_count_once_and_order_is_kept() -> None:
    other = replace(LAYER, hidden=64)
    plan = make_plan([other, LAYER, replace(LAYER)], [16, 1, 4, 4], HERE)
    assert plan.layers == (other, LAYER)
    assert plan.buckets == (Bucket(above=0, tokens=1), Bucket(above=1, tokens=4), Bucket(above=4, tokens=16))


def test_tasks_go_gemm_by_gemm() -> None:
    plan = make_plan([LAYER], [1, 4], HERE)
    assert [(gemm.name, bucket.tokens) for gemm, bucket in plan.tasks] == [
        ("up", 1),
        ("up", 4),
        ("down", 1),
        ("down", 4),
    ]


@pytest.mark.parametrize(("layers", "tokens"), [([], [1]), ([LAYER], []), ([], [])])
def test_a_plan_may_be_empty(layers: list, tokens: list) -> None:
    assert make_plan(layers, tokens, HERE).tasks == ()


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([0], {}, "bucket's tokens is 0"),
        ([4], {"policy": "fast"}, "policy is 'fast'"),
        ([4], {"routing": "zipf"}, "routing profile is 'zipf'"),
    ],
)
def test_wrong_plans_are_refused(tokens: list, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan([LAYER], tokens, HERE, **options)
