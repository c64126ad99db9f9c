"""Quantised checkpoints on the tuned kernels: the tokens of their dequantised twins, whatever packed them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import quantized_checkpoints as checkpoints
from tests.quantized_checkpoints import AWQ_CONFIG, FP8_CONFIG, compressed_config, quantized_twins
from tilecast.engine.adapted import adapted_of
from tilecast.engine.checkpoint import inspect_checkpoint
from tilecast.engine.load import load_model
from tilecast.engine.quantized import contents_of, dense_weight, recipe_of
from tilecast.engine.quantized_module import stacks_of
from tilecast.engine.quantized_rows import form_for, read_rows
from tilecast.engine.tensor_files import TensorFiles
from tilecast.engine.transformers import experts_modules
from tilecast.errors import ModelError
from tilecast.kernels.formats import QuantizedStack
from tilecast.models import resolve
from tilecast.models.quantization import read_quantization
from tilecast.problem import weight_format

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("registered")

IDS = (torch.arange(1, 41).view(2, 20) * 7) % 97
WIDE = {"intermediate_size": 96}
EVERYTHING = re.compile(r".*\.(experts\.\d+\.\w+|self_attn\.\w+_proj|shared_experts\.\w+)\.weight")

FORMS: dict[str, tuple[checkpoints.Quantizer, dict[str, Any]]] = {
    "awq_g32": (checkpoints.awq(), AWQ_CONFIG),
    "int4_g32": (checkpoints.packed(4, 32), compressed_config("pack-quantized")),
    "awq_g32 packed": (
        checkpoints.packed(4, 32, symmetric=False), compressed_config("pack-quantized", symmetric=False),
    ),
    "int8_g32": (checkpoints.packed(8, 32), compressed_config("pack-quantized", num_bits=8)),
    "int8_channel": (
        checkpoints.int8(), compressed_config("int-quantized", num_bits=8, strategy="channel", group_size=None),
    ),
    "fp8_block128": (checkpoints.fp8("block"), FP8_CONFIG),
    "fp8_channel": (
        checkpoints.fp8("channel"),
        compressed_config("float-quantized", type="float", num_bits=8, strategy="channel", group_size=None),
    ),
    "fp8_tensor": (checkpoints.fp8("tensor"), FP8_CONFIG | {"weight_block_size": None}),
}  # fmt: skip


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return quantized_twins(tmp_path_factory.mktemp("awq"), "mixtral", checkpoints.awq(), AWQ_CONFIG, **WIDE)


@pytest.fixture
def folder(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    for path in twins[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder: Path, experts: str = "tilecast", **options: Any) -> Any:
    chosen = {"experts_implementation": experts, "dtype": torch.float32, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **chosen)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def greedy(model: Any) -> list[list[int]]:
    found: list[list[int]] = model.generate(IDS, max_new_tokens=12, do_sample=False).tolist()
    return found


def experts_of(model: Any) -> list[torch.nn.Module]:
    return [module for _, module in experts_modules(model)]


def stack_of(module: torch.nn.Module) -> QuantizedStack:
    state = adapted_of(module)
    assert state is not None and state.reason is None
    found = state.plain().w13
    assert isinstance(found, QuantizedStack)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_gives_its_dequantised_twins_tokens(form: str, tmp_path: Path) -> None:
    quantize, config = FORMS[form]
    quantized, dense = quantized_twins(tmp_path, "mixtral", quantize, config, **WIDE)
    ours, eager = load_model(quantized, dtype="float32").model, load_model(dense, experts="eager").model
    assert {stack_of(module).format for module in experts_of(ours)} == {form.partition(" ")[0]}
    assert (logits(ours) - logits(eager)).abs().max() < 1e-4
    assert greedy(ours) == greedy(eager)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("form", ["awq_g32", "fp8_block128"])
def test_families_and_quantised_attention(family: str, form: str, tmp_path: Path) -> None:
    quantize, config = FORMS[form]
    names = EVERYTHING if form.startswith("fp8") else checkpoints.EXPERT
    changes = {"moe_intermediate_size": 96}
    quantized, dense = quantized_twins(tmp_path, family, quantize, config, names, **changes)
    ours, eager = load(quantized), load(dense, "eager")
    assert [stack_of(module).format for module in experts_of(ours)]
    assert (logits(ours) - logits(eager)).abs().max() < 1e-4


def test_nothing_is_missing_and_nothing_too_much(twins: tuple[Path, Path]) -> None:
    model, info = load(twins[0], output_loading_info=True)
    assert not any(info.values())
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]


def test_experts_are_held_as_they_are_stored(tmp_path: Path) -> None:
    config = AWQ_CONFIG | {"group_size": 64}
    quantized, _ = quantized_twins(tmp_path, "mixtral", checkpoints.awq(64), config, intermediate_size=128)
    for module in experts_of(load(quantized, dtype=torch.float16)):
        state = adapted_of(module)
        assert state is not None and stacks_of(module) is None, "held twice"
        plain = state.plain()
        held = plain.w13.nbytes + plain.w2.nbytes
        dense = sum(2 * parameter.numel() for parameter in module.parameters())
        assert held <= 0.29 * dense
        assert all(p.untyped_storage().nbytes() == p.itemsize for p in module.parameters())


def test_fp16_and_bf16_models_read_the_same_codes(twins: tuple[Path, Path]) -> None:
    wanted = stack_of(experts_of(load(twins[0]))[0])
    for dtype in (torch.float16, torch.bfloat16):
        model = load(twins[0], dtype=dtype)
        found = stack_of(experts_of(model)[0])
        assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)
        assert model.dtype is dtype and logits(model).isfinite().all()


def test_a_model_switches_to_dense_experts_and_back(twins: tuple[Path, Path]) -> None:
    model, dense = load(twins[0]), load(twins[1], "eager")
    first = greedy(model)
    model.set_experts_implementation("eager")
    assert torch.equal(experts_of(model)[0].gate_up_proj, experts_of(dense)[0].gate_up_proj)
    assert torch.equal(logits(model), logits(dense))
    model.set_experts_implementation("tilecast")
    assert greedy(model) == first


def test_other_experts_run_dequantised(twins: tuple[Path, Path]) -> None:
    model = load_model(twins[0], dtype="float32", experts="eager").model
    assert torch.equal(logits(model), logits(load(twins[1], "eager")))


def test_a_state_dict_has_dequantised_weights(twins: tuple[Path, Path], tmp_path: Path) -> None:
    model, dense = load(twins[0]), load(twins[1], "eager")
    found, wanted = model.state_dict(), dense.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    dense.load_state_dict({name: tensor * 0.5 for name, tensor in found.items()})
    model.load_state_dict(dense.state_dict())
    assert (logits(model) - logits(dense)).abs().max() < 1e-4


def test_a_model_is_copied_and_cast(twins: tuple[Path, Path]) -> None:
    model = load(twins[0])
    codes = stack_of(experts_of(model)[0]).codes
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(other).dtype is torch.bfloat16
    module = experts_of(other)[0]
    assert torch.equal(stack_of(module).codes, codes)
    assert all(p.dtype is torch.bfloat16 and p.untyped_storage().nbytes() == 2 for p in module.parameters())
    # Rounding sends a few tokens to other experts.
    assert (logits(model) - logits(other).float()).abs().median() < 0.1


def test_generation_settings_are_those_of_the_folder(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 33, "top_k": 7}))
    model = load(folder)
    assert model.generation_config.max_length == 33 and model.name_or_path == str(folder)


def test_a_checkpoint_of_a_hub_is_fetched_first(twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(twins[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = transformers.AutoConfig.from_pretrained(twins[0])
    config._experts_implementation = "tilecast"
    model = transformers.MixtralForCausalLM.from_pretrained("some/name", config=config, revision="r1")
    assert asked[0][0] == "some/name" and asked[0][1]["revision"] == "r1"
    assert stack_of(experts_of(model)[0]).format == "awq_g32"


def test_an_unquantised_checkpoint_is_left_to_transformers(twins: tuple[Path, Path]) -> None:
    state = adapted_of(experts_of(load(twins[1]))[0])
    assert state is not None and isinstance(state.plain().w13, torch.Tensor)


# What is wrong with a checkpoint -----------------------------------------------------------------------------------


def refused(folder: Path, pattern: str) -> None:
    for read in (load, load_model):
        with pytest.raises(ModelError) as caught:
            read(folder)
        assert "\n" not in str(caught.value) and re.search(pattern, str(caught.value)), str(caught.value)


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


FIRST = "model.layers.1.block_sparse_moe.experts.3.w1."


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_missing_parts_are_named(folder: Path, part: str) -> None:
    changed(folder, lambda weights: weights.pop(FIRST + part))
    refused(folder, rf"experts\.3\.w1 has no {part}")


def test_a_missing_scale_of_fp8_is_named_with_its_folder(tmp_path: Path) -> None:
    quantize, config = FORMS["fp8_block128"]
    quantized, _ = quantized_twins(tmp_path, "mixtral", quantize, config, **WIDE)
    changed(quantized, lambda weights: weights.pop(FIRST + "weight_scale_inv"))
    words = r"experts\.3\.w1 has neither weight_scale_inv nor weight_scale, expected beside weight$"
    refused(quantized, rf"^{re.escape(str(quantized))}: .*{words}")


def test_a_config_that_names_another_format_is_told_by_what_is_there(folder: Path) -> None:
    says(folder, FP8_CONFIG)
    refused(folder, r"w2 has neither weight_scale_inv nor weight_scale, expected beside qweight, qzeros, scales")


def test_a_config_that_says_dense_weights_are_quantised_is_told(
    twins: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in twins[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    says(tmp_path, AWQ_CONFIG)
    with caplog.at_level("WARNING", logger="tilecast"):
        found = load_model(tmp_path).model(IDS).logits
    (line,) = [record.getMessage() for record in caplog.records if "quantised" in record.getMessage()]
    assert line.startswith(f"{tmp_path / 'config.json'} says that weights are quantised, but no tensor is")
    assert f"{tmp_path}:dense" in line
    assert torch.equal(found, load_model(twins[1]).model(IDS).logits)


def test_a_missing_expert_is_never_random(folder: Path) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith(FIRST)]:
            del weights[name]

    changed(folder, drop)
    refused(folder, r"lacks expert 3's gate projection in model\.layers\.1")


def test_experts_of_a_layer_that_is_not_there_are_refused(folder: Path) -> None:
    changed(folder, lambda weights: weights.update({FIRST.replace("1", "7", 1) + "scales": torch.ones(2, 2).half()}))
    refused(folder, r"has weights that the model does not: model\.layers\.7")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    changed(folder, lambda weights: weights.update({FIRST + "qweight": torch.ones((64, 8), dtype=torch.int32)}))
    refused(folder, r"experts\.3\.w1\.qweight is torch\.int32 \(64, 8\), expected torch\.int32 \(64, 12\)")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scales_that_cannot_be_are_named(form: str, bad: float, tmp_path: Path) -> None:
    quantize, config = FORMS[form]
    parts, _ = quantize(torch.randn((64, 64), generator=torch.Generator().manual_seed(0)))
    name = next(part for part in parts if part.startswith(("scales", "weight_scale")))
    parts[name].view(-1)[-1] = bad
    save_file({f"layer.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    files = TensorFiles(inspect_checkpoint(tmp_path))
    recipe = recipe_of({"quantization_config": config})
    assert recipe is not None
    weight = dense_weight(files, "layer", contents_of(files).linears["layer"], recipe)
    with pytest.raises(ModelError, match=rf"^layer\.{name} holds {bad:g}, expected scales that are finite and not neg"):
        weight[...]


LONG_GROUPS = {
    "int4 in groups of 256": (checkpoints.packed(4, 256), compressed_config("pack-quantized", group_size=256)),
    "awq in groups of 256": (
        checkpoints.packed(4, 256, symmetric=False),
        compressed_config("pack-quantized", group_size=256, symmetric=False),
    ),
}


@pytest.mark.parametrize("form", [*FORMS, *LONG_GROUPS])
def test_a_part_of_a_weight_is_read_as_the_whole_would_be(form: str, tmp_path: Path) -> None:
    quantize, config = (FORMS | LONG_GROUPS)[form]
    parts, _ = quantize(torch.randn((256, 512), generator=torch.Generator().manual_seed(0)))
    save_file({f"layer.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    files = TensorFiles(inspect_checkpoint(tmp_path))
    recipe, known = recipe_of({"quantization_config": config}), contents_of(files).linears["layer"]
    assert recipe is not None
    name = form_for(files, "layer", known, recipe, 512)
    whole = read_rows(files, "layer", known, recipe, (256, 512), name)
    group, tall, wide = weight_format(name).group, weight_format(name).rows, weight_format(name).codes_per_byte
    for rows, columns in ((range(128, 256), range(512)), (range(256), range(128, 384)), (range(128), range(384, 512))):
        found = read_rows(files, "layer", known, recipe, (256, 512), name, rows, columns)
        here, there = slice(rows.start, rows.stop), slice(columns.start // wide, columns.stop // wide)
        assert torch.equal(found.codes.view(torch.uint8), whole.codes.view(torch.uint8)[here, there])
        blocks = slice(rows.start // tall, rows.stop // tall) if tall else slice(None)
        groups = slice(columns.start // group, columns.stop // group) if group else slice(None)
        for mine, all_ in ((found.scales, whole.scales), (found.zeros, whole.zeros)):
            assert (mine is None) == (all_ is None)
            assert mine is None or all_ is None or torch.equal(mine, all_[blocks, groups])


def test_scales_of_different_dtypes_are_all_kept(folder: Path) -> None:
    def widen(weights: dict[str, torch.Tensor]) -> None:
        weights[FIRST + "scales"] = weights[FIRST + "scales"].float() * (1 + 2**-20)

    changed(folder, widen)
    stack = stack_of(experts_of(load(folder))[1])
    wanted = load_file(folder / "model.safetensors")[FIRST + "scales"].T
    assert torch.equal(stack.scales[3, : len(wanted)], wanted)


def test_a_shape_that_is_said_otherwise_is_refused(tmp_path: Path) -> None:
    quantize, config = FORMS["int4_g32"]
    quantized, _ = quantized_twins(tmp_path, "mixtral", quantize, config, **WIDE)
    changed(quantized, lambda weights: weights.update({FIRST + "weight_shape": torch.tensor([64, 96])}))
    refused(quantized, r"experts\.3\.w1\.weight_shape says \[64, 96\], expected \[96, 64\]")


def test_missing_dense_weights_are_an_error_as_ever(folder: Path) -> None:
    changed(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lacks weights that the model needs: lm_head\.weight"):
        load_model(folder)


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        (AWQ_CONFIG | {"group_size": 64}, r"qzeros|inputs, which cut a group of 64"),
        (AWQ_CONFIG | {"group_size": 48}, "group_size 48"),
        (AWQ_CONFIG | {"version": "gemv"}, "awq gemv.*others order words otherwise"),
        (AWQ_CONFIG | {"bits": 8}, "with bits 8"),
        (AWQ_CONFIG | {"zero_point": False}, "zero_point False"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        (FP8_CONFIG | {"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        (FP8_CONFIG | {"fmt": "e5m2"}, "fmt 'e5m2'"),
        (FP8_CONFIG | {"weight_block_size": 128}, "weight_block_size 128"),
        (compressed_config("marlin-24"), "format 'marlin-24'"),
        (compressed_config("pack-quantized", group_size="x"), "group_size 'x'"),
        (compressed_config("pack-quantized", strategy="group", group_size=-1), "group_size -1"),
        (compressed_config("pack-quantized", num_bits=3), "'int' weights of 3 bits"),
        (compressed_config("pack-quantized", actorder="group"), "actorder 'group'"),
        (compressed_config("nvfp4-pack-quantized", type="float"), "'float' weights of 4 bits"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 schemes for weights"),
    ],
)
def test_configs_that_are_not_read_are_refused(folder: Path, config: object, pattern: str) -> None:
    says(folder, config)
    refused(folder, pattern)


@pytest.mark.parametrize(
    ("config", "words"),
    [(AWQ_CONFIG | {"bits": 8}, "with bits 8"), ([1], r"quantization_config is [1], expected an object")],
)
def test_loading_names_the_config_that_is_not_read(folder: Path, config: object, words: str) -> None:
    says(folder, config)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ") and words in str(caught.value)


def says(folder: Path, quantization: object) -> None:
    """Have a checkpoint's config say this of its quantisation."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def test_an_order_of_activations_is_refused(tmp_path: Path) -> None:
    quantize, config = FORMS["int4_g32"]
    quantized, _ = quantized_twins(tmp_path, "mixtral", quantize, config, **WIDE)
    changed(quantized, lambda weights: weights.update({FIRST + "weight_g_idx": torch.zeros(64, dtype=torch.int32)}))
    refused(quantized, "activation order")


