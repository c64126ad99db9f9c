"""Quantising a checkpoint's experts: AWQ's or fp8's tensors in place of the dense ones, everything else as it was.

Written as AutoAWQ writes a linear layer, and fp8 as DeepSeek's checkpoints have it, so that others read it too.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilecast.canonical import Json
from tilecast.engine.calibration import Seen, own_scales, sequences_of, shared_scales, watch
from tilecast.engine.checkpoint import CONFIG, INDEX, TOKENIZER_FILES, WEIGHTS, Checkpoint, inspect_checkpoint
from tilecast.engine.quantized import EXPERT, ROLES, recipe_of
from tilecast.engine.tensor_files import TensorFiles
from tilecast.errors import InputError, ModelError, UsageError
from tilecast.kernels.awq import CODES_PER_WORD, Rows, awq_of_rows
from tilecast.kernels.compressed import BLOCK
from tilecast.kernels.formats import quantize
from tilecast.problem import GROUPS, ExpertGemm, ExpertLayer

logger = logging.getLogger(__name__)

FORMATS = ("awq", "fp8")
SHARD_BYTES = 4 << 30
COARSE = 2.0**-20
"""Below it float16 has fewer than 16 numbers."""
NORM = "post_attention_layernorm.weight"
FOLDED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe",
)  # fmt: skip
"""Families whose experts, router and shared experts alone read the output of a layer's `NORM`, a plain product."""

Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was made: how many weights of experts, their bytes before and after, and layers whose inputs were scaled."""

    folder: Path
    format: str
    projections: int
    bytes_before: int
    bytes_after: int
    scaled_layers: int

    def document(self) -> dict[str, Json]:
        """Return it as JSON."""
        return {
            "folder": str(self.folder), "format": self.format, "projections": self.projections,
            "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "scaled_layers": self.scaled_layers,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer's experts: the keys of their weights by (expert, role), and the name of the block around them."""

    block: str
    keys: dict[tuple[int, str], str]

    @property
    def gated(self) -> bool:
        return any(role == "gate" for _, role in self.keys)

    @property
    def experts(self) -> int:
        return 1 + max(expert for expert, _ in self.keys)


def quantize_checkpoint(
    folder: Path | str, out: Path | str, *, form: str, group: int = 128, calibration: str | None = None,
    progress: Progress | None = None,
) -> Quantized:  # fmt: skip
    """Write `folder`'s checkpoint to the new folder `out` with its experts in `form`: awq in groups of `group`, or fp8.

    Weights are rounded to nearest. With a `calibration` text and awq, scales are searched for as `calibration` says;
    they are folded into the norm before the experts (for the families of FOLDED) and into the up projection's rows.
    Raises UsageError for options that do not fit, ModelError for a checkpoint whose experts cannot be quantised.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise UsageError("safetensors is missing; install tilecast[hf]")
    folder, out = Path(folder), Path(out)
    if form not in FORMATS or group not in GROUPS:
        raise UsageError(f"format is {form!r:.20} in groups of {group}, expected {' or '.join(FORMATS)} and {GROUPS}")
    if calibration is not None and form != "awq":
        raise UsageError("fp8 rounds in proportion, so scales gain nothing; leave out the calibration text")
    if os.path.lexists(out):  # a link that leads nowhere is something, too
        raise UsageError(f"{out} exists already; name a new folder")
    checkpoint = inspect_checkpoint(folder)
    if checkpoint.config.get("quantization_config") or recipe_of(checkpoint.config) is not None:
        raise ModelError(f"{folder} is quantised already")
    files = TensorFiles(checkpoint)
    layers = _layers(files)
    _check_shapes(files, layers, form, group)
    report = progress or (lambda done, text: None)
    factors, scaled = _Factors(), 0
    if calibration is not None:
        scaled = _calibrate(checkpoint, files, layers, f"awq_g{group}", calibration, factors, report)
    return _write(files, out, layers, form, group, factors, scaled, report)


class _Factors:
    """What tensors are multiplied by before they are rounded or written: by rows, and by columns or elements."""

    def __init__(self) -> None:
        self.rows: dict[str, torch.Tensor] = {}
        self.columns: dict[str, torch.Tensor] = {}

    def apply(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor multiplied, in float32 if it is at all."""
        tensor = tensor.float() * self.columns[key] if key in self.columns else tensor
        return tensor.float() * self.rows[key][:, None] if key in self.rows else tensor


# What there is ---------------------------------------------------------------------------------------------------


def _layers(files: TensorFiles) -> dict[int, _Layer]:
    found: dict[int, _Layer] = {}
    for key in files:
        match = EXPERT.fullmatch(key.removesuffix(".weight"))
        if match is None or not key.endswith(".weight") or match["name"] not in ROLES:
            continue
        block = match["block"].rpartition(".")[0]
        layer = found.setdefault(int(match["layer"]), _Layer(block=block, keys={}))
        layer.keys[int(match["expert"]), ROLES[match["name"]]] = key
    if not found:
        raise ModelError(
            f"{files.folder} has no experts stored as linear layers of their own, such as "
            "model.layers.0.mlp.experts.0.gate_proj.weight; only those are quantised"
        )
    return found


