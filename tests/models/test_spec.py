from __future__ import annotations

import pytest

from tilecast.errors import ModelError
from tilecast.models import resolve
from tilecast.problem import ExpertLayer


def test_the_usual_form() -> None:
    model = resolve("E=8,H=4096,I=14336,k=2")
    assert [(group.layer, group.count, group.indices) for group in model.layers] == [
        (ExpertLayer(experts=8, hidden=4096, intermediate=14336, top_k=2), 1, "0")
    ]
    assert (model.source, model.family, model.name) == ("spec", "spec", "E=8,H=4096,I=14336,k=2,dtype=bf16")


def test_every_key_in_any_case_and_order() -> None:
    model = resolve(" K=1, bias=yes ,gated=0,ACT=relu2,Dtype=float16,i=3,h=2,e=4")
    assert model.layers[0].layer == ExpertLayer(
        experts=4, hidden=2, intermediate=3, top_k=1, dtype="fp16", activation="relu2", gated=False, bias=True
    )


def test_its_name_is_a_spec_of_itself() -> None:
    model = resolve("e=4,h=2,i=3,k=1,act=gelu,gated=off,bias=on,dtype=fp32")
    assert resolve(model.name) == model


def test_a_weight_format() -> None:
    model = resolve("E=8,H=256,I=384,k=2,W=AWQ_g128,dtype=fp16")
    assert model.layers[0].layer.weight_format == "awq_g128"
    assert model.name == "E=8,H=256,I=384,k=2,dtype=fp16,w=awq_g128"
    assert resolve(model.name) == model


def test_dtype_given_beside_the_spec_wins() -> None:
    assert resolve("E=8,H=4,I=4,k=2,dtype=fp16", dtype="fp32").layers[0].layer.dtype == "fp32"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("E=8,H=4096,I=14336", "lacks k"),
        ("E=8", "lacks H, I, k"),
        ("E=8,H=4,I=4,k=2,F=1", "unknown key 'F', expected one of E, H, I, k, dtype, w, act, gated, bias"),
        ("E=8,H=4,I=4,k=2,e=9", "e is given twice"),
        ("E=8,H=4,I=4,k=2,", "not key=value"),
        ("E=8,H=4,I=,k=2", "not key=value"),
        ("=8", "not key=value"),
        ("E=0,H=4,I=4,k=1", "E is 0, expected an integer from 1"),
        ("E=8,H=4,I=4,k=9", "top-k is 9, more than the 8 experts"),
        ("E=8,H=-4,I=4,k=2", "H is '-4'"),
        ("E=8,H=4.0,I=4,k=2", r"H is '4\.0'"),
        ("E=8,H=99999999999,I=4,k=2", "H is '99999999999'"),
        ("E=8,H=16777217,I=4,k=2", "H is 16777217"),
        ("E=8,H=4,I=4,k=2,dtype=int8", "dtype is 'int8'"),
        ("E=8,H=4,I=4,k=2,act=tanh", "act is 'tanh', expected one of silu"),
        ("E=8,H=4,I=4,k=2,gated=maybe", "gated is 'maybe'"),
        ("E=8,H=4,I=4,k=2,w=int4", "weight format is 'int4', expected one of dense, awq_g32"),
        (
            "E=8,H=256,I=200,k=2,w=awq_g128",
            "size I is 200, which cuts a group of 128 .* such as 128 or 256",
        ),
    ],
)
def test_refusals(spec: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        resolve(spec)
