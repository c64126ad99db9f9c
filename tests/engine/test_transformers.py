"""transformers' models on our experts: what every family computes, and what users do with a model besides."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tilecast
from tests.tiny_models import FAMILIES, NAMED_FAMILIES, save_tiny, tiny_model
from tilecast.engine import runtime
from tilecast.engine.adapted import adapted_of
from tilecast.engine.expert_module import form_of
from tilecast.engine.transformers import experts_forward, experts_modules, prepare_model, restore_model
from tilecast.errors import UsageError
from tilecast.evidence import TuningTable

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("registered")

IDS = (torch.arange(1, 41).view(2, 20) * 7) % 97


def load(folder: Path, experts: str, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts, **options).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def first_experts(model: Any) -> torch.nn.Module:
    return experts_modules(model)[0][1]


@pytest.fixture
def mixtral(tmp_path: Path) -> Any:
    save_tiny("mixtral", tmp_path)
    return load(tmp_path, "tilecast")


@pytest.mark.parametrize(
    "family", [*NAMED_FAMILIES, *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES if f not in NAMED_FAMILIES)]
)
def test_a_family_computes_what_its_own_code_does(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    eager, ours = load(tmp_path, "eager"), load(tmp_path, "tilecast")
    found, wanted = logits(ours), logits(eager)
    # Norms and experts sum in other orders than torch, which recurrences amplify: as exact as eager, not equal to it.
    exact = logits(eager.double()).float()
    assert (found - exact).abs().max() <= max(2 * float((wanted - exact).abs().max()), 2e-5)
    states = [adapted_of(module) for _, module in experts_modules(ours)]
    assert all(state is not None and state.reason is None for state in states)
    assert states or family not in NAMED_FAMILIES


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_no_larger_than_eagers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each layer's experts on the same inputs, judged by float64."""
    save_tiny(family, tmp_path, dtype)
    eager, ours = load(tmp_path, "eager", dtype=dtype), load(tmp_path, "tilecast", dtype=dtype)
    double = load(tmp_path, "eager", dtype=dtype).double()
    for name, module in experts_modules(ours):
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn((31, 64), generator=generator).to(dtype)
        ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(31)])
        weights = torch.rand((31, 2), generator=generator).to(dtype)
        with torch.no_grad():
            exact = double.get_submodule(name)(hidden.double(), ids, weights.double())
            theirs = eager.get_submodule(name)(hidden, ids, weights).double()
            found = module(hidden, ids, weights).double()
        assert (found - exact).abs().max() <= 1.05 * (theirs - exact).abs().max()


def test_weights_are_held_once_and_saved_whole(mixtral: Any, tmp_path: Path) -> None:
    module = first_experts(mixtral)
    weight = module.gate_up_proj
    assert weight.shape == (8, 96, 64) and weight.untyped_storage().nbytes() == weight.itemsize
    wanted = tiny_model("mixtral").state_dict()
    found = mixtral.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    mixtral.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", "eager")
    assert (logits(again) - logits(mixtral)).abs().max() < 2e-5