def _check_shapes(files: TensorFiles, layers: Mapping[int, _Layer], form: str, group: int) -> None:
    shapes = {}
    for key in (key for layer in layers.values() for key in layer.keys.values()):
        place = files.place(key)
        if len(place.shape) != 2 or not place.dtype.is_floating_point or place.dtype.itemsize < 2:
            raise ModelError(f"{key} is {place.dtype} {place.shape}, expected a dense weight of two dimensions")
        shapes[key] = place.shape

    def fits(shape: Sequence[int], size: int) -> bool:
        rows, width = shape
        return width % size == 0 and rows % CODES_PER_WORD == 0

    wrong = next((key for key, shape in shapes.items() if not fits(shape, group)), None)
    if form == "awq" and wrong is not None:
        rows, width = shapes[wrong]
        others = [str(size) for size in GROUPS if all(fits(shape, size) for shape in shapes.values())]
        hint = f"groups of {', '.join(others)} would" if others else "no group fits all weights; fp8 would"
        raise ModelError(
            f"{wrong} has {rows} outputs and {width} inputs, which do not fit words of {CODES_PER_WORD} and "
            f"groups of {group}; {hint}"
        )


# Scales ------------------------------------------------------------------------------------------------------------


def _calibrate(
    checkpoint: Checkpoint, files: TensorFiles, layers: Mapping[int, _Layer], form: str, text: str, factors: _Factors,
    report: Progress,
) -> int:  # fmt: skip
    """Find scales for all layers on a text; return how many layers' inputs are scaled."""
    # Imported here: plain rounding needs no model.
    from tilecast.engine.load import load_model
    from tilecast.engine.quantized_loading import LAYER
    from tilecast.engine.transformers import experts_modules

    if not any((checkpoint.folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{checkpoint.folder} has no tokenizer, which a calibration text needs")
    report(0.0, "loading the model")
    loaded = load_model(checkpoint.folder, experts="eager")
    assert loaded.tokenizer is not None
    numbered = {int(match[1]): name for name, _ in experts_modules(loaded.model) if (match := LAYER.search(name))}
    if not layers.keys() <= numbered.keys():
        raise ModelError(f"the model has experts in layers {sorted(numbered)}, the files in {sorted(layers)}")
    modules = {name: loaded.model.get_submodule(name) for layer, name in numbered.items() if layer in layers}
    seen = watch(loaded.model, modules, sequences_of(loaded.tokenizer(text)["input_ids"]))
    family = str(checkpoint.config.get("model_type"))
    if family not in FOLDED:
        logger.warning("nothing is known to fold the scales of %s's experts' inputs into: those round plainly", family)
    scaled = 0
    for count, (number, layer) in enumerate(sorted(layers.items())):
        report(0.5 * count / len(layers), f"scales of layer {number}")
        own = seen.get(numbered[number])
        if own is not None:
            scaled += _fold(files, layer, own, form, modules[numbered[number]], factors, known=family in FOLDED)
    return scaled


def _fold(
    files: TensorFiles, layer: _Layer, seen: Seen, form: str, module: Any, factors: _Factors, *, known: bool
) -> bool:
    """Search for the scales of one layer and note what they are folded into; return whether its inputs are scaled."""
    device = seen.total.device

    def read(expert: int, role: str) -> torch.Tensor:
        return files.read(layer.keys[expert, role]).to(device, torch.float32)

    roles = ("gate", "up") if layer.gated else ("up",)
    prefix = layer.block.rpartition(".")[0]
    norm = f"{prefix}.{NORM}"
    scaled = False
    if known and norm in files:
        weights = [tuple(read(expert, role) for role in roles) for expert in range(layer.experts)]
        scales = shared_scales(seen, weights, lambda weight: _rounded(weight, form))
        del weights
        scaled = bool((scales != 1).any())
        if scaled:
            factors.columns[norm] = (1 / scales).cpu()
            for key in _readers(files, layer, len(scales)):
                factors.columns[key] = scales.cpu()
    if not layer.gated:
        return scaled
    for expert in range(layer.experts):
        rows = seen.of_expert(expert)
        with torch.no_grad():
            inner = torch.cat([rows @ read(expert, role).T for role in roles], dim=-1)
            middle = module._apply_gate(inner).float()
        own = own_scales(middle, read(expert, "down"), lambda weight: _rounded(weight, form)).cpu()
        factors.columns[layer.keys[expert, "down"]] = own
        factors.rows[layer.keys[expert, "up"]] = 1 / own
    return scaled


def _readers(files: TensorFiles, layer: _Layer, hidden: int) -> Iterator[str]:
    """Give the weights that read what a layer's experts read: theirs, the router's, shared experts'."""
    experts = set(layer.keys.values())
    for key in files:
        if not key.startswith(f"{layer.block}.") or "down_proj" in key:
            continue
        if key in experts and key not in {layer.keys[place] for place in layer.keys if place[1] != "down"}:
            continue
        shape = files.place(key).shape
        if len(shape) == 2 and shape[1] == hidden:
            yield key


def _single(rows: int, width: int, form: str) -> ExpertGemm:
    """Return the GEMM of one weight [rows, width] in a weight format."""
    return ExpertLayer(
        hidden=rows, intermediate=width, experts=1, top_k=1, activation="identity", gated=False, weight_format=form
    ).down


def _rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    gemm = _single(weight.shape[0], weight.shape[1], form)
    return quantize(weight[None], gemm).dequantized(gemm, 0, torch.float32)


# Writing -----------------------------------------------------------------------------------------------------------


def _write(
    files: TensorFiles, out: Path, layers: Mapping[int, _Layer], form: str, group: int, factors: _Factors,
    scaled: int, report: Progress,
) -> Quantized:  # fmt: skip
    experts = {key for layer in layers.values() for key in layer.keys.values()}
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror or error}") from error
    start = 0.5 if factors.columns else 0.0
    shards = _Shards(partial)
    before = after = 0
    keys = list(files)
    for count, key in enumerate(keys):
        read = files.read(key)
        tensor = factors.apply(key, read)
        if key not in experts:
            # Exact: their factors are powers of two.
            shards.add(key, tensor.to(read.dtype))
            continue
        if count % 64 == 0:
            report(start + (1 - start) * count / len(keys), key)
        place = files.place(key)
        before += place.end - place.begin
        try:
            parts = _stored(tensor.float(), form, group)
        except InputError as error:
            raise ModelError(f"{key} cannot be quantised: {error}") from error
        for part, stored in parts.items():
            shards.add(f"{key.removesuffix('weight')}{part}", stored)
            after += stored.nbytes
    shards.finish()
    _copy_others(files, partial, form, group, experts)
    partial.rename(out)
    report(1.0, "done")
    return Quantized(
        folder=out, format=_format(form, group), projections=len(experts), bytes_before=before,
        bytes_after=after, scaled_layers=scaled,
    )  # fmt: skip


def _format(form: str, group: int) -> str:
    """Return the weight format that is written."""
    return f"awq_g{group}" if form == "awq" else f"fp8_block{BLOCK}"


def _stored(weight: torch.Tensor, form: str, group: int) -> dict[str, torch.Tensor]:
    """Return a weight's tensors by part, as checkpoints of its format name them."""
    gemm = _single(weight.shape[0], weight.shape[1], _format(form, group))
    stack = quantize(weight[None], gemm)
    if form == "awq" and bool((stack.scales < COARSE).any()):
        # float16 has too few numbers there; readers of AWQ take scales of another float type and cast them.
        stack = quantize(weight[None], gemm, torch.float32)
    if form == "fp8":
        return {"weight": stack.codes[0], "weight_scale_inv": stack.scales[0]}
    assert stack.zeros is not None, "AWQ has zero points"
    return awq_of_rows(Rows(stack.codes[0], stack.scales[0], stack.zeros[0]))._asdict()


class _Shards:
    """Tensors written into files of a limited size."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        if self._held and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._held[key] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write what is held, name the files by their number, and write the index of several."""
        self._flush()
        count = len(self._files)
        placed: dict[str, str] = {}
        for number, keys in enumerate(self._files):
            name = WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"part-{number}").rename(self._folder / name)
            placed.update(dict.fromkeys(keys, name))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": placed}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        # Imported here: it comes with the extra `hf`, as transformers does.
        from safetensors.torch import save_file

        save_file(self._held, self._folder / f"part-{len(self._files)}", metadata={"format": "pt"})
        self._files.append(list(self._held))
        self._held, self._bytes = {}, 0


def _copy_others(files: TensorFiles, out: Path, form: str, group: int, experts: set[str]) -> None:
    """Write the config, saying what is quantised and what is not, and copy the tokenizer and the like."""
    config = json.loads((files.folder / CONFIG).read_text(encoding="utf-8"))
    kept = _not_converted(files, experts)
    if form == "awq":
        said: dict[str, Any] = {
            "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
        }  # fmt: skip
    else:
        said = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    config["quantization_config"] = said | {"modules_to_not_convert": kept}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in sorted(files.folder.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name == INDEX
        if path.is_file() and not weights and path.name != CONFIG and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)


def _not_converted(files: TensorFiles, experts: set[str]) -> list[str]:
    """Return names of the linear layers that stay dense, as short as they can be.

    Readers look for them anywhere in a name, so a layer's number is left out unless that would also name an expert's.
    """
    names = set()
    quantized = {key.removesuffix(".weight") for key in experts}
    for key in files:
        base = key.removesuffix(".weight")
        if key in experts or not key.endswith(".weight") or len(files.place(key).shape) != 2:
            continue
        short = base.split(".layers.")[-1].partition(".")[2] if ".layers." in base else base
        names.add(base if any(short in name for name in quantized) else short)
    return sorted(names)
