from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tilecast.errors import ModelError
from tilecast.models import FAMILIES, preset_names, resolve
from tilecast.problem import ExpertLayer

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_act": "silu",
}  # fmt: skip

REQUIRED_PRESETS = {
    "mixtral-8x7b", "mixtral-8x22b", "qwen1.5-moe-a2.7b", "qwen2-57b-a14b", "qwen3-30b-a3b", "qwen3-235b-a22b",
    "deepseek-v2-lite", "deepseek-v3", "olmoe-1b-7b", "phi-3.5-moe", "gpt-oss-20b", "gpt-oss-120b",
}  # fmt: skip

PUBLISHED_BILLIONS = {
    "dbrx": 132, "deepseek-v2": 236, "deepseek-v2-lite": 15.7, "deepseek-v3": 671, "glm-4.5-air": 106,
    "gpt-oss-120b": 116.8, "gpt-oss-20b": 20.9, "granite-3.0-1b-a400m": 1.3, "jamba-mini": 52, "llama-4-scout": 109,
    "mixtral-8x22b": 141, "mixtral-8x7b": 46.7, "olmoe-1b-7b": 6.9, "phi-3.5-moe": 41.9, "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4, "qwen3-235b-a22b": 235, "qwen3-30b-a3b": 30.5, "qwen3-next-80b-a3b": 80,
}  # fmt: skip
"""Total parameters in billions, as the models' authors give them."""


