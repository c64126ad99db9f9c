"""What `tune`, `tune --dry-run` and `cache coverage` list for a config.json is what its model looks up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.engine.tables import decided
from tests.tiny_models import FAMILIES, tiny_model
from tilecast.cli._layers import sharded
from tilecast.engine import runtime
from tilecast.engine.transformers import prepare_model, register_transformers
from tilecast.models.read import ACTIVATION_NAMES, OTHER_ACTIVATIONS
from tilecast.problem import ExpertLayer

IDS = torch.arange(3, 11)[None]


def listed(model: Any, folder: Path) -> tuple[ExpertLayer, ...]:
    """Return the layers that the command line lists for a model's own config.json."""
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}))
    return sharded(str(folder)).layers


def looked_up(model: Any, table: tuple[ExpertLayer, ...]) -> set[ExpertLayer]:
    """Run a model on a table of these layers alone, where a miss is an error, and return what it runs on."""
    register_transformers()
    runtime.use_table(decided(*table), miss="error")
    model.set_experts_implementation("tilecast")
    with torch.no_grad():
        model(IDS)
    return set(prepare_model(model).layers)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama4_text"])
def test_the_layers_of_every_family(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    layers = listed(model, tmp_path)
    assert looked_up(model, layers) == set(layers)


def test_what_nobody_else_runs_is_said(tmp_path: Path) -> None:
    model: Any = tiny_model("llama4_text")
    listed(model, tmp_path)
    assert "for other servers alone" in " ".join(sharded(str(tmp_path)).model.notes)
    register_transformers()
    assert prepare_model(model).layers == ()


@pytest.mark.parametrize("activation", sorted({*ACTIVATION_NAMES, *OTHER_ACTIVATIONS} - {"drelu", "gelu_tanh", "half"}))
def test_the_layers_of_every_activation(activation: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral", hidden_act=activation, num_hidden_layers=1)
    layers = listed(model, tmp_path)
    assert looked_up(model, layers) == set(layers)
    assert len(layers) == (1 if activation in ACTIVATION_NAMES else 2)


@pytest.mark.parametrize("activation", ["linear", "tanh", "relu2"])
def test_the_layers_of_experts_without_a_gate(activation: str, tmp_path: Path) -> None:
    model = tiny_model("nemotron_h", mlp_hidden_act=activation)
    layers = listed(model, tmp_path)
    assert looked_up(model, layers) == set(layers)


def test_the_layers_of_another_clamp_and_of_two_ranks(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss", swiglu_limit=5.0)
    layers = listed(model, tmp_path)
    assert len(layers) == 2 and looked_up(model, layers) == set(layers)
    up, down = sharded(str(tmp_path), tp=2).layers
    assert (up.intermediate, down.intermediate) == (48, 24)
