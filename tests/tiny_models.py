"""Tiny random checkpoints of MoE families, in the families' own classes: two or three layers, 64 wide.

Everything is drawn from one seed. Scales are such that tokens choose different experts and logits differ
well beyond rounding, so that a wrong expert or a wrong weight changes the generated tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn

transformers.utils.logging.disable_progress_bar()

VOCABULARY = 97
HIDDEN = 64
INTERMEDIATE = 48

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    # Multi-head latent attention and linear attention, where a family has them.
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "index_topk": 16,
    "index_head_dim": 16,
    "index_n_heads": 4,
}
"""What every family gets as far as its config has the field."""

ONE_EXPERT_SIZE = {"intermediate_size": INTERMEDIATE}
GROUPED = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": ONE_EXPERT_SIZE,
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v2": {"first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "num_key_value_heads": 8}
    | GROUPED,
    "deepseek_v3": {"first_k_dense_replace": 1, "num_key_value_heads": 8} | GROUPED,
    "olmoe": ONE_EXPERT_SIZE,
    "phimoe": ONE_EXPERT_SIZE,
    "glm4_moe": {"first_k_dense_replace": 1, "use_qk_norm": True},
    "gpt_oss": ONE_EXPERT_SIZE | {"num_hidden_layers": 2},
    "granitemoe": ONE_EXPERT_SIZE | {"residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.35},
    "jamba": ONE_EXPERT_SIZE
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"pad_token_id": 0},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "minimax": ONE_EXPERT_SIZE | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m2": ONE_EXPERT_SIZE,
    "dots1": {"first_k_dense_replace": 1, "max_window_layers": 2},
    "hunyuan_v1_moe": ONE_EXPERT_SIZE | {"moe_topk": 2, "pad_token_id": 0},
    "flex_olmo": ONE_EXPERT_SIZE,
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"], "pad_token_id": 0},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 32,
        "pad_token_id": 0,
    },
    "granitemoeshared": ONE_EXPERT_SIZE | {"shared_intermediate_size": 32},
    "granitemoehybrid": ONE_EXPERT_SIZE
    | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8}
    | {"mamba_d_head": 16, "mamba_chunk_size": 8, "position_embedding_type": "rope"},
    "exaone_moe": {"layer_types": ["full_attention"] * 2, "pad_token_id": 0},
    "glm4_moe_lite": {"num_key_value_heads": 8},
    "solar_open": {},
    "afmoe": {"layer_types": ["sliding_attention", "full_attention"]},
    "hy_v3": {},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "llama4_text": ONE_EXPERT_SIZE
    | {"intermediate_size_mlp": 96, "num_experts_per_tok": 1, "attention_chunk_size": 32, "pad_token_id": 0},
}
"""Each family's own fields, by transformers' model_type."""

TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"num_key_value_heads": 8}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
HYBRID = {"vocab_size": VOCABULARY, "layer_types": ["hybrid_sliding", "hybrid"], "d_rel": 4, "rel_extent": 32}
HYBRID |= {f"swa_{name}": SHARED[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}

LATER_FAMILIES: dict[str, dict[str, Any]] = {
    "aria_text": ONE_EXPERT_SIZE | {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": LATENT | GROUPED,
    "axk2": LATENT | {"gated_norm_rank": 4},
    "bailing_hybrid": LATENT | DENSE_FIRST | {"layer_group_size": 2, "n_group": 2, "topk_group": 1},
    "beam": TWO_KINDS | DENSE_FIRST | {"n_group": 2, "topk_group": 1},
    "cohere2_moe": ONE_EXPERT_SIZE | TWO_KINDS | {"pad_token_id": 0},
    "deepseek_v32": LATENT | GROUPED | {"first_k_dense_replace": 1},
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe", "moe"],
        "num_key_value_heads": 1,
        "head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
    },
    "dots3_note_text": LATENT
    | {"layer_types": ["sliding_attention", "indexed_attention"], "shared_experts_intermediate_size": 32}
    | {"swa_num_attention_heads": 8, "swa_num_key_value_heads": 8, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16}
    | {"head_dim": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "flint": TWO_KINDS | {"mlp_only_layers": [0]},
    "gemma4_text": TWO_KINDS
    | {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 16, "tie_word_embeddings": True}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "glm_moe_dsa": LATENT | GROUPED | DENSE_FIRST,
    "granitemoe_swa": ONE_EXPERT_SIZE | {"shared_intermediate_size": 32},
    "hy_v4": DENSE_FIRST,
    "inkling_text": HYBRID,
    "kimi_linear": LATENT
    | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 8}
    | {"num_experts_per_token": 2, "q_lora_rank": None},
    "kolibri1": {},
    "laguna": {},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax_m3_vl_text": ONE_EXPERT_SIZE | {"dense_intermediate_size": 96, "shared_intermediate_size": 32},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "hc_lowrank": 8, "hc_count": 2}
    | {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
    | {"indexer_compress_ratio": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""The same of families that came later: those of them count that the installed transformers has."""

NAMED_FAMILIES = tuple(FAMILIES)[:13]
"""The families that are promised; the others are tried besides."""

FAMILIES |= {family: own for family, own in LATER_FAMILIES.items() if family in transformers.CONFIG_MAPPING}


def tiny_config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    """Return a family's config at tiny size, with `changes` as its fields."""
    known = transformers.AutoConfig.for_model(family)
    # A config whose layers differ keeps the values of such a field to its layers.
    differing = vars(known).get("_heterogeneity_spec")
    shared = {
        name: value
        for name, value in SHARED.items()
        if (differing is not None and name in differing.per_layer_attributes) or hasattr(known, name)
    }
    return transformers.AutoConfig.for_model(family, **{**shared, **FAMILIES[family], **changes})


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a model of random weights, the same for the same arguments."""
    # forked: the caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if is_tied else set()
    with torch.no_grad():
        for name, weight in sorted(model.state_dict(keep_vars=True).items()):
            if weight.is_floating_point() and name not in tied:
                weight.copy_(_drawn(name, weight, generator))
    # .to() also casts buffers that a checkpoint keeps in float32; loading casts them the same way.
    return model.to(dtype).eval()


def save_tiny(
    family: str, folder: Path | str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Save a random checkpoint (config.json, safetensors; no tokenizer) into `folder` and return it."""
    tiny_model(family, dtype, seed, **changes).save_pretrained(folder)
    return Path(folder)


def save_tokenizer(folder: Path | str) -> Path:
    """Save a tokenizer of one token a byte, 256 being the end token; a model needs `vocab_size` of at least 257."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = tokenizers.models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    made = tokenizers.Tokenizer(bytes_alone)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(folder)
    return Path(folder)


def _drawn(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator)
    last = name.rsplit(".", 1)[-1]
    if last in ("A_log", "D", "dt_bias") or "norm" in name:
        return weight + 0.1 * noise  # around what the family starts from: 0 or 1 for norms
    if weight.ndim < 2 or "bias" in last or last == "sinks":
        return 0.2 * noise
    if "embed" in name or "lm_head" in name:
        return 0.5 * noise
    if weight.shape[-1] == HIDDEN and weight.shape[0] <= 16:
        return 0.25 * noise  # a router: its logits then have a standard deviation of about 2
    return 0.12 * noise
