"""Quantising checkpoints: the keys that others read, the tokens of the dequantised twin, and what a text gains."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import save_tiny, save_tokenizer
from tilecast.engine import quantize as quantize_module
from tilecast.engine.calibration import Seen, own_scales, sequences_of, shared_scales
from tilecast.engine.checkpoint import inspect_checkpoint
from tilecast.engine.load import load_model
from tilecast.engine.quantize import quantize_checkpoint
from tilecast.engine.quantized import contents_of, dense_weight, recipe_of
from tilecast.engine.tensor_files import TensorFiles
from tilecast.errors import InputError, ModelError, UsageError

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("registered")

IDS = (torch.arange(1, 41).view(2, 20) * 7) % 97
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"), intermediate_size=96)


def dense_of(tensors: dict[str, torch.Tensor], base: str) -> torch.Tensor:
    """Return an AWQ layer's weight [N, K], code by code."""
    words, points, scales = (tensors[f"{base}.{part}"] for part in ("qweight", "qzeros", "scales"))
    width, count = words.shape
    group = width // len(points)
    found = torch.empty(8 * count, width)
    for k in range(width):
        for word in range(count):
            for place, column in enumerate(AWQ_ORDER):
                code = int(words[k, word]) >> 4 * place & 15
                zero = int(points[k // group, word]) >> 4 * place & 15
                found[8 * word + column, k] = code - zero
    return found * scales.float().repeat_interleave(group, 0).T


def twin_of(folder: Path, original: Path, out: Path) -> Path:
    """Save what an AWQ checkpoint stands for as a dense one."""
    stored, twin = load_file(folder / "model.safetensors"), load_file(original / "model.safetensors")
    for name in twin:
        base = name.removesuffix(".weight")
        twin[name] = dense_of(stored, base) if f"{base}.qweight" in stored else stored[name]
    out.mkdir()
    (out / "config.json").write_bytes((original / "config.json").read_bytes())
    save_file(twin, out / "model.safetensors", metadata={"format": "pt"})
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def greedy(model: Any) -> list[list[int]]:
    found: list[list[int]] = model.generate(IDS, max_new_tokens=12, do_sample=False).tolist()
    return found


def test_awq_keys_and_shapes_are_autoawqs(mixtral: Path, tmp_path: Path) -> None:
    found = quantize_checkpoint(mixtral, tmp_path / "out", form="awq", group=32)
    tensors, dense = load_file(tmp_path / "out" / "model.safetensors"), load_file(mixtral / "model.safetensors")
    base = "model.layers.1.block_sparse_moe.experts.5.w2"
    seen = {part: (tensors[f"{base}.{part}"].dtype, tuple(tensors[f"{base}.{part}"].shape)) for part in
            ("qweight", "qzeros", "scales")}  # fmt: skip
    assert seen == {
        "qweight": (torch.int32, (96, 8)), "qzeros": (torch.int32, (3, 8)), "scales": (torch.float16, (3, 64)),
    }  # fmt: skip
    untouched = [name for name in dense if ".experts." not in name]
    assert untouched and all(torch.equal(tensors[name], dense[name]) for name in untouched)
    assert len(tensors) == len(untouched) + 3 * found.projections and found.projections == 48
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kept = config.pop("modules_to_not_convert")
    assert config == {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    names = {name.removesuffix(".weight") for name in dense}
    assert all(
        any(short in name for short in kept) == (".experts." not in name) for name in names if "norm" not in name
    )


def test_a_round_trip_gives_the_tokens_of_the_dequantised_twin(mixtral: Path, tmp_path: Path) -> None:
    quantize_checkpoint(mixtral, tmp_path / "awq", form="awq", group=32)
    twin = twin_of(tmp_path / "awq", mixtral, tmp_path / "twin")
    ours, eager = load_model(tmp_path / "awq").model, load_model(twin, experts="eager").model
    assert ours.dtype is torch.float32
    assert (logits(ours) - logits(eager)).abs().max() < 1e-4
    assert greedy(ours) == greedy(eager)


def test_fp8_is_written_as_deepseek_does(mixtral: Path, tmp_path: Path) -> None:
    quantize_checkpoint(mixtral, tmp_path / "fp8", form="fp8")
    tensors, dense = load_file(tmp_path / "fp8" / "model.safetensors"), load_file(mixtral / "model.safetensors")
    for name in [name for name in dense if ".experts." in name]:
        scale = tensors[f"{name}_scale_inv"]
        assert tensors[name].dtype is torch.float8_e4m3fn and scale.shape == (1, 1) and scale.dtype is torch.float32
        dense[name] = tensors[name].float() * scale
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    save_file(dense, tmp_path / "twin" / "model.safetensors", metadata={"format": "pt"})
    ours, eager = load_model(tmp_path / "fp8").model, load_model(tmp_path / "twin", experts="eager").model
    assert greedy(ours) == greedy(eager)


def test_a_large_checkpoint_is_written_in_several_files(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(mixtral, tmp_path / "one", form="awq", group=32)
    monkeypatch.setattr(quantize_module, "SHARD_BYTES", 100_000)
    quantize_checkpoint(mixtral, tmp_path / "many", form="awq", group=32)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(load_file(tmp_path / "many" / index[name])[name], tensor)


# With a text ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model some of whose channels carry much more than others into the experts, and a tokenizer."""
    folder = save_tiny("mixtral", tmp_path_factory.mktemp("uneven"), intermediate_size=96, vocab_size=257)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "post_attention_layernorm" in name:
            weights[name][::16] *= 12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return save_tokenizer(folder)


TEXT = "Tiles are cast from clay, and kernels from tiles; what is cast well is cast once. " * 8


def test_a_text_makes_errors_smaller(uneven: Path, tmp_path: Path) -> None:
    plain = quantize_checkpoint(uneven, tmp_path / "plain", form="awq", group=32)
    scaled = quantize_checkpoint(uneven, tmp_path / "scaled", form="awq", group=32, calibration=TEXT)
    assert (plain.scaled_layers, scaled.scaled_layers) == (0, 2)
    models = [load_model(folder, experts="eager").model for folder in (uneven, plain.folder, scaled.folder)]
    original, rounded, weighed = (logits(model) for model in models)
    assert (weighed - original).pow(2).mean() < 0.7 * (rounded - original).pow(2).mean()
    for name, parameter in models[0].named_parameters():
        if "self_attn" in name:
            assert torch.equal(models[2].get_parameter(name), parameter)


def test_scales_are_folded_without_changing_what_is_computed(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written without rounding, the scaled model is the original: routers bit for bit, experts nearly."""
    monkeypatch.setattr(quantize_module, "_stored", lambda weight, form, group: {"weight": weight})
    monkeypatch.setattr(quantize_module, "_copy_others", lambda *_: None)
    found = quantize_checkpoint(uneven, tmp_path / "folded", form="awq", group=32, calibration=TEXT)
    assert found.scaled_layers == 2
    (found.folder / "config.json").write_bytes((uneven / "config.json").read_bytes())
    before, after = load_file(uneven / "model.safetensors"), load_file(found.folder / "model.safetensors")
    changed = {name.split(".", 3)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert {"post_attention_layernorm.weight", "block_sparse_moe.gate.weight"} <= changed
    norm, router = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.block_sparse_moe.gate.weight"
    factors = before[norm] / after[norm]
    assert torch.equal(factors, factors.log2().round().exp2()) and torch.equal(after[router], before[router] * factors)
    original, folded = load_model(uneven, experts="eager").model, load_model(found.folder, experts="eager").model
    assert (logits(original) - logits(folded)).abs().max() < 1e-4


def test_a_family_that_nothing_is_folded_into_rounds_plainly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tokenizer(save_tiny("nemotron_h", tmp_path / "n", moe_intermediate_size=96, vocab_size=257))
    found = quantize_checkpoint(folder, tmp_path / "out", form="awq", group=32, calibration=TEXT)
    plain = quantize_checkpoint(folder, tmp_path / "plain", form="awq", group=32)
    assert found.scaled_layers == 0 and "nothing is known to fold" in caplog.text
    one, other = (load_file(made.folder / "model.safetensors") for made in (found, plain))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_scales_are_never_worse_than_none() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((40, 32), generator=generator) * torch.logspace(-2, 1, 32)
    weight = torch.randn((16, 32), generator=generator)

    def coarse(w: torch.Tensor) -> torch.Tensor:
        step = w.abs().amax(1, keepdim=True) / 7
        return (w / step).round() * step

    def error(scales: torch.Tensor) -> float:
        return float(((rows @ (coarse(weight * scales) / scales - weight).T) ** 2).sum())

    found = own_scales(rows, weight, coarse)
    assert error(found) < 0.5 * error(torch.ones(32))
    assert torch.equal(own_scales(rows, weight, lambda w: w), torch.ones(32))
    assert torch.equal(own_scales(rows[:0], weight, coarse), torch.ones(32))
    seen = Seen(total=torch.zeros(32))
    seen.add(rows, torch.zeros((40, 1), dtype=torch.int64), 40)
    assert len(seen.of_expert(0)) == 40 and len(seen.of_expert(1)) == 0
    shared = shared_scales(seen, [(weight,), (weight,)], coarse)
    assert torch.equal(shared, shared.log2().round().exp2()) and error(shared) < error(torch.ones(32))


def test_texts_are_cut_into_sequences() -> None:
    assert [len(part) for part in sequences_of(range(1100))] == [512, 512, 76]
    assert sum(map(len, sequences_of(range(10**6)))) == 64 * 512


# What cannot be done ------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_told_in_one_line(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"w2\.weight has 64 outputs and 96 inputs.*groups of 32 would"):
        quantize_checkpoint(mixtral, tmp_path / "a", form="awq", group=64)
    # Groups of 64 would fit the first weight that does not, but not the next ones.
    with pytest.raises(ModelError, match=r"and 64 inputs.*; groups of 32 would"):
        quantize_checkpoint(mixtral, tmp_path / "a", form="awq", group=128)
    with pytest.raises(ModelError, match="no group fits all weights; fp8 would"):
        quantize_checkpoint(
            save_tiny("mixtral", tmp_path / "narrow", intermediate_size=48), tmp_path / "a", form="awq", group=64
        )
    with pytest.raises(UsageError, match="exists already"):
        quantize_checkpoint(mixtral, mixtral, form="awq", group=32)
    with pytest.raises(UsageError, match="format is 'int3'"):
        quantize_checkpoint(mixtral, tmp_path / "a", form="int3")
    with pytest.raises(UsageError, match="leave out the calibration text"):
        quantize_checkpoint(mixtral, tmp_path / "a", form="fp8", calibration=TEXT)
    with pytest.raises(InputError, match="has no tokenizer"):
        quantize_checkpoint(mixtral, tmp_path / "a", form="awq", group=32, calibration=TEXT)
    quantize_checkpoint(mixtral, tmp_path / "once", form="awq", group=32)
    with pytest.raises(ModelError, match="is quantised already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", form="awq", group=32)
    with pytest.raises(ModelError, match="no experts stored as linear layers of their own"):
        quantize_checkpoint(save_tiny("gpt_oss", tmp_path / "g"), tmp_path / "a", form="fp8")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("form", ["awq", "fp8"])
@pytest.mark.parametrize("least", [1e-7, 1e-12])
def test_tiny_weights_are_kept(mixtral: Path, tmp_path: Path, form: str, least: float) -> None:
    shutil.copytree(mixtral, tmp_path / "tiny")
    path = tmp_path / "tiny" / "model.safetensors"
    weights = load_file(path)
    key = next(name for name in weights if name.endswith("experts.1.w3.weight"))
    weights[key] *= least
    save_file(weights, path, metadata={"format": "pt"})
    quantize_checkpoint(tmp_path / "tiny", tmp_path / "made", form=form, group=32)
    files = TensorFiles(inspect_checkpoint(tmp_path / "made"))
    recipe = recipe_of(json.loads((tmp_path / "made" / "config.json").read_text()))
    assert recipe is not None
    base = key.removesuffix(".weight")
    parts = contents_of(files).experts[int(base.split(".")[2])][1, "up"]
    error = dense_weight(files, base, parts, recipe)[...] - weights[key]
    # e4m3 rounds to 4 bits, and AWQ to half a step of 15.
    assert error.norm() / weights[key].norm() < (0.04 if form == "fp8" else 0.15)


def test_weights_that_are_not_finite_are_named(mixtral: Path, tmp_path: Path) -> None:
    shutil.copytree(mixtral, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    weights = load_file(path)
    key = next(name for name in weights if name.endswith("experts.1.w3.weight"))
    weights[key][2, 7] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"^{re.escape(key)} cannot be quantised: weights are not finite"):
        quantize_checkpoint(tmp_path / "bad", tmp_path / "a", form="awq", group=32)
    assert not (tmp_path / "a").exists()
