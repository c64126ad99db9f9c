"""From what a user types to a Model: a preset, a path or a spec."""

from __future__ import annotations

import difflib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from tilecast.errors import ModelError
from tilecast.models.model import Model
from tilecast.models.read import read_config
from tilecast.models.spec import read_spec
from tilecast.problem import WEIGHT_FORMATS

MAX_CONFIG_BYTES = 4 << 20
"""Published config.json files stay under 100 KiB; anything near this is not one."""


def resolve(model: str, *, dtype: str | None = None) -> Model:
    """Return the expert layers of `model`.

    `model` is a preset's name, a config.json, a checkpoint folder that holds one, or a spec such as
    `E=8,H=4096,I=14336,k=2`. A preset's name wins over a folder of the same name: write `./name` for the folder.
    With a weight format behind a colon (`mixtral-8x7b:awq_g128`, `./folder:dense`) experts are taken to be stored in
    that one. `dtype` (fp32, bf16, fp16 or torch's names) overrides what the model says. Nothing is downloaded.
    Raises ModelError.
    """
    if not model.strip():
        raise ModelError("model is empty, expected a preset, a config.json, a checkpoint folder or a spec")
    model, weights = _parted(model)
    if model.lower() in preset_names():
        return _preset(model.lower(), dtype, weights)
    path = Path(model).expanduser()
    if _exists(model):
        return _file(path, dtype, weights)
    if "=" in model:
        return read_spec(model, dtype=dtype, weights=weights)
    close = difflib.get_close_matches(model.lower(), preset_names(), n=3)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise ModelError(
        f"model {model!r:.200} is no preset, file or folder{hint}; nothing is downloaded; "
        f"presets: {', '.join(preset_names())}"
    )


def _exists(model: str) -> bool:
    return "\0" not in model and os.path.lexists(Path(model).expanduser())


def _parted(model: str) -> tuple[str, str | None]:
    """Return what was typed without the weight format behind a last colon, and that. Raises ModelError."""
    head, colon, tail = model.rpartition(":")
    if not colon or _exists(model):
        return model, None
    if tail.lower() in WEIGHT_FORMATS:
        return head, tail.lower()
    if head.lower() in preset_names() or _exists(head):
        raise ModelError(f"weight format of {head:.80} is {tail!r:.40}, expected one of {', '.join(WEIGHT_FORMATS)}")
    return model, None


def preset_names() -> tuple[str, ...]:
    """Return the names of the packaged presets, sorted."""
    return tuple(sorted(entry.name.removesuffix(".json") for entry in _presets().iterdir() if _is_preset(entry.name)))


def _is_preset(name: str) -> bool:
    return name.endswith(".json")


def _presets() -> Any:
    return resources.files("tilecast.models") / "presets"


def _preset(name: str, dtype: str | None, weights: str | None) -> Model:
    config = json.loads((_presets() / f"{name}.json").read_text(encoding="utf-8"))
    return read_config(config, name=name, source="preset", dtype=dtype, weights=weights)


def _file(path: Path, dtype: str | None, weights: str | None) -> Model:
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise ModelError(f"folder {path.parent} holds no config.json, expected a checkpoint folder")
    if not path.is_file():
        raise ModelError(f"{path} is not a regular file, expected a config.json")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ModelError(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MiB, expected a config.json")
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a JSON {type(config).__name__}, expected an object")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return read_config(config, name=name or str(path), source=str(path), dtype=dtype, weights=weights)
