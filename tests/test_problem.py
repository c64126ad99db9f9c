from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import layers, tile_configs
from tilecast.canonical import canonical_json
from tilecast.errors import ConfigError, InputError
from tilecast.problem import MAX_DIMENSION, Bucket, ExpertGemm, ExpertLayer, TileConfig, buckets

LAYER = ExpertLayer(hidden=4096, intermediate=1792, experts=8, top_k=2)
CONFIG = TileConfig("llvm.moe_gemm", {"mr": 6, "nr": 2, "layout": "panel"})


def test_digests_are_pinned() -> None:
    """Stores and exported tables live on these: a change orphans every one of them."""
    assert LAYER.digest == "f5642475da243c0dbefe96f0c5d461b69d9d0e3a6fd4f519d67ed3c93971e688"
    assert CONFIG.digest == "55f221367304667a150e12d5ff815aa7485fe20cbd026f2130e88a8737c5fa8d"


@given(layers())
def test_layer_survives_its_json(layer: ExpertLayer) -> None:
    again = ExpertLayer.from_json(json.loads(canonical_json(layer.to_json())))
    assert again == layer
    assert hash(again) == hash(layer)
    assert again.digest == layer.digest


@given(layers(), layers())
def test_layer_digests_tell_layers_apart(one: ExpertLayer, other: ExpertLayer) -> None:
    assert (one.digest == other.digest) == (one == other)


