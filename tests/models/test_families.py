"""Each family's entry against the real thing: transformers builds the model, its parameters say what is true."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from tilecast.errors import ModelError
from tilecast.models import FAMILIES, Router, resolve
from tilecast.models.read import read_config

COMMON = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32,
    "head_dim": 16, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {"n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
WIDE = {"intermediate_size": 80, "moe_intermediate_size": 24}
"""Dense layers 80 wide, experts 24, so that the wrong field shows."""

SMALL: dict[str, dict[str, Any]] = {
    "afmoe": {**WIDE, "num_experts": 6, "num_dense_layers": 1, "num_shared_experts": 2},
    "dbrx": {"d_model": 64, "n_layers": 4, "n_heads": 4, "vocab_size": 32,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2}},
    "deepseek_v2": {**WIDE, **DEEPSEEK, "n_routed_experts": 6, "first_k_dense_replace": 1},
    "deepseek_v3": {**WIDE, **DEEPSEEK, "n_routed_experts": 6, "first_k_dense_replace": 2},
    "dots1": {**WIDE, "n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "ernie4_5_moe": {**WIDE, "moe_num_experts": 6, "moe_k": 2, "moe_layer_end_index": 2, "moe_num_shared_experts": 2},
    "exaone_moe": {**WIDE, "num_experts": 6, "first_k_dense_replace": 2, "num_shared_experts": 2},
    "flex_olmo": {"intermediate_size": 24, "num_experts": 6, "pad_token_id": 1},
    "glm4_moe": {**WIDE, "n_routed_experts": 6, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**WIDE, **DEEPSEEK, "n_routed_experts": 6, "n_shared_experts": 2},
    "glm4v_moe_text": {**WIDE, "n_routed_experts": 6, "first_k_dense_replace": 1},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 6},
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 6},
    "granitemoehybrid": {"intermediate_size": 24, "num_local_experts": 6, "layer_types": ["attention"] * 4,
                         "mamba_n_heads": 8},
    "granitemoeshared": {"intermediate_size": 24, "num_local_experts": 6, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {"intermediate_size": 24, "num_experts": 6, "moe_topk": 2},
    "hy_v3": {**WIDE, "num_experts": 6, "num_shared_experts": 2},
    "jamba": {"intermediate_size": 24, "num_experts": 6},
    "lfm2_moe": {**WIDE, "num_experts": 6, "num_dense_layers": 1, "layer_types": ["full_attention"] * 4},
    "llama4_text": {"intermediate_size": 24, "intermediate_size_mlp": 80, "num_local_experts": 6,
                    "interleave_moe_layer_step": 2},
    "minimax": {"intermediate_size": 24, "num_local_experts": 6},
    "minimax_m2": {"intermediate_size": 24, "num_local_experts": 6},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 6},
    "nemotron_h": {**WIDE, "n_routed_experts": 6, "moe_shared_expert_intermediate_size": 40, "mamba_num_heads": 8,
                   "mamba_head_dim": 16, "layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "olmoe": {"intermediate_size": 24, "num_experts": 6},
    "phimoe": {"intermediate_size": 24, "num_local_experts": 6},
    "qwen2_moe": {**WIDE, "num_experts": 6, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "qwen3_5_moe_text": {"moe_intermediate_size": 24, "num_experts": 6, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**WIDE, "num_experts": 6, "mlp_only_layers": [1]},
    "qwen3_next": {**WIDE, "num_experts": 6, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "qwen3_vl_moe_text": {**WIDE, "num_experts": 6, "mlp_only_layers": [1]},
    "solar_open": {"moe_intermediate_size": 24, "n_routed_experts": 6, "n_shared_experts": 2},
    "aria_text": {"intermediate_size": 24, "moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 2},
    "axk1": {**WIDE, **DEEPSEEK, "n_routed_experts": 6, "n_shared_experts": 2},
    "axk2": {**WIDE, **DEEPSEEK, "n_routed_experts": 6, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
    "bailing_hybrid": {**WIDE, **DEEPSEEK, "num_experts": 6, "num_experts_per_token": 2, "num_shared_experts": 2,
                       "first_k_dense_replace": 1, "pad_token_id": 0},
    "beam": {**WIDE, "num_experts": 6},
    "cohere2_moe": {"intermediate_size": 24, "num_experts": 6, "num_shared_experts": 2, "first_k_dense_replace": 1},
    "deepseek_v32": {**WIDE, **DEEPSEEK, "n_routed_experts": 6},
    "deepseek_v4": {"moe_intermediate_size": 24, "n_routed_experts": 6, "num_key_value_heads": 1, "o_groups": 2,
                    "o_lora_rank": 8, "q_lora_rank": 8},
    "dots3_note_text": {**WIDE, **DEEPSEEK, "n_routed_experts": 6, "n_group": 1, "n_shared_experts": 2,
                        "shared_experts_intermediate_size": 20, "num_key_value_heads": 4, "pad_token_id": 0},
    "flint": {**WIDE, "num_experts": 6, "shared_expert_intermediate_size": 40},
    "gemma4_text": {"moe_intermediate_size": 24, "num_experts": 6, "top_k_experts": 2, "enable_moe_block": True,
                    "vocab_size_per_layer_input": 32},
    "glm_moe_dsa": {**WIDE, **DEEPSEEK, "n_routed_experts": 6, "n_shared_experts": 2},
    "granitemoe_swa": {"intermediate_size": 24, "num_local_experts": 6, "shared_intermediate_size": 40},
    "hy_v4": {**WIDE, **DEEPSEEK, "n_routed_experts": 6, "n_group": 1, "n_shared_experts": 2, "pad_token_id": 0},
    "inkling_text": {"moe_intermediate_size": 24, "n_routed_experts": 6, "dense_mlp_idx": 1},
    "inkling2_text": {"moe_intermediate_size": 24, "n_routed_experts": 6, "unpadded_vocab_size": 32},
    "kimi_linear": {**WIDE, **DEEPSEEK, "num_experts": 6, "num_experts_per_token": 2, "num_expert_group": 1,
                    "num_shared_experts": 2, "pad_token_id": 0},
    "kolibri1": {"moe_intermediate_size": 24, "num_local_experts": 6, "shared_expert_intermediate_size": 40},
    "laguna": {**WIDE, "num_experts": 6, "shared_expert_intermediate_size": 40},
    "mellum": {**WIDE, "num_local_experts": 6, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "mimo_v2_flash": {**WIDE, "n_routed_experts": 6},
    "minimax_m3_vl_text": {"intermediate_size": 24, "num_local_experts": 6, "shared_intermediate_size": 40},
    "qwen4_exp_text": {"moe_intermediate_size": 24, "num_experts": 6, "shared_expert_intermediate_size": 40,
                       "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 4},
    "zaya": {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 1},
}  # fmt: skip


def saved(model_type: str) -> tuple[Any, dict[str, Any]]:
    """Return a small config of a family, and what transformers would write into its config.json."""
    mapping = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    own = SMALL[model_type]
    config = mapping[model_type](**(own if model_type == "dbrx" else {**COMMON, **own}))
    return config, json.loads(config.to_json_string(use_diff=True))


def parameters(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's parameters, without making them."""
    auto = pytest.importorskip("transformers")
    with torch.device("meta"):
        try:
            model = auto.AutoModelForCausalLM.from_config(config)
        except ValueError:  # text parts of multimodal models have no causal head of their own
            model = auto.AutoModel.from_config(config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def test_every_family_is_tried() -> None:
    assert sorted(SMALL) == sorted(FAMILIES)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_family_agrees_with_transformers(model_type: str) -> None:
    config, written = saved(model_type)
    model = read_config(written, name="small", source="small")
    shapes = parameters(config)
    experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
    sparse = sorted({int(found) for name in experts for found in re.findall(r"(?:layers|blocks)\.(\d+)\.", name)})

    (group,) = model.layers
    layer = group.layer
    assert (layer.hidden, layer.intermediate, layer.experts) == (64, 24, 6)
    assert layer.top_k == (1 if model_type == "zaya" else 2)
    assert model.family == model_type
    assert group.count == len(sparse)
    assert model.dense_layers == 4 - len(sparse)
    assert _indices(group.indices) == sparse
    # Families differ in the order of dimensions; dbrx flattens experts and keeps gate and up apart.
    weights = {tuple(sorted(shape)) for name, shape in experts.items() if "bias" not in name}
    assert weights == ({(64, 6 * 24)} if model_type == "dbrx" else {(6, layer.up.n, 64), (6, 24, 64)})
    assert layer.bias == any("bias" in name for name in experts)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_shared_width_agrees_with_transformers(model_type: str) -> None:
    config, written = saved(model_type)
    model = read_config(written, name="small", source="small")
    downs = [shape for name, shape in parameters(config).items()
             if "shared" in name and re.search(r"(down_proj|output_linear)(\.weight)?$", name)]  # fmt: skip
    # Those of Inkling are one stack, [experts, H, I].
    widths = {shape[-1] * (shape[0] if len(shape) == 3 else 1) for shape in downs}
    assert widths == ({model.shared_intermediate} if model.shared_intermediate else set())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_each_missing_size_is_named(model_type: str) -> None:
    _, written = saved(model_type)
    for names in FAMILIES[model_type].sizes:
        for wrong in (None, "24", 24.0, True, 0, 1 << 40):
            broken = json.loads(json.dumps(written))
            for name in names:
                *outer, last = name.split(".")
                place = broken[outer[0]] if outer else broken
                if last in place or name == names[0]:
                    place[last] = wrong
            with pytest.raises(ModelError, match=names[0].replace(".", r"\.")) as caught:
                read_config(broken, name="x", source="x")
            assert "\n" not in str(caught.value)


def _indices(text: str) -> list[int]:
    if " step " in text:
        span, step = text.split(" step ")
        first, last = span.split("-")
        return list(range(int(first), int(last) + 1, int(step)))
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def test_wrappers_hold_the_family_in_text_config() -> None:
    inner = {**COMMON, **SMALL["llama4_text"], "model_type": "llama4_text"}
    outer = {"model_type": "llama4", "text_config": inner, "dtype": "float16"}
    model = read_config(outer, name="x", source="x")
    assert model.family == "llama4_text"
    assert model.layers[0].layer.dtype == "fp16"
    with pytest.raises(ModelError, match="text_config is None"):
        read_config({**inner, "model_type": "llama4"}, name="x", source="x")


def test_lists_of_one_entry_per_layer_make_groups() -> None:
    config = {**COMMON, "model_type": "hunyuan_v1_moe", "intermediate_size": 24, "num_experts": 6,
              "moe_topk": [1, 2, 2, 1]}  # fmt: skip
    model = read_config(config, name="x", source="x")
    assert [(group.layer.top_k, group.indices) for group in model.layers] == [(1, "0,3"), (2, "1-2")]
    with pytest.raises(ModelError, match="moe_topk has 2 entries"):
        read_config({**config, "moe_topk": [1, 2]}, name="x", source="x")


@pytest.mark.parametrize(
    ("preset", "router"),
    [
        ("mixtral-8x7b", Router(renormalize=True)),
        ("qwen1.5-moe-a2.7b", Router(renormalize=False)),
        ("qwen3-30b-a3b", Router(renormalize=True)),
        ("deepseek-v2", Router(renormalize=False, scale=16.0, groups=8, top_groups=3)),
    ],
)
def test_router_facts(preset: str, router: Router) -> None:
    assert resolve(preset).router == router


def test_routers_that_are_not_plain_say_so() -> None:
    assert resolve("mixtral-8x7b").router.plain
    for preset in ("deepseek-v3", "gpt-oss-20b", "phi-3.5-moe", "llama-4-scout"):
        assert resolve(preset).router.extras
        assert not resolve(preset).router.plain


def test_dbrx_tells_null_from_absent() -> None:
    config: dict[str, Any] = {**SMALL["dbrx"], "model_type": "dbrx"}
    assert read_config(config, name="x", source="x").router.renormalize
    config["ffn_config"] = {**config["ffn_config"], "moe_normalize_expert_weights": None}
    assert not read_config(config, name="x", source="x").router.renormalize


def test_gpt_oss_with_other_constants_is_two_layers() -> None:
    config = {**COMMON, **SMALL["gpt_oss"], "model_type": "gpt_oss", "swiglu_limit": 5.0}
    (group,) = read_config(config, name="x", source="x").layers
    assert [part.label for part in group.parts(group.layer)] == [
        "E6 H64 I48 top2 bf16 identity-ungated bias", "E6 H64 I24 top2 bf16 identity-ungated bias",
    ]  # fmt: skip