def test_interleaved_and_transposed_weights_are_saved_as_they_were(tmp_path: Path) -> None:
    save_tiny("gpt_oss", tmp_path)
    wanted, found = tiny_model("gpt_oss").state_dict(), load(tmp_path, "tilecast").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_memory_is_kept_on_demand(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    tilecast.register_transformers(release=False)
    module = first_experts(load(tmp_path, "tilecast"))
    assert torch.equal(module.gate_up_proj, first_experts(tiny_model("mixtral")).gate_up_proj)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_new_weights_are_used_where_the_old_ones_were_kept(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path)
    tilecast.register_transformers(release=False)
    model, other = load(tmp_path, "tilecast"), tiny_model(family, seed=5)
    logits(model)
    model.load_state_dict(other.state_dict())
    assert (logits(model) - logits(other)).abs().max() < 1e-4


def test_new_weights_are_loaded_into_a_packed_model(mixtral: Any) -> None:
    other = tiny_model("mixtral", seed=5)
    mixtral.load_state_dict(other.state_dict())
    assert (logits(mixtral) - logits(other)).abs().max() < 2e-5


def test_a_model_switches_back_and_forth(mixtral: Any) -> None:
    ours = logits(mixtral)
    mixtral.set_experts_implementation("eager")
    theirs = logits(mixtral)
    assert (ours - theirs).abs().max() < 2e-5
    assert adapted_of(first_experts(mixtral)) is None
    mixtral.set_experts_implementation("tilecast")
    assert adapted_of(first_experts(mixtral)) is not None
    assert torch.equal(logits(mixtral), ours)


def test_a_model_is_converted_after_it_was_packed(mixtral: Any) -> None:
    """`.to` sees parameters without memory; the weights behind them follow."""
    found = logits(mixtral.to(torch.bfloat16))
    wanted = tiny_model("mixtral", torch.bfloat16)
    assert first_experts(mixtral).gate_up_proj.dtype is torch.bfloat16
    wanted.set_experts_implementation("tilecast")
    assert torch.equal(found, logits(wanted))


def test_a_copied_model_runs_and_leaves_the_first_as_it_was(mixtral: Any) -> None:
    wanted = logits(mixtral)
    copied = copy.deepcopy(mixtral)
    assert torch.equal(logits(copied), wanted)
    for model in (mixtral, copied):
        assert adapted_of(first_experts(model)).released  # type: ignore[union-attr]
        saved = first_experts(model).state_dict()["down_proj"]
        assert torch.equal(saved, first_experts(tiny_model("mixtral")).down_proj)
    assert torch.equal(logits(mixtral), wanted)


def test_a_model_that_was_not_loaded_is_prepared_at_its_first_call() -> None:
    model = tiny_model("mixtral")
    wanted = logits(model)
    model.config._experts_implementation = "tilecast"
    assert (logits(model) - wanted).abs().max() < 2e-5
    state = adapted_of(first_experts(model))
    assert state is not None and state.released


def test_gradients_are_refused_only_where_they_are_asked_for(mixtral: Any) -> None:
    out = mixtral(IDS).logits
    # Where gradients are recorded, norms and linears are torch's.
    assert (out - logits(mixtral)).abs().max() < 2e-5 and out.requires_grad
    restore_model(mixtral)
    prepare_model(mixtral, experts_only=True)
    out = mixtral(IDS).logits
    assert torch.equal(out, logits(mixtral)) and out.requires_grad
    with pytest.raises(UsageError, match="forward only; train with another experts_implementation"):
        out.sum().backward()


def test_a_packed_model_is_not_pickled(mixtral: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_pretrained"):
        torch.save(mixtral, tmp_path / "model.pt")
    restore_model(mixtral)
    torch.save(mixtral, tmp_path / "model.pt")


def test_every_call_returns_a_tensor_of_its_own(mixtral: Any) -> None:
    module = first_experts(mixtral)
    hidden, ids, weights = torch.randn(3, 64), torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.rand(3, 2)
    first = module(hidden, ids, weights)
    kept = first.clone()
    second = module(hidden, ids, weights)
    second.zero_()
    assert torch.equal(first, kept)
    assert module(hidden[:0], ids[:0], weights[:0]).shape == (0, 64)


def test_ids_of_other_ranks_count_as_absent_and_weights_may_have_any_float_dtype(mixtral: Any) -> None:
    module = first_experts(mixtral)
    hidden, weights = torch.randn(5, 64), torch.rand(5, 2)
    ids = torch.tensor([[0, 8], [8, 8], [1, 2], [8, 3], [7, 0]])
    zeroed = torch.where(ids == 8, 0.0, weights)
    assert torch.equal(module(hidden, ids, weights), module(hidden, ids.clamp(max=7), zeroed))
    assert torch.equal(module(hidden, ids, weights), module(hidden, ids.to(torch.int32), weights))
    assert torch.equal(module(hidden, ids, weights.bfloat16()), module(hidden, ids, weights.bfloat16().float()))


def test_another_number_of_slots_runs_on_the_same_weights(mixtral: Any) -> None:
    """As expert parallelism's all-to-all calls them: one expert a row."""
    module = first_experts(mixtral)
    hidden = torch.randn(4, 64)
    one = [module(hidden, torch.full((4, 1), e), torch.ones(4, 1)) for e in (2, 5)]
    both = module(hidden, torch.tensor([[2, 5]] * 4), torch.ones(4, 2))
    assert (one[0] + one[1] - both).abs().max() < 1e-5


def test_hidden_states_of_another_dtype_are_taken_to_the_weights(mixtral: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.isfinite(mixtral(IDS).logits).all()


def test_what_is_not_ours_falls_back_once_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path)
    own_code = transformers.models.mixtral.modeling_mixtral.MixtralExperts

    def mixing(self: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.chunk(2, dim=-1)[0] - rows.mean()

    monkeypatch.setattr(own_code, "_apply_gate", mixing)
    with caplog.at_level(logging.WARNING, "tilecast"):
        model = load(tmp_path, "tilecast")
        found = logits(model)
    assert torch.equal(found, logits(load(tmp_path, "grouped_mm")))
    warnings = [r.message for r in caplog.records if "fall back" in r.message]
    assert len(warnings) == 1 and "does not go row by row" in warnings[0] and "grouped_mm" in warnings[0]


@pytest.mark.parametrize("limit", [6.9, 7.0])
def test_an_activation_is_known_by_what_it_does(limit: float) -> None:
    """gpt-oss's class with another clamp is not gpt-oss's activation: its own code then runs."""
    module: Any = first_experts(tiny_model("gpt_oss"))
    module.limit = limit
    form = form_of(module)
    assert (form.activation, form.interleaved) == (("swiglu_oai", True) if limit == 7.0 else (None, False))
    assert form.transposed


@pytest.mark.parametrize(
    ("name", "ours"),
    [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu", "relu"), ("swish", "silu"), ("relu2", "relu2")],
)
def test_activations_go_by_what_they_compute_not_by_their_names(name: str, ours: str) -> None:
    assert form_of(first_experts(tiny_model("mixtral", hidden_act=name))).activation == ours


def test_what_loading_found_is_logged_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny("mixtral", tmp_path)
    with caplog.at_level(logging.INFO, "tilecast"):
        load(tmp_path, "tilecast")
    (line,) = [r.message for r in caplog.records if "run on Tilecast" in r.message]
    assert "experts of 2 of 2 layers" in line and "policy reproducible" in line and "table none" in line


def test_routers_stay_in_float32_on_demand(tmp_path: Path) -> None:
    """A router near a tie, rounded to bf16, chooses another expert than in float32."""
    model = tiny_model("mixtral", torch.bfloat16)
    model.set_experts_implementation("tilecast")
    prepare_model(model, float32_router=True)
    router = model.model.layers[0].mlp.gate
    seen: list[torch.Tensor] = []
    router.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    hidden = torch.randn(64, 64).bfloat16()
    with torch.no_grad():
        router(hidden)
    assert seen[0].dtype is torch.float32
    assert torch.equal(seen[0], hidden.float() @ router.weight.float().T) or torch.allclose(
        seen[0], hidden.float() @ router.weight.float().T
    )


def test_the_table_in_use_stays_in_use(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    used = runtime.use_table(TuningTable(), policy="fastest")
    state = adapted_of(first_experts(load(tmp_path, "tilecast")))
    assert state is not None and state.runtime is used


def test_it_is_refused_where_the_call_is_not_one_of_experts(mixtral: Any) -> None:
    with pytest.raises(tilecast.InputError, match="expert ids and routing weights"):
        experts_forward(first_experts(mixtral), torch.randn(2, 64))
