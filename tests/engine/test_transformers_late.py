"""Experts that no loading prepared, tables of one load among others, and calls with more than experts take."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from tests.tiny_models import save_tiny, tiny_model
from tilecast.engine import runtime
from tilecast.engine.adapted import adapted_of
from tilecast.engine.load import load_model
from tilecast.engine.transformers import experts_modules, register_transformers
from tilecast.errors import InputError
from tilecast.evidence import TuningTable

IDS = torch.arange(3, 11)[None]


def policy_of(model: Any) -> str:
    state = adapted_of(experts_modules(model)[0][1])
    assert state is not None and state.runtime is not None
    return state.runtime.policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


def test_a_loads_own_policy_is_not_the_next_ones(folder: Path) -> None:
    assert policy_of(load_model(folder, policy="fastest").model) == "fastest"
    assert runtime.current().policy == "fastest"
    assert policy_of(load_model(folder).model) == "reproducible"
    assert runtime.current().policy == "reproducible"


def test_a_programs_own_table_is_in_use_again_after_a_load_with_another(folder: Path, monkeypatch: Any) -> None:
    used = runtime.use_table(TuningTable())
    load_model(folder, policy="fastest")
    assert runtime.current() is not used
    again = load_model(folder).model
    state = adapted_of(experts_modules(again)[0][1])
    assert state is not None and state.runtime is used
    # What a program puts in use meanwhile stays.
    load_model(folder, policy="fastest")
    other = runtime.use_table(TuningTable())
    load_model(folder)
    assert runtime.current() is other


def test_weights_that_are_loaded_anew_run_by_their_models_table(folder: Path) -> None:
    model = load_model(folder, policy="fastest").model
    load_model(folder)
    model.load_state_dict(tiny_model("mixtral", seed=3).state_dict())
    with torch.no_grad():
        model(IDS)
    assert policy_of(model) == "fastest"


def mixing(self: Any, rows: torch.Tensor) -> torch.Tensor:
    return rows.chunk(2, dim=-1)[0] - rows.mean()


def test_falling_back_late_is_said_once_with_the_number_of_layers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_transformers()
    monkeypatch.setattr(transformers.models.mixtral.modeling_mixtral.MixtralExperts, "_apply_gate", mixing)
    models = [tiny_model("mixtral", num_hidden_layers=layers) for layers in (3, 2)]
    with caplog.at_level(logging.WARNING, "tilecast"), torch.no_grad():
        for model in models:
            model.config._experts_implementation = "tilecast"
            for _ in range(2):
                model(IDS)
    said = [r.getMessage() for r in caplog.records if "fall back" in r.getMessage()]
    assert [text.partition(" fall back")[0] for text in said] == ["experts of 3 layers", "experts of 2 layers"]
    assert all("does not go row by row" in text for text in said)


def test_a_module_of_no_model_is_said_alone(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    register_transformers()
    kind = transformers.models.mixtral.modeling_mixtral.MixtralExperts
    monkeypatch.setattr(kind, "_apply_gate", mixing)
    config = tiny_model("mixtral").config
    config._experts_implementation = "tilecast"
    module = kind(config)
    with caplog.at_level(logging.WARNING, "tilecast"), torch.no_grad():
        module(torch.randn(2, 64), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2))
    assert [r.getMessage().partition(" fall back")[0] for r in caplog.records] == ["experts of 1 layer"]


def test_an_operand_that_nobody_would_use_is_refused(folder: Path) -> None:
    module = experts_modules(load_model(folder).model)[0][1]
    hidden, ids, weights = torch.randn(2, 64), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2)
    wanted = module(hidden, ids, weights)
    assert torch.equal(module(hidden, ids, weights, None), wanted)
    for extra in ((torch.ones(2, 2),), (0.5,)):
        with pytest.raises(InputError, match="1 more operand"):
            module(hidden, ids, weights, *extra)
    with pytest.raises(InputError, match="expert ids and routing weights"):
        module(hidden, ids)
