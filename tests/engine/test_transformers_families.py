"""Every experts class that the installed transformers has, built bare at tiny size, in whatever version."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tilecast.engine import runtime
from tilecast.engine.adapted import adapt
from tilecast.engine.transformers import _inspected

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("registered")]

SIZES = {
    "hidden_size": 64, "moe_hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 48, "num_experts": 8,
    "expert_intermediate_size": 48, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
UNBUILT = {"Ernie4_5_VLMoeMoeExperts"}
"""Classes that take more than a config; Ernie 4.5 VL's is Ernie 4.5's with another size."""
DECORATED = re.compile(r"@use_experts_implementation(?:\(.*?\))?\nclass (\w+)\(")


def experts_classes() -> list[tuple[str, str]]:
    """Return (module, class) of every experts class whose forward transformers dispatches."""
    root = Path(transformers.__file__).parent / "models"
    return [
        (f"transformers.models.{path.parent.name}.{path.stem}", name)
        for path in sorted(root.glob("*/modeling_*.py"))
        for name in DECORATED.findall(path.read_text(encoding="utf-8"))
    ]


def built(where: str, name: str) -> Any:
    """Return the class's module with random weights."""
    source = importlib.import_module(where)
    known: Any = getattr(source, name)
    settings = known.__init__.__wrapped__
    wanted = [p.annotation for p in inspect.signature(settings).parameters.values() if "onfig" in str(p.annotation)]
    configs = [
        value
        for value in vars(source).values()
        if inspect.isclass(value)
        and issubclass(value, transformers.PreTrainedConfig)
        and value is not transformers.PreTrainedConfig
    ]
    named = [c for c in configs if wanted and (c is wanted[0] or c.__name__ == wanted[0])]
    config = (named or sorted(configs, key=lambda c: ("Text" not in c.__name__, c.__name__)))[0]()
    config = getattr(config, "text_config", None) or config
    for field, value in SIZES.items():
        if hasattr(config, field):
            setattr(config, field, value)
    config._experts_implementation = "grouped_mm"
    module = known(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        drawn = 0.12 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn + 1 if parameter.dim() == 1 else drawn)
    return module


@pytest.mark.parametrize(("where", "name"), experts_classes(), ids=lambda value: value.rpartition(".")[2])
def test_a_class_runs_on_the_tuned_kernels(where: str, name: str) -> None:
    if name in UNBUILT:
        pytest.skip("it is not built from a config alone")
    module = built(where, name)
    down = module.down_proj
    hidden = torch.randn(9, down.shape[2 if module.is_transposed else 1])
    ids, weights = torch.rand(9, down.shape[0]).argsort(dim=1)[:, :2], torch.rand(9, 2)
    wanted = module(hidden, ids, weights)
    form, layers, reason = _inspected(module, 2)
    assert reason is None and form is not None, reason
    adapt(module, None, form).prepare(module, runtime.current("cpu"), 2)
    module.config._experts_implementation = "tilecast"
    found = module(hidden, ids, weights)
    assert (found - wanted).abs().max() < 1e-5
    assert len(layers) == (2 if form.activation is None else 1)


def test_they_are_found() -> None:
    assert len(experts_classes()) >= 30
