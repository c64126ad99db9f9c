"""Loading a quantised checkpoint into transformers' model: experts as they are stored, the rest dense.

transformers' own loaders replace linear layers, and so leave experts that lie in one tensor as they were drawn, or
dequantise them. Here transformers loads what is not quantised, and dequantised copies of what is quantised outside
the experts; the experts are read from the files into stacks. All weights are found, or there is an error.

Over several ranks transformers places parameters as its plan says, before it loads any; experts' parameters are taken
out after that, so that each rank reads the part which it was given.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tilecast.engine.agreement import process_group
from tilecast.engine.checkpoint import CONFIG, Checkpoint, agree_on_checkpoint, inspect_checkpoint
from tilecast.engine.group import Group
from tilecast.engine.quantized import (
    Contents,
    Share,
    check_layer,
    check_share,
    contents_of,
    dense_weight,
    read_stacks,
    recipe_of,
)
from tilecast.engine.quantized_module import Stacks, attach
from tilecast.engine.quantized_rows import Recipe
from tilecast.engine.tensor_files import TensorFiles
from tilecast.errors import ModelError
from tilecast.problem import ExpertLayer

logger = logging.getLogger(__name__)

METHOD = "tilecast"
"""The name of our quantiser among those of transformers."""
LAYER = re.compile(r"\blayers\.(\d+)\.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
GIVEN = (
    "pretrained_model_name_or_path", "config", "state_dict", "quantization_config", "use_safetensors",
    "output_loading_info", "dtype", "torch_dtype",
)  # fmt: skip
"""Arguments of `from_pretrained` that loading without a folder gives itself, or has no use for."""
SPLITS = ("distributed_config", "tp_plan", "tp_size")
"""Arguments of `from_pretrained` that split a model over ranks."""

Find = Callable[[torch.nn.Module], list[tuple[str, torch.nn.Module]]]


class _Taken(NamedTuple):
    """An experts module without the parameters of w13 and w2, `known` by name: the layer they make, and the share."""

    name: str
    known: dict[str, torch.Tensor]
    layer: ExpertLayer
    share: Share


class _Plan:
    """What is read where: made before a model is, and used when its weights are loaded."""

    def __init__(self, files: TensorFiles, contents: Contents, recipe: Recipe, find: Find, *, ranks: bool) -> None:
        self.files, self.contents, self.recipe, self.find, self.ranks = files, contents, recipe, find, ranks
        self._modules: dict[int, _Taken] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> _Plan:
        """Return itself: configs that hold it are copied."""
        return self

    def take_out(self, model: torch.nn.Module) -> None:
        """Take the parameters of quantised experts out of a model without memory. Raises ModelError."""
        for name, module in self.find(model):
            match = LAYER.search(name + ".")
            layer = int(match[1]) if match else -1
            if layer not in self.contents.experts:
                continue
            if layer in self._modules:
                raise ModelError(f"{self._modules[layer].name} and {name} are both experts of layer {layer}")
            self._modules[layer] = self._take(name, module, self.contents.experts[layer])
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for layer, found in self.contents.experts.items():
            key = next(iter(next(iter(found.values())).values()))
            if layer not in self._modules and not any(re.search(pattern, key) for pattern in ignored):
                raise ModelError(f"{self.files.folder} has weights that the model does not: {key}")

    def take_out_later(self, model: torch.nn.Module) -> None:
        """Take them out when transformers asks for the model's parameters: it has placed them over ranks by then."""

        def placed(*_: object) -> None:
            handle.remove()
            self.take_out(model)

        handle = model.register_state_dict_pre_hook(placed)

    def fill_in(self, model: torch.nn.Module) -> None:
        """Read this rank's share of the experts of a model whose other weights are loaded. Raises ModelError."""
        for layer, taken in self._modules.items():
            around = model.get_submodule(taken.name.rpartition(".")[0])
            stacks = read_stacks(self.files, self.contents.experts[layer], self.recipe, taken.layer, taken.share)
            device = next((p.device for p in around.parameters()), torch.device("cpu"))
            attach(model.get_submodule(taken.name), Stacks(*stacks).to(device), taken.known)

    def _take(self, name: str, module: torch.nn.Module, found: Mapping[tuple[int, str], Mapping[str, str]]) -> _Taken:
        """Take the weights of quantised experts out of a module without memory. Raises ModelError."""
        gated = bool(getattr(module, "has_gate", True))
        parameters = ("gate_up_proj" if gated else "up_proj", "down_proj")
        first, second = (module._parameters.get(parameter) for parameter in parameters)
        if first is None or second is None or second.dim() != 3:
            raise ModelError(f"{name} does not hold its experts as {' and '.join(parameters)} [E, …, …]")
        experts, hidden, intermediate = second.shape
        transposed = bool(getattr(module, "is_transposed", False))
        if transposed:
            hidden, intermediate = intermediate, hidden
        layer = check_layer(
            self.files, found, self.recipe, hidden=hidden, intermediate=intermediate, experts=experts, gated=gated,
            what=name,
        )  # fmt: skip
        share = _share_of(second, name, inner=1 if transposed else 2)
        check_share(layer, self.recipe, share)
        for parameter in parameters:
            # So it is neither missing among the weights that are loaded nor drawn at random.
            module._parameters[parameter] = None
        module.__dict__["_is_hf_initialized"] = True
        return _Taken(name, dict(zip(parameters, (first, second), strict=True)), layer, share)