@pytest.mark.parametrize(
    "changes",
    [{"hidden": 1}, {"intermediate": 1}, {"experts": 4}, {"top_k": 1}, {"dtype": "fp16"}, {"activation": "gelu"},
     {"gated": False}, {"bias": True}, {"global_experts": 16}],
)  # fmt: skip
def test_every_field_counts_in_the_digest(changes: dict[str, Any]) -> None:
    assert replace(LAYER, **changes).digest != LAYER.digest


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden": 0}, "hidden size H is 0"),
        ({"hidden": MAX_DIMENSION + 1}, "hidden size H"),
        ({"intermediate": -1}, "intermediate size I is -1"),
        ({"intermediate": 2.0}, r"intermediate size I is 2\.0"),
        ({"experts": True}, "experts E is True"),
        ({"experts": "8"}, "experts E is '8'"),
        ({"top_k": 0}, "top-k is 0"),
        ({"top_k": 9}, "top-k is 9, more than the 8 experts"),
        ({"global_experts": 7}, "global experts is 7, expected an integer from 8"),
        ({"dtype": "fp8"}, "dtype is 'fp8', expected one of fp32, bf16, fp16"),
        ({"weight_format": "int4"}, "weight format is 'int4'"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"gated": 1}, "gated is 1"),
        ({"bias": None}, "bias is None"),
    ],
)
def test_layer_refuses(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(LAYER, **{"global_experts": 0, **changes})


def test_layer_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        LAYER.hidden = 1  # type: ignore[misc]


def test_global_experts_default_to_the_experts() -> None:
    assert LAYER.global_experts == 8
    assert replace(LAYER, experts=2, global_experts=8, top_k=8).top_k == 8


def test_layer_refuses_json_of_another_shape() -> None:
    good = LAYER.to_json()
    for bad in ({**good, "rank": 0}, {k: v for k, v in good.items() if k != "bias"}, {**good, "gated": 1}, [], None):
        with pytest.raises(InputError, match="layer"):
            ExpertLayer.from_json(bad)


def test_gemms() -> None:
    up, down = LAYER.gemms
    assert (up.name, up.n, up.k) == ("up", 2 * 1792, 4096)
    assert (down.name, down.n, down.k) == ("down", 4096, 1792)
    assert replace(LAYER, gated=False).up.n == 1792
    assert up.flops(3) == 2 * 3 * 3584 * 4096
    assert up.weight_bytes() == 8 * 3584 * 4096 * 2
    assert replace(LAYER, dtype="fp32").down.weight_bytes(1) == 4096 * 1792 * 4
    with pytest.raises(InputError, match="GEMM is 'side'"):
        ExpertGemm(layer=LAYER, name="side")  # type: ignore[arg-type]


def test_identity_is_for_ungated_layers_alone() -> None:
    assert replace(LAYER, activation="identity", gated=False).label == "E8 H4096 I1792 top2 bf16 identity-ungated"
    with pytest.raises(InputError, match="'identity' with gated=true"):
        replace(LAYER, activation="identity")


def test_digests_of_layers_stay_what_stored_tables_have() -> None:
    assert LAYER.digest == "f5642475da243c0dbefe96f0c5d461b69d9d0e3a6fd4f519d67ed3c93971e688"


@pytest.mark.parametrize(
    ("layer", "label"),
    [
        (LAYER, "E8 H4096 I1792 top2 bf16"),
        (replace(LAYER, global_experts=64), "E8/64 H4096 I1792 top2 bf16"),
        (replace(LAYER, activation="relu2", gated=False), "E8 H4096 I1792 top2 bf16 relu2-ungated"),
        (replace(LAYER, gated=False), "E8 H4096 I1792 top2 bf16 silu-ungated"),
        (replace(LAYER, activation="swiglu_oai", bias=True), "E8 H4096 I1792 top2 bf16 swiglu_oai bias"),
    ],
)
def test_label(layer: ExpertLayer, label: str) -> None:
    assert layer.label == label


@given(tile_configs())
def test_config_survives_its_json(config: TileConfig) -> None:
    again = TileConfig.from_json(json.loads(canonical_json(config.to_json())))
    assert again == config
    assert hash(again) == hash(config)
    assert again.digest == config.digest


@given(tile_configs())
def test_the_order_of_parameters_does_not_count(config: TileConfig) -> None:
    again = TileConfig(config.kernel, tuple(reversed(config.params)))
    assert again == config
    assert again.digest == config.digest


@given(tile_configs(), tile_configs())
def test_configs_have_a_total_order(one: TileConfig, other: TileConfig) -> None:
    assert (one.sort_key == other.sort_key) == (one == other)


def test_config_access() -> None:
    assert CONFIG["layout"] == "panel"
    assert CONFIG.integer("mr") == 6
    assert CONFIG.with_params(mr=4)["mr"] == 4
    assert CONFIG["mr"] == 6
    assert CONFIG.label == "llvm.moe_gemm layout=panel mr=6 nr=2"
    with pytest.raises(ConfigError, match="no parameter 'kr'"):
        CONFIG["kr"]
    with pytest.raises(ConfigError, match="layout is 'panel', expected an integer"):
        CONFIG.integer("layout")


@pytest.mark.parametrize(
    ("kernel", "params", "says"),
    [
        ("", {}, "kernel name is ''"),
        ("k" * 65, {}, "kernel name"),
        (7, {}, "kernel name is 7"),
        ("k", {"m r": 1}, "'m r' is not an identifier"),
        ("k", {"": 1}, "not an identifier"),
        ("k", {"m" * 65: 1}, "not an identifier"),
        ("k", {"mr": True}, "mr is True"),
        ("k", {"mr": 1.0}, r"mr is 1\.0"),
        ("k", {"mr": None}, "mr is None"),
        ("k", {"mr": 1 << 54}, "out of range"),
        ("k", {"mr": "x" * 65}, "out of range"),
        ("k", (("mr", 1), ("mr", 2)), "given twice"),
        ("k", {f"p{n}": n for n in range(65)}, "more than 64"),
    ],
)
def test_config_refuses(kernel: Any, params: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TileConfig(kernel, params)


def test_config_refuses_json_of_another_shape() -> None:
    for bad in ({"kernel": "k"}, {"kernel": "k", "params": []}, {"kernel": 1, "params": {}}, "k"):
        with pytest.raises(InputError):
            TileConfig.from_json(bad)
    with pytest.raises(ConfigError):
        TileConfig.from_json({"kernel": "k", "params": {"mr": [1]}})


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=20))
def test_buckets_cover_every_count_once(tokens: list[int]) -> None:
    found = buckets(tokens)
    assert [bucket.tokens for bucket in found] == sorted(set(tokens))
    assert found[0].above == 0
    for count in (1, max(tokens), *tokens):
        assert sum(count in bucket for bucket in found) == 1
    assert not any(max(tokens) + 1 in bucket or 0 in bucket for bucket in found)


def test_no_counts_no_buckets() -> None:
    assert buckets([]) == ()


@pytest.mark.parametrize(("above", "tokens"), [(-1, 4), (4, 4), (4, 3), (0, 0), (0, MAX_DIMENSION + 1), (0, 1.5)])
def test_bucket_refuses(above: Any, tokens: Any) -> None:
    with pytest.raises(InputError, match="bucket"):
        Bucket(above=above, tokens=tokens)
