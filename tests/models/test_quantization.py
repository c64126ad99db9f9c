"""What `quantization_config` says of the experts, as AutoAWQ, compressed-tensors and fp8 checkpoints write it."""

from __future__ import annotations

from typing import Any

import pytest

from tilecast.errors import ModelError
from tilecast.models.quantization import read_quantization
from tilecast.models.read import read_config

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_local_experts": 8, "num_experts_per_tok": 2, "torch_dtype": "float16",
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def formats(config: dict[str, Any], dtype: str | None = None, **fields: Any) -> dict[str, str]:
    """Return the weight format of the layers by their indices."""
    model = read_config(
        {**MIXTRAL, **fields, "quantization_config": config}, name="tiny", source="tiny.json", dtype=dtype
    )
    return {group.indices: group.layer.weight_format for group in model.layers}


def compressed(weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **fields}


def scheme(bits: int, strategy: str, *, kind: str = "int", **fields: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **fields}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AWQ, "awq_g128"),
        ({"quant_method": "awq", "bits": 4}, "awq_g128"),
        ({**AWQ, "group_size": 32, "version": "GEMM"}, "awq_g32"),
        (FP8, "fp8_block128"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8_tensor"),
        (compressed(scheme(4, "group", group_size=64)), "int4_g64"),
        (compressed(scheme(4, "group", group_size=128, symmetric=False)), "awq_g128"),
        # Longer groups are cut into the longest that a format has.
        (compressed(scheme(4, "group", group_size=256)), "int4_g128"),
        (compressed(scheme(4, "channel")), "int4_g128"),
        (compressed(scheme(8, "group", group_size=32)), "int8_g32"),
        (compressed(scheme(8, "channel")), "int8_channel"),
        (compressed(scheme(8, "tensor", kind="float")), "fp8_tensor"),
        (compressed(scheme(8, "channel", kind="float")), "fp8_channel"),
        (compressed(scheme(8, "block", kind="float", block_structure=[128, 128])), "fp8_block128"),
    ],
)
def test_configs_name_formats(config: dict[str, Any], expected: str) -> None:
    assert formats(config) == {"0-3": expected}


def test_the_dtype_given_is_that_of_hidden_states() -> None:
    config = {**MIXTRAL, "quantization_config": AWQ}
    (group,) = read_config(config, name="tiny", source="tiny.json").layers
    assert (group.layer.dtype, group.layer.weight_format) == ("fp16", "awq_g128")
    (group,) = read_config(config, name="tiny", source="tiny.json", dtype="bf16").layers
    assert (group.layer.dtype, group.layer.weight_format) == ("bf16", "awq_g128")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, r"tiny.json: weights are quantised \(gptq\)"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ("awq", "quantization_config is 'awq', expected an object"),
        ({**AWQ, "version": "gemv"}, r"awq gemv"),
        ({**AWQ, "bits": 8}, r"with bits 8, .*; expected bits 4, group_size 32, 64 or 128, zero_point true"),
        ({**AWQ, "group_size": -1}, "group_size -1"),
        ({**AWQ, "zero_point": False}, "zero_point False"),
        ({**AWQ, "modules_to_not_convert": "gate"}, "expected a list of names"),
        ({**FP8, "weight_block_size": [64, 64]}, r"\[64, 64\]"),
        ({**FP8, "fmt": "e5m2"}, "e5m2"),
        ({**FP8, "fmt": "e4m3fnuz"}, "e4m3fnuz"),
        ({**FP8, "weight_block_size": 128}, "weight_block_size 128"),
        ({**AWQ, "group_size": 128.0}, "group_size 128.0"),
        (compressed(scheme(8, {"a": 1}, kind="float")), "weights of 8 bits by"),
        (compressed(scheme(8, "block", kind="float", block_structure=128)), "weights of 8 bits by 'block'"),
        (compressed(scheme(4, "group", group_size=128, actorder="group")), "actorder 'group'"),
        (compressed(scheme(8, "channel", symmetric=False)), "symmetric False"),
        (compressed(scheme(2, "group", group_size=128)), "'int' weights of 2 bits"),
        (compressed(scheme(4, "group", group_size=0)), "group_size 0"),
        (compressed(scheme(4, "tensor_group", kind="float")), "'float' weights of 4 bits"),
        (compressed({}, config_groups={}), "0 schemes"),
        ({**compressed(scheme(8, "channel")), "ignore": ["re:("]}, "which is no pattern"),
    ],
)
def test_what_no_kernel_reads_is_refused_in_one_line(config: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        formats(config)
    assert ("\n" not in str(caught.value) and "name the dtype" in str(caught.value)) or "ignore" in str(config)


def test_sizes_that_cut_a_group_are_refused() -> None:
    with pytest.raises(ModelError, match="hidden size H is 544, which cuts a group of 128 of awq_g128 in two"):
        formats(AWQ, hidden_size=544)
    with pytest.raises(ModelError, match="groups are of all of 512 and 1000 elements"):
        formats(compressed(scheme(4, "channel")), intermediate_size=1000)
    assert formats(FP8, intermediate_size=1000) == {"0-3": "fp8_block128"}


@pytest.mark.parametrize(
    ("ignored", "expected"),
    [
        (["gate", "lm_head"], {"0-3": "awq_g128"}),
        (["mlp.gate", "model.layers.0.block_sparse_moe.gate", "self_attn"], {"0-3": "awq_g128"}),
        (["model.layers.0."], {"0": "dense", "1-3": "awq_g128"}),
        (["model.layers.0"], {"0": "dense", "1-3": "awq_g128"}),
        (["model.layers.1.block_sparse_moe.experts"], {"0,2-3": "awq_g128", "1": "dense"}),
        ([f"model.layers.3.mlp.experts.0.w{place}" for place in (1, 2, 3)], {"0-2": "awq_g128", "3": "dense"}),
        (["experts"], {"0-3": "dense"}),
        (["model.layers.[01].mlp"], {"0-1": "dense", "2-3": "awq_g128"}),
    ],
)  # fmt: skip
def test_modules_that_are_left_dense(ignored: list[str], expected: dict[str, str]) -> None:
    assert formats({**AWQ, "modules_to_not_convert": ignored}) == expected


def test_patterns_of_modules_that_are_left_dense() -> None:
    config = compressed(scheme(8, "channel"), ignore=["lm_head", "re:.*mlp.gate$", r"re:.*layers\.2\.mlp\.experts.*"])
    assert formats(config) == {"0-1,3": "int8_channel", "2": "dense"}


def test_experts_of_which_only_some_projections_are_quantised_are_refused() -> None:
    with pytest.raises(ModelError, match="w2 of layer 0's experts are not quantised and others are"):
        formats({**AWQ, "modules_to_not_convert": ["w2"]})


def test_long_lists_of_names_are_quick() -> None:
    names = [f"model.layers.{index}.mlp.gate" for index in range(20_000)]
    stored = read_quantization({**FP8, "modules_to_not_convert": names})
    assert [stored.format_for(index, 256, 256) for index in range(3)] == ["fp8_block128"] * 3
