"""transformers' from_pretrained, made strict: what does not fit a model is an error that names it.

transformers fills weights that a checkpoint lacks with random numbers and warns, raises whatever it comes across, and
finds out at the first token that a plan cuts through an attention head.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tilecast.engine.checkpoint import CONFIG, TOKENIZER_FILES, Checkpoint
from tilecast.engine.quantized import recipe_of
from tilecast.engine.transformers_facts import values_of
from tilecast.engine.watch import is_connection_error
from tilecast.errors import DeviceError, ModelError, TilecastError, UsageError

NAMED = 3
"""How many of the weights that do not fit an error names."""
PACKED = ("qweight", "weight_packed", "weight_scale_inv", "weight_scale")
"""Tensors that only quantised weights have."""


def import_transformers() -> Any:
    """Return the package. Raises UsageError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(f"transformers cannot be imported ({error}); install tilecast[hf]") from error


def model_of(transformers: Any, checkpoint: Checkpoint, dtype: torch.dtype, *, tp: int, ep: int) -> Any:
    """Return the checkpoint's model in `dtype`, as transformers splits it; quantised experts stay as they are stored.

    Raises ModelError for what cannot be loaded or does not fit, DeviceError where memory does not suffice, UsageError
    where several ranks lack accelerate.
    """
    distributed = _distributed(tp, ep)
    with _experts_as_stored(checkpoint):
        model = _loaded(transformers, checkpoint, dtype, distributed)
    check_heads(model, tp * ep)
    return model


def _distributed(tp: int, ep: int) -> Any | None:
    """Return transformers' DistributedConfig for what was asked; 5.17 has one switch for expert parallelism."""
    ranks = tp * ep
    if ranks == 1:
        return None
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("transformers needs accelerate to load a model on several ranks; install tilecast[hf]")
    made = importlib.import_module("transformers.distributed").DistributedConfig
    if ep == 1:
        return made(tp_size=ranks, tp_plan="auto")
    if "ep_size" not in {field.name for field in dataclasses.fields(made)}:
        return made(tp_size=ranks, tp_plan="auto", enable_expert_parallel=True)
    return made(tp_size=ranks, ep_size=ranks, tp_plan="auto")


@contextmanager
def _experts_as_stored(checkpoint: Checkpoint) -> Iterator[None]:
    """Keep experts as a quantised checkpoint has them while it is loaded; what runs them is said later."""
    if recipe_of(checkpoint.config, str(checkpoint.folder / CONFIG)) is None:
        yield
        return
    from tilecast.engine import quantized_loading
    from tilecast.engine import transformers as adapter

    adapter.register_transformers()
    with quantized_loading.experts_as_stored():
        yield


def _loaded(transformers: Any, checkpoint: Checkpoint, dtype: torch.dtype, distributed: Any | None) -> Any:
    folder = checkpoint.folder
    options: dict[str, Any] = {} if distributed is None else {"distributed_config": distributed}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            # They are an error below, which names them.
            ignore_mismatched_sizes=True, output_loading_info=True, **options,
        )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DeviceError(f"{folder} does not fit into memory: {first_line(error)}") from error
    except TilecastError:
        raise
    except Exception as error:  # Configs and weights that it does not expect make it raise anything.
        if is_connection_error(error):
            raise
        raise ModelError(f"{folder}: transformers cannot load it: {_told(error)}") from error
    check_loading(folder, info)
    return model


def check_loading(folder: Path | str, info: Mapping[str, Any]) -> None:
    """Raise ModelError, naming some, where `output_loading_info` tells of weights that did not fit the model."""
    for what, key in (
        ("lacks weights that the model needs", "missing_keys"),
        ("has weights of other shapes than the model's", "mismatched_keys"),
        ("has weights that the model does not", "unexpected_keys"),
        ("cannot be loaded", "error_msgs"),
    ):
        found = _names(info.get(key) or ())
        if found:
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise ModelError(f"{folder} {what}: {', '.join(found[:NAMED])}{more}{_unsaid(info)}")


def _unsaid(info: Mapping[str, Any]) -> str:
    """Return a remark where weights did not fit because they are quantised, of which the config says nothing."""
    parts = tuple(f".{part}" for part in PACKED)
    key = next((name for name in _names(info.get("unexpected_keys") or ()) if name.endswith(parts)), None)
    return "" if key is None else f"; {key} is of quantised weights, which config.json's quantization_config should say"


def check_heads(model: Any, ranks: int) -> None:
    """Raise ModelError where transformers' plan would cut through an attention head: it only fails when it runs."""
    plan = getattr(model, "_tp_plan", None) or {}
    config = model.config.get_text_config(decoder=True)
    for projection, field in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        sharded = any(name.endswith(f".{projection}") and style.startswith("colwise") for name, style in plan.items())
        for heads in values_of(config, field) if sharded else ():
            if isinstance(heads, int) and heads % ranks:
                raise ModelError(
                    f"{field} is {heads}, which {ranks} ranks cannot share out; use a number that divides it"
                )


def _names(found: Iterable[Any]) -> list[str]:
    """Return weights' names; a mismatched one comes as (name, its shape, the model's)."""
    texts = []
    for item in found:
        if isinstance(item, tuple) and len(item) == 3:
            texts.append(f"{item[0]} {tuple(item[1])} instead of {tuple(item[2])}")
        else:
            texts.append(first_line(item))
    return sorted(texts)


def tokenizer_of(transformers: Any, folder: Path) -> Any | None:
    """Return the checkpoint's own tokenizer, None where it has no file of one. Raises ModelError."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers itself raises that, and nothing narrower.
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {_told(error)}") from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' progress bars and reports back: what they report is an error here."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def first_line(error: object) -> str:
    """Return the first line of an error's text that is not empty, the error's kind where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