def _share_of(down: torch.Tensor, name: str, *, inner: int) -> Share:
    """Return which part of a layer's experts the parameter of w2, whose I is dimension `inner`, gives a rank."""
    whole = Share(experts=range(down.shape[0]), columns=range(down.shape[inner]))
    placements = getattr(down, "placements", None) or ()
    cut = [placement for placement in placements if not placement.is_replicate()]
    if not cut:
        return whole
    dimension = getattr(cut[0], "dim", -2) % 3
    if len(placements) != 1 or dimension not in (0, inner):
        raise ModelError(f"{name} is split as {placements} over ranks, which its quantised weights cannot be")
    mesh: Any = down.device_mesh  # type: ignore[attr-defined]  # a DTensor, as it has placements
    # As torch.distributed cuts: equal parts as far as they reach.
    size = -(-down.shape[dimension] // mesh.size())
    part = range(down.shape[dimension])[mesh.get_local_rank() * size :][:size]
    return replace(whole, experts=part) if dimension == 0 else replace(whole, columns=part, tp=mesh.size())


_as_stored = ContextVar("experts as stored", default=False)


@contextmanager
def experts_as_stored() -> Iterator[None]:
    """Have `from_pretrained` read quantised experts into stacks whatever is to run them: that can be said later."""
    token = _as_stored.set(True)
    try:
        yield
    finally:
        _as_stored.reset(token)


def load_quantized(
    load: Callable[..., Any], cls: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, name: str, find: Find
) -> Any | None:
    """Do what `cls.from_pretrained(*args, **kwargs)` would, with experts as stacks; None where it is to do it itself.

    That is so unless `experts_implementation` is `name`, or the call is under `experts_as_stored`, and the config names
    a quantisation that is read here. `load` is the function behind `from_pretrained`, and `find` gives a model's
    experts modules by name. Raises ModelError.
    """
    config = kwargs.get("config")
    asked = kwargs.get("experts_implementation") or getattr(config, "_experts_implementation", None)
    where = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if not (asked == name or _as_stored.get()) or where is None or kwargs.get("state_dict") is not None:
        return None
    if kwargs.get("quantization_config") is not None or kwargs.get("gguf_file") is not None:
        return None
    if not isinstance(config, _transformers().PreTrainedConfig):
        chosen = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
        config = cls.config_class.from_pretrained(where, **chosen)
    recipe = recipe_of(config.to_dict(), str(where))
    if recipe is None:
        return None
    ranks = any(kwargs.get(key) is not None for key in SPLITS)
    # Under `experts_as_stored` its caller has ranks fail together.
    group = process_group() if ranks and not _as_stored.get() else Group.alone()
    with group.guard():
        checkpoint = inspect_checkpoint(_folder(where, kwargs))
        agree_on_checkpoint(group, checkpoint, {})
        model, info = _load(load, cls, args, kwargs, config, checkpoint, recipe, find, ranks=ranks)
    return (model, info) if kwargs.get("output_loading_info") else model


def _load(
    load: Callable[..., Any], cls: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: Any,
    checkpoint: Checkpoint, recipe: Recipe, find: Find, *, ranks: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """Load a checkpoint's folder; return the model and what transformers tells of the loading."""
    files = TensorFiles(checkpoint)
    contents = contents_of(files)
    if not contents.experts and not contents.linears:
        logger.warning(
            "%s says that weights are quantised, but no tensor is, so experts run dense; tune them as %s:dense",
            checkpoint.folder / CONFIG, checkpoint.folder,
        )  # fmt: skip
    config = copy.deepcopy(config)
    said = _taken_out(config)
    options = {key: value for key, value in kwargs.items() if key not in GIVEN}
    dense = {key: files.on_demand(key) for key in contents.plain}
    for base, parts in contents.linears.items():
        dense[f"{base}.weight"] = dense_weight(files, base, parts, recipe)
    plan = _Plan(files, contents, recipe, find, ranks=ranks)
    model, info = load(
        cls, None, *args[1:], config=config, state_dict=dense, dtype=_dtype(kwargs, config), output_loading_info=True,
        quantization_config=_config_class()(plan), **options,
    )  # fmt: skip
    model.config.quantization_config = said
    _finish(model, checkpoint.folder)
    return model, info


def _finish(model: Any, folder: Path) -> None:
    """Do what transformers does for a model that it loads from a folder, besides its weights."""
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = _transformers().GenerationConfig.from_pretrained(str(folder), local_files_only=True)


def _taken_out(config: Any) -> Any:
    """Take what a config says of quantisation out of it and its parts, and return it."""
    said = None
    for holder in (config, config.get_text_config(decoder=True)):
        if getattr(holder, "quantization_config", None) is not None:
            said = holder.quantization_config
            del holder.quantization_config
    return said


def _dtype(kwargs: Mapping[str, Any], config: Any) -> torch.dtype:
    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if asked in (None, "auto"):
        asked = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(asked, str):
        asked = DTYPES.get(asked.removeprefix("torch."))
    return asked if isinstance(asked, torch.dtype) else torch.float32


def _folder(where: Any, kwargs: Mapping[str, Any]) -> Path:
    """Return the folder of a checkpoint, which is fetched first where it has only a name on a hub."""
    folder = Path(where)
    if folder.is_dir():
        return folder / kwargs["subfolder"] if kwargs.get("subfolder") else folder
    options = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if kwargs.get(key)}
    hub = importlib.import_module("huggingface_hub")
    return Path(hub.snapshot_download(str(where), allow_patterns=list(FILES), **options))


def _transformers() -> Any:
    return importlib.import_module("transformers")


@functools.cache
def _config_class() -> Any:
    """Return transformers' kind of config that carries a plan, with our quantiser registered for it."""
    quantizers = importlib.import_module("transformers.quantizers")
    auto = importlib.import_module("transformers.quantizers.auto")
    mixin = importlib.import_module("transformers.utils.quantization_config").QuantizationConfigMixin

    # Both bases are known when transformers is imported, and not to mypy.
    class ExpertsConfig(mixin):  # type: ignore[misc, valid-type]
        """Carries the plan of one loading."""

        quant_method = METHOD

        def __init__(self, plan: _Plan | None = None) -> None:
            self.plan = plan

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

    class ExpertsQuantizer(quantizers.HfQuantizer):  # type: ignore[misc, name-defined]  # as above
        """Keeps experts out of transformers' loading, and reads them when it is done."""

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            plan = self.quantization_config.plan
            (plan.take_out_later if plan.ranks else plan.take_out)(model)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self.quantization_config.plan.fill_in(model)
            # The plan holds the files' names, and configs are copied often.
            self.quantization_config.plan = None
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    auto.register_quantization_config(METHOD)(ExpertsConfig)
    auto.register_quantizer(METHOD)(ExpertsQuantizer)
    return ExpertsConfig
