"""Linears and attention around the experts: exact, free of the batch, and torch's own again when asked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tilecast
from tests.tiny_models import FAMILIES, NAMED_FAMILIES, save_tiny
from tilecast.engine import around, around_linears, around_norms, runtime
from tilecast.engine.adapted import Adapted
from tilecast.engine.around import ATTENDS, as_before, give_back, take_over
from tilecast.engine.around_linears import STATE, TilecastLinear
from tilecast.engine.invariant import invariant
from tilecast.engine.transformers import experts_modules, prepare_model, restore_model
from tilecast.kernels.cpu.rows import PreparedNorm

transformers = pytest.importorskip("transformers")

IDS = (torch.arange(1, 41).view(2, 20) * 7) % 97


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have linears of tiny models taken over, too."""
    monkeypatch.setattr(around_linears, "LEAST_WEIGHTS", 1)
    monkeypatch.delenv("TM_GEMM_IMPORT", raising=False)
    tilecast.register_transformers()
    runtime.use_table(None)
    yield
    tilecast.register_transformers()
    runtime.forget_table()


def load(folder: Path, experts: str, dtype: torch.dtype = torch.float32) -> Any:
    source = transformers.AutoModelForCausalLM
    return source.from_pretrained(folder, experts_implementation=experts, dtype=dtype).eval()


def taken(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is TilecastLinear and STATE in vars(module)]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(
    "family", [*NAMED_FAMILIES, *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES if f not in NAMED_FAMILIES)]
)
def test_greedy_tokens_are_eagers(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    eager, ours = load(tmp_path, "eager"), load(tmp_path, "tilecast")
    # Llama 4's experts are its own code, and around them nothing changes.
    assert bool(taken(ours)) == (family != "llama4_text")
    wanted = logits(copy.deepcopy(eager).double()).float()
    errors = [float((logits(model) - wanted).abs().max()) for model in (ours, eager)]
    assert errors[0] <= max(2e-5, 2 * errors[1]), errors
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **options), eager.generate(IDS, **options))


Routing = list[list[torch.Tensor]]
"""What each layer's experts are called with beside the hidden states."""