def write(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def refusal(model: str, **options: str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_presets_are_there() -> None:
    assert set(preset_names()) >= REQUIRED_PRESETS
    assert sorted(PUBLISHED_BILLIONS) == list(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_preset_weighs_what_its_authors_say(name: str) -> None:
    model = resolve(name)
    weights = sum(
        group.count * group.layer.experts * gemm.n * gemm.k for group in model.layers for gemm in group.layer.gemms
    )
    # What is left for attention, embeddings, shared experts and dense layers.
    assert 0.78 * PUBLISHED_BILLIONS[name] <= weights / 1e9 < PUBLISHED_BILLIONS[name]
    assert (model.source, model.name) == ("preset", name)


def test_mixtral_preset() -> None:
    model = resolve("Mixtral-8x7B")
    (group,) = model.layers
    assert group.layer == ExpertLayer(hidden=4096, intermediate=14336, experts=8, top_k=2, dtype="bf16")
    assert (group.count, group.indices, model.moe_layers, model.dense_layers) == (32, "0-31", 32, 0)


def test_dense_layers_come_first_in_deepseek() -> None:
    model = resolve("deepseek-v3")
    assert (model.layers[0].indices, model.dense_layers, model.moe_layers) == ("3-60", 3, 58)
    assert model.shared_intermediate == 2048
    assert any("shared" in note for note in model.notes)
    assert any("fp8" in note for note in model.notes)


def test_interleaved_layers_are_written_as_steps() -> None:
    assert resolve("jamba-mini").layers[0].indices == "1-31 step 2"


def test_gpt_oss_has_its_own_activation_and_biases() -> None:
    layer = resolve("gpt-oss-20b").layers[0].layer
    assert (layer.activation, layer.bias, layer.gated) == ("swiglu_oai", True, True)


def test_a_file_and_its_folder_give_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "my-model", MIXTRAL)
    model = resolve(str(path))
    assert model == resolve(str(path.parent))
    assert (model.name, model.source, model.family) == ("my-model", str(path), "mixtral")
    assert model.layers[0].layer == ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2)


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    write(tmp_path / "lr=1", MIXTRAL)
    assert resolve(str(tmp_path / "lr=1")).name == "lr=1"


def test_a_preset_wins_over_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mixtral-8x7b", MIXTRAL)
    monkeypatch.chdir(tmp_path)
    assert resolve("mixtral-8x7b").source == "preset"
    assert resolve("./mixtral-8x7b").layers[0].layer.hidden == 64


@pytest.mark.parametrize(
    ("fields", "given", "expected"),
    [
        ({}, None, "bf16"),
        ({"torch_dtype": "float16"}, None, "fp16"),
        ({"dtype": "float32"}, None, "fp32"),
        ({"dtype": "torch.bfloat16"}, None, "bf16"),
        ({"dtype": None, "torch_dtype": "float16"}, None, "fp16"),
        ({"torch_dtype": "float16"}, "fp32", "fp32"),
        ({"torch_dtype": "float8_e4m3fn"}, "bfloat16", "bf16"),
    ],
)
def test_dtype(tmp_path: Path, fields: dict[str, Any], given: str | None, expected: str) -> None:
    assert resolve(str(write(tmp_path, {**MIXTRAL, **fields})), dtype=given).layers[0].layer.dtype == expected


def test_dtypes_that_cannot_be_used(tmp_path: Path) -> None:
    assert "float8_e4m3fn" in refusal(str(write(tmp_path, {**MIXTRAL, "dtype": "float8_e4m3fn"})))
    assert "dtype is 16" in refusal(str(write(tmp_path, {**MIXTRAL, "dtype": 16})))
    assert "disagree" in refusal(str(write(tmp_path, {**MIXTRAL, "dtype": "float16", "torch_dtype": "float32"})))
    assert "expected one of" in refusal("mixtral-8x7b", dtype="int8")


def test_weights_quantised_in_no_known_way_need_a_dtype(tmp_path: Path) -> None:
    path = str(write(tmp_path, {**MIXTRAL, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    message = refusal(path)
    assert "quantised (gptq)" in message and "awq, compressed-tensors, fp8 are read" in message
    model = resolve(path, dtype="bf16")
    assert model.layers[0].layer.weight_format == "dense"
    assert any("gptq" in note for note in model.notes)


def test_a_weight_format_behind_a_colon(tmp_path: Path) -> None:
    layer = resolve("mixtral-8x7b:AWQ_g128").layers[0].layer
    assert (layer.weight_format, layer.dtype) == ("awq_g128", "bf16")
    assert layer.label.endswith("bf16 awq_g128")
    config = {**MIXTRAL, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    folder = write(tmp_path, config).parent
    assert resolve(str(folder)).layers[0].layer.weight_format == "awq_g32"
    dense = resolve(f"{folder}:dense")
    assert dense.layers[0].layer.weight_format == "dense" and any("(awq)" in note for note in dense.notes)
    assert resolve("E=4,H=256,I=256,k=2:int8_channel").layers[0].layer.weight_format == "int8_channel"
    assert "weight format of mixtral-8x7b is 'int5', expected one of dense, awq_g32" in refusal("mixtral-8x7b:int5")
    assert "no preset" in refusal("mixtrel:awq_g128")


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "x:awq_g128"
    folder.mkdir()
    assert resolve(str(write(folder, MIXTRAL))).layers[0].layer.weight_format == "dense"


@pytest.mark.parametrize("name", ["silu", "swish"])
def test_names_of_one_activation(tmp_path: Path, name: str) -> None:
    assert resolve(str(write(tmp_path, {**MIXTRAL, "hidden_act": name}))).layers[0].layer.activation == "silu"


def test_an_activation_that_no_kernel_has_makes_two_layers(tmp_path: Path) -> None:
    config = {**MIXTRAL, "hidden_act": "mish"}
    found = resolve(str(write(tmp_path, config)))
    (group,) = found.layers
    assert group.own_code and any("own code runs it" in note for note in found.notes)
    up, down = group.parts(group.layer)
    assert (up.intermediate, down.intermediate) == (2 * group.layer.intermediate, group.layer.intermediate)
    assert {(one.activation, one.gated) for one in (up, down)} == {("identity", False)}
    quantised = {**config, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    assert "quantised experts run by kernels alone" in refusal(str(write(tmp_path, quantised)))


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    message = refusal(str(write(tmp_path, {**MIXTRAL, "hidden_act": "sillu"})))
    assert "hidden_act is 'sillu'" in message
    assert "silu" in message


def test_an_unknown_architecture_never_borrows_fields(tmp_path: Path) -> None:
    message = refusal(str(write(tmp_path, {**MIXTRAL, "model_type": "mixtral2", "architectures": ["Mixtral2Model"]})))
    assert "'mixtral2'" in message
    assert "Mixtral2Model" in message
    assert "model_type" in message
    for family in FAMILIES:
        assert family in message


@pytest.mark.parametrize("model_type", [["mixtral"], {"a": 1}, 7, ""])
def test_a_model_type_that_is_no_name(tmp_path: Path, model_type: object) -> None:
    assert "model_type" in refusal(str(write(tmp_path, {**MIXTRAL, "model_type": model_type})))


def test_architectures_stand_in_for_a_missing_model_type(tmp_path: Path) -> None:
    config = {**MIXTRAL, "architectures": ["MixtralForCausalLM"]}
    del config["model_type"]
    assert resolve(str(write(tmp_path, config))).family == "mixtral"
    del config["architectures"]
    assert "model_type" in refusal(str(write(tmp_path, config)))


def test_model_type_and_architectures_must_fit(tmp_path: Path) -> None:
    config = {**MIXTRAL, "model_type": "minimax", "architectures": ["MiniMaxM2ForCausalLM"]}
    assert "minimax_m2" in refusal(str(write(tmp_path, config)))


def test_sizes_that_do_not_fit_together(tmp_path: Path) -> None:
    assert "top-k is 9" in refusal(str(write(tmp_path, {**MIXTRAL, "num_experts_per_tok": 9})))
    assert "expected an integer from 1 to" in refusal(str(write(tmp_path, {**MIXTRAL, "num_hidden_layers": 10**9})))
    dense = {"model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 8, "num_hidden_layers": 2,
             "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0, 1]}  # fmt: skip
    assert "none of its 2 layers" in refusal(str(write(tmp_path, dense)))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'"text"', b"[]", b"null", b"7"])
def test_malformed_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    assert str(path) in refusal(str(path))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "larger than 4 MiB" in refusal(str(path))


def test_paths_that_hold_no_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(str(tmp_path))
    assert "no preset, file or folder" in refusal(str(tmp_path / "missing.json"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "not a regular file" in refusal(str(tmp_path / "dangling"))
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(str(tmp_path / "pipe"))


def test_a_typo_gets_close_matches_and_the_list() -> None:
    message = refusal("mixtral-8x7")
    assert "did you mean mixtral-8x7b" in message
    assert "gpt-oss-20b" in message


@pytest.mark.parametrize("model", ["", "  ", "no-such-model-at-all", "a\0b", "mistralai/Mixtral-8x7B-v0.1", "x" * 5000])
def test_names_that_mean_nothing(model: str) -> None:
    assert len(refusal(model)) < 1000