@pytest.mark.parametrize("fields", [{"version": None}, {"group_size": None}, {"version": "GEMM"}])
def test_fields_without_a_value_mean_what_they_mean_to_the_tuner(fields: dict[str, Any]) -> None:
    config = AWQ_CONFIG | {"group_size": 128} | fields
    found = recipe_of({"quantization_config": config})
    assert found is not None and read_quantization(config).format == f"awq_g{found.group}" == "awq_g128"


def test_methods_of_others_are_left_to_transformers() -> None:
    assert recipe_of({"quantization_config": {"quant_method": "mxfp4"}}) is None
    assert recipe_of({}) is None
    nested = {"text_config": {"quantization_config": AWQ_CONFIG}}
    found = recipe_of(nested)
    assert found is not None and (found.kind, found.group) == ("awq", 32)


@pytest.mark.parametrize("form", FORMS)
def test_the_config_alone_says_the_same_format(form: str, tmp_path: Path) -> None:
    """What `tune` and `coverage` read of a checkpoint is what loading finds in its files."""
    quantize, config = FORMS[form]
    quantized, _ = quantized_twins(tmp_path, "mixtral", quantize, config, **WIDE, num_hidden_layers=1)
    assert {group.layer.weight_format for group in resolve(str(quantized)).layers} == {form.partition(" ")[0]}