def routed(model: Any, routing: Routing | None = None) -> tuple[torch.Tensor, Routing]:
    """Return the logits [tokens, V] in float64, and the routing; with one given all layers route by that.

    A token that a close call routes in another way differs by far more than by rounding, as do later ones that see it.
    """
    seen: Routing = []

    def given(_: torch.nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> Any:
        own = [*args[1:], *named.values()]
        forced = own if routing is None else routing[len(seen)]
        seen.append([new.to(old.dtype) for old, new in zip(own, forced, strict=True)])
        return (args[0], *seen[-1][: len(args) - 1]), dict(zip(named, seen[-1][len(args) - 1 :], strict=True))

    hooks = [experts.register_forward_pre_hook(given, with_kwargs=True) for _, experts in experts_modules(model)]
    found = logits(model).double().flatten(0, 1)
    for hook in hooks:
        hook.remove()
    return found, seen


def beyond_eager(folder: Path, dtype: torch.dtype) -> list[int]:
    """Return the tokens of which our error against float64 is beyond twice that of eager, all routed alike."""
    eager, ours, exact = load(folder, "eager", dtype), load(folder, "tilecast", dtype), load(folder, "eager").double()
    wanted, routing = routed(exact)
    errors = [(routed(m, routing)[0] - wanted).square().mean(-1).sqrt() for m in (ours, eager)]
    assert len(routing) == len(experts_modules(ours)) and bool((errors[1] > 0).all())
    found: list[int] = (errors[0] > 2 * errors[1]).nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tokens_error_is_within_twice_that_of_eager(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert beyond_eager(save_tiny(family, tmp_path, dtype), dtype) == []


PARTS = [
    (around_linears.PackedLinear, "__call__"), (PreparedNorm, "__call__"), (Adapted, "run"),
    (around, "attention_forward"),
]  # fmt: skip


@pytest.mark.parametrize(("holder", "name"), PARTS, ids=["linears", "norms", "experts", "attention"])
def test_a_fault_in_one_token_is_seen(holder: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the last token's row is lost, in the first call of the kernel alone."""
    theirs, faults = getattr(holder, name), []

    def faulty(first: Any, rows: torch.Tensor, *args: Any, **options: Any) -> Any:
        if not faults:
            faults.append(name)
            rows = rows.clone()
            # The last token of the last prompt, which no other one sees.
            lost = rows[-1, :, -1, -4:] if holder is around else rows.view(-1, rows.shape[-1])[-1, -16:]
            lost.zero_()
        return theirs(first, rows, *args, **options)

    monkeypatch.setattr(holder, name, faulty)
    assert beyond_eager(save_tiny("mixtral", tmp_path, torch.bfloat16), torch.bfloat16) == [IDS.numel() - 1]
    assert faults


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_inside_of_invariant(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(33, 70, dtype=dtype).requires_grad_(False)
    model, rows = torch.nn.Sequential(linear), torch.randn(2, 9, 33).to(dtype)
    with invariant():
        wanted = model(rows)
    take_over(model, [])
    assert torch.equal(model(rows), wanted)
    assert torch.equal(model(rows[:1, 3:4]), wanted[:1, 3:4])
    with invariant() as context:
        assert torch.equal(model(rows), wanted)
    assert context.covered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linears_that_read_the_same_row_run_together(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    sizes = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    for name, size in sizes.items():
        model.add_module(name, torch.nn.Linear(40, size, bias=bias, dtype=dtype).requires_grad_(False))
    linears = dict(model.named_children())
    rows = torch.randn(1, 3, 40).to(dtype)
    with invariant():
        wanted = {name: linear(rows) for name, linear in linears.items()}
    take_over(model, [])
    together = vars(model.q_proj)[STATE].together
    assert together is not None and vars(model.v_proj)[STATE].together is together
    for _ in range(2):
        for at in range(3):
            row = rows[:, at : at + 1].clone()
            found = {name: linear(row) for name, linear in linears.items()}
            assert all(torch.equal(found[name], wanted[name][:, at : at + 1]) for name in sizes)
            # Again, and on another row at the same place: nothing is given twice.
            assert torch.equal(model.k_proj(row), found["k_proj"]) and model.k_proj(row) is not found["k_proj"]
            model.q_proj(row)
            row.copy_(rows[:, :1])
            assert torch.equal(model.v_proj(row), wanted["v_proj"][:, :1])
    assert all(torch.equal(linear(rows), wanted[name]) for name, linear in linears.items())
    copied = copy.deepcopy(model)
    copied.q_proj.weight.mul_(2)
    before = model.k_proj.weight.clone()
    model.k_proj.weight.mul_(2)
    row = rows[:, :1].clone()
    if not bias:
        assert torch.equal(copied.q_proj(row), 2 * wanted["q_proj"][:, :1])
        assert torch.equal(model.q_proj(row), wanted["q_proj"][:, :1])
        assert torch.equal(model.k_proj(row), 2 * wanted["k_proj"][:, :1])
    assert torch.equal(model.v_proj(row), wanted["v_proj"][:, :1])
    assert not torch.equal(before, model.k_proj.weight)


def test_linears_that_are_not_asked_together_part() -> None:
    model = torch.nn.Module()
    model.gate_proj, model.up_proj = (torch.nn.Linear(40, 64).requires_grad_(False) for _ in range(2))
    take_over(model, [])
    assert vars(model.gate_proj)[STATE].together is not None
    for row in torch.randn(around_linears.MOST_MISSES + 2, 1, 40):
        model.gate_proj(row)
    assert vars(model.gate_proj)[STATE].together is None and vars(model.up_proj)[STATE].together is None


class Norm(torch.nn.Module):
    """A norm as families write it, in one of the forms, or in one that the kernel lacks."""

    def __init__(self, form: str, width: int) -> None:
        super().__init__()
        self.form, self.eps = form, 1e-6
        self.weight = torch.nn.Parameter(torch.zeros(width) if form == "one_more" else torch.ones(width))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        wide = rows.float()
        if self.form == "power":
            # As Gemma 4 writes it.
            return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + self.eps, -0.5) * self.weight).to(rows.dtype)
        if self.form == "centred":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps * (2 if self.form == "eps" else 1))
        if self.form == "rounded":
            return self.weight * wide.to(rows.dtype)
        factor = self.weight.float() + 1 if self.form == "one_more" else self.weight.float()
        return (wide * factor).to(rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 100, 8])
@pytest.mark.parametrize("form", ["rounded", "scaled", "one_more", "power", "centred", "eps"])
def test_norms_are_known_by_their_bits(form: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = Norm(form, width).to(dtype).requires_grad_(False)
    model, rows = torch.nn.Sequential(norm), torch.randn(2, 5, width).to(dtype)
    theirs = norm(rows)
    take_over(model, [])
    if form in ("centred", "eps"):
        assert type(norm) is Norm
        return
    assert around_norms.STATE in vars(norm) and isinstance(norm, Norm)
    # Weights of one say nothing of the form; these come after it was found.
    norm.weight.copy_(norm.weight + 0.2 * torch.randn(width).to(dtype))
    with invariant() as context:
        inside = norm(rows)
    with as_before(model), invariant():
        assert torch.equal(norm(rows), inside)
    assert context.covered and torch.equal(norm(rows), inside) and not torch.equal(inside, theirs)
    assert torch.equal(norm(rows[1:, 3:4].clone()), inside[1:, 3:4])
    with as_before(model):
        torch.testing.assert_close(inside, norm(rows))
        strided = norm(rows.transpose(0, 1))
    assert torch.equal(norm(rows.transpose(0, 1)), strided)
    norm.eps = 0.5
    assert not torch.equal(norm(rows), inside)
    copied = copy.deepcopy(model)
    assert type(copied[0]) is type(norm)
    give_back(model)
    assert type(norm) is Norm and around_norms.STATE not in vars(norm)


class Odd(Norm):
    """A norm of the kernel's bits that is left: by an operation that may depend on the batch, or by its operands."""

    def forward(self, rows: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if self.form == "scaled":
            assert gate is None
            # One, by an operation that `invariant()` has no form of.
            return super().forward(rows) * (0 * rows).exp2()
        normed = super().forward(rows)
        if gate is None:
            raise {"rounded": TypeError, "one_more": AttributeError}[self.form]("the gate is missing")
        return normed * gate


@pytest.mark.parametrize("form", ["scaled", "rounded", "one_more"])
def test_norms_that_may_depend_on_the_batch_or_want_more_are_left(form: str, caplog: pytest.LogCaptureFixture) -> None:
    norm = Odd(form, 64).requires_grad_(False)
    before = norm._parameters["weight"]
    take_over(torch.nn.Sequential(norm), [])
    # Nobody asked for freedom of the batch.
    assert not caplog.records
    assert type(norm) is Odd and around_norms.STATE not in vars(norm) and norm._parameters["weight"] is before


def test_norms_are_differentiated_and_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(Norm("rounded", 64))
    take_over(model, [])
    rows = torch.randn(3, 64, requires_grad=True)
    model(rows).sum().backward()
    assert rows.grad is not None
    torch.save(model, tmp_path / "model")
    loaded = torch.load(tmp_path / "model", weights_only=False)
    assert torch.allclose(loaded(rows), model(rows))


def test_attention_in_16_bits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("mixtral", tmp_path, torch.bfloat16)
    model = load(tmp_path, "tilecast", torch.bfloat16)
    with invariant():
        ours = logits(model)
    with as_before(model), invariant():
        assert torch.equal(logits(model), ours)
    calls = []
    theirs = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or theirs(*a, **k))
    padded = torch.ones_like(IDS)
    padded[0, :5] = 0
    options = {"attention_mask": padded, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    model.generate(IDS, **options)
    assert not calls
    model.generate(IDS, **options, cache_implementation="static")
    assert not calls
    with as_before(model):
        logits(model)
    assert calls


def test_routers_are_left_to_torch(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.gate, model.shared = torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(64, 9, bias=False)
    model.experts = torch.nn.Module()
    model.experts.num_experts = 8
    take_over(model, ["experts"])
    assert taken(model) == ["shared"]


def test_it_can_be_left_out_and_given_back(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    model = load(tmp_path, "tilecast")
    full = logits(model)
    names = taken(model)
    assert "lm_head" in names and all(ATTENDS in vars(layer.self_attn) for layer in model.model.layers)
    with as_before(model):
        assert not taken(model)
    assert taken(model) == names
    give_back(model)
    only = logits(model)
    assert all(type(module) is not TilecastLinear for module in model.modules())
    assert (only - full).abs().max() < 2e-5
    prepare_model(model, experts_only=True)
    assert not taken(model)
    prepare_model(model)
    assert taken(model) == names and torch.equal(logits(model), full)
    model.set_experts_implementation("eager")
    assert not taken(model)
    model.set_experts_implementation("tilecast")
    assert taken(model) == names
    restore_model(model)
    assert not taken(model)
    tilecast.register_transformers(experts_only=True)
    assert not taken(load(tmp_path, "tilecast"))


def test_weights_that_change_are_packed_anew() -> None:
    linear = torch.nn.Linear(40, 50)
    model, rows = torch.nn.Sequential(linear), torch.randn(3, 40)
    take_over(model, [])
    with torch.no_grad():
        before = model(rows)
        linear.weight.mul_(2)
        linear.bias.mul_(2)
        assert torch.equal(model(rows), 2 * before)
        linear.weight = torch.nn.Parameter(torch.zeros(50, 40))
        assert torch.equal(model(rows), linear.bias.expand(3, 50))
    copied = copy.deepcopy(model)
    copied.load_state_dict({"0.weight": torch.ones(50, 40), "0.bias": torch.zeros(50)})
    with torch.no_grad():
        assert (copied(torch.ones(1, 40)) == 40).all()
        assert torch.equal(model(rows), linear.bias.expand(3, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_behind_torchs_back_are_seen(dtype: torch.dtype) -> None:
    """Adapters are merged by `weight.data += delta`, which torch counts nowhere."""
    linear = torch.nn.Linear(40, 50, bias=False, dtype=dtype)
    model, rows = torch.nn.Sequential(linear), torch.randn(3, 40).to(dtype)
    take_over(model, [])
    version, before = linear.weight._version, logits_of(model, rows)
    linear.weight.data += torch.randn(50, 2).to(dtype) @ torch.randn(2, 40).to(dtype)
    assert linear.weight._version == version, "torch counts it by now"
    after = logits_of(model, rows)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, F.linear(rows, linear.weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("asked", [True, False])
def test_a_mask_may_be_given_by_name(asked: bool) -> None:
    """As Afmoe's attention gives it; transformers' functions are called by others' models, too."""
    model = torch.nn.Sequential(torch.nn.Module())
    model[0].is_causal = True
    if asked:
        take_over(model, [])
    else:
        take_over(torch.nn.Sequential(), [])
    query, key, value = torch.randn(3, 1, 2, 5, 8).to(torch.bfloat16)
    function: Any = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.inference_mode():
        found = function(model[0], query, key, value, attention_mask=None, scaling=0.3)[0]
        wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def logits_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(rows)
    return found


def test_gradients_autocast_and_other_classes_are_torchs() -> None:
    class Other(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(40, 50), Other(50, 20))
    rows = torch.randn(3, 40, requires_grad=True)
    take_over(model, [])
    assert taken(model) == ["0"]
    model(rows).sum().backward()
    assert rows.grad is not None and model[0].weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model[0](rows).dtype == torch.bfloat16
    with torch.no_grad():
        assert model.double()(rows.double()).dtype == torch.float64


def test_a_tied_head_is_taken(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    model = load(tmp_path, "eager")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    take_over(model, [])
    assert "lm_head" in taken(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model).shape == (2, 20, 97)
