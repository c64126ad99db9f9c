"""Experts whose own code runs between the GEMMs: against eager, in any batch, compiled, copied, saved, and recorded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tiny_models import tiny_model
from tilecast.engine import runtime
from tilecast.engine.adapted import adapt, adapted_of
from tilecast.engine.expert_module import Unsupported, form_of
from tilecast.engine.split_experts import SplitExperts
from tilecast.engine.transformers import _inspected, experts_forward, experts_modules, prepare_model
from tilecast.evidence import TuningTable

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("registered")

HIDDEN, EXPERTS = 64, 8


class RowNorm(torch.nn.Module):
    """An RMS norm as families have it, with a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        single = rows.float()
        return (single * torch.rsqrt(single.square().mean(-1, keepdim=True) + 1e-6) * self.weight.float()).to(
            rows.dtype
        )


class Experts(torch.nn.Module):
    """An experts module as transformers makes them, with what a family may say of it."""

    def __init__(
        self, *, gate: str = "clamped", inner: int = 48, normed: bool = False, transposed: bool = False,
        bias: bool = False, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind = gate
        self.num_experts, self.has_gate, self.has_bias = EXPERTS, gate != "ungated", bias
        self.has_post_expert_norm, self.is_transposed, self.is_concatenated = normed, transposed, gate != "interleaved"
        self._is_expert_parallel = False
        self.act_fn = torch.nn.Softsign() if gate == "ungated" else torch.nn.SiLU()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            turned = transposed and len(shape) == 3
            drawn = 0.3 * torch.randn((shape[0], shape[2], shape[1]) if turned else shape, generator=generator)
            return torch.nn.Parameter(drawn.to(dtype), requires_grad=False)

        wide = 2 * inner if self.has_gate else inner
        first = "gate_up_proj" if self.has_gate else "up_proj"
        self.register_parameter(first, parameter(EXPERTS, wide, HIDDEN))
        self.down_proj = parameter(EXPERTS, HIDDEN, inner)
        if bias:
            self.register_parameter(f"{first}_bias", parameter(EXPERTS, wide))
            self.down_proj_bias = parameter(EXPERTS, HIDDEN)
        if normed:
            self.post_expert_norm = RowNorm(HIDDEN).to(dtype).requires_grad_(False)

    def _apply_gate(self, rows: torch.Tensor) -> torch.Tensor:
        if self.kind == "mixed":
            return torch.softmax(rows, dim=0).chunk(2, dim=-1)[0]
        if self.kind == "plain":
            gate, up = rows.chunk(2, dim=-1)
            return self.act_fn(gate) * up
        gate, up = (rows[..., ::2], rows[..., 1::2]) if self.kind == "interleaved" else rows.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=0.8)) * up.clamp(-0.9, 0.9)

    def eager(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute as families' own code does, expert by expert."""
        out = torch.zeros_like(hidden)
        first = self.gate_up_proj if self.has_gate else self.up_proj
        for expert in range(EXPERTS):
            token, place = torch.where(ids == expert)
            up, down = (w[expert].T if self.is_transposed else w[expert] for w in (first, self.down_proj))
            rows = hidden[token] @ up.T
            rows = rows + self._bias(0)[expert] if self.has_bias else rows
            rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
            rows = rows @ down.T
            rows = rows + self._bias(1)[expert] if self.has_bias else rows
            rows = self.post_expert_norm(rows) if self.has_post_expert_norm else rows
            out.index_add_(0, token, (rows * weights[token, place, None]).to(out.dtype))
        return out

    def _bias(self, which: int) -> torch.Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        return self.get_parameter((f"{first}_bias", "down_proj_bias")[which])


def prepared(module: Experts, top_k: int = 2, policy: str = "reproducible") -> Any:
    form, layers, reason = _inspected(module, top_k)
    assert reason is None and form is not None and len(layers) == 2, reason
    state = adapt(module, None, form)
    state.prepare(module, runtime.current("cpu").with_policy(policy), top_k)
    assert isinstance(state.experts, SplitExperts)
    return state


def operands(
    tokens: int, top_k: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((tokens, EXPERTS), generator=generator).argsort(dim=1)[:, :top_k]
    hidden = torch.randn((tokens, HIDDEN), generator=generator).to(dtype)
    return hidden, ids, torch.rand((tokens, top_k), generator=generator)


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any]


CASES = (
    Case("clamped", {}),
    Case("normed", {"gate": "plain", "normed": True}),
    Case("clamped and normed", {"normed": True}),
    Case("interleaved, transposed, biased", {"gate": "interleaved", "transposed": True, "bias": True}),
    Case("ungated", {"gate": "ungated", "bias": True, "inner": 49}),
    Case("ungated and normed", {"gate": "ungated", "normed": True}),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_no_larger_than_eagers(case: Case, dtype: torch.dtype) -> None:
    module = Experts(dtype=dtype, **case.options)
    double = copy.deepcopy(module).double()
    hidden, ids, weights = operands(13, dtype=dtype)
    theirs = module.eager(hidden, ids, weights).double()
    exact = double.eager(hidden.double(), ids, weights.double())
    prepared(module)
    found = experts_forward(module, hidden, ids, weights)
    assert found.dtype is dtype
    floor = 1e-6 * float(exact.abs().max())
    assert (found.double() - exact).abs().max() <= 1.1 * (theirs - exact).abs().max() + floor


@pytest.mark.parametrize("options", [{"inner": 128}, {"inner": 49}, {"inner": 48, "normed": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_bits_are_free_of_the_batch(options: dict[str, Any], dtype: torch.dtype) -> None:
    module = Experts(dtype=dtype, **options)
    prepared(module)
    hidden, ids, weights = operands(400, dtype=dtype)
    together = experts_forward(module, hidden, ids, weights)
    for start, end in ((0, 1), (1, 4), (5, 38), (399, 400)):
        alone = experts_forward(module, hidden[start:end], ids[start:end], weights[start:end])
        assert torch.equal(alone, together[start:end])


@pytest.mark.parametrize("normed", [False, True])
def test_absent_experts_count_as_zero(normed: bool) -> None:
    module = Experts(normed=normed)
    prepared(module)
    hidden, ids, weights = operands(6)
    ids[0], ids[1, 1], ids[2, 0] = EXPERTS, EXPERTS, -1
    found = experts_forward(module, hidden, ids, weights)
    assert not found[0].any()
    zeroed = torch.where((ids < 0) | (ids >= EXPERTS), 0.0, weights)
    assert torch.equal(found, experts_forward(module, hidden, ids.clamp(0, EXPERTS - 1), zeroed))


def test_no_token_and_another_top_k_run_too() -> None:
    module = Experts(normed=True)
    prepared(module)
    assert experts_forward(module, *operands(0)).shape == (0, HIDDEN)
    given = operands(5, top_k=3)
    assert (experts_forward(module, *given) - Experts(normed=True).eager(*given)).abs().max() < 1e-5


def test_a_partial_sum_is_not_rounded() -> None:
    module = Experts(dtype=torch.bfloat16)
    state = prepared(module)
    given = operands(4, dtype=torch.bfloat16)
    partial = state.experts(*given, out_dtype=torch.float32)
    assert partial.dtype is torch.float32
    assert torch.equal(partial.bfloat16(), state.experts(*given))
    assert not torch.equal(partial.bfloat16().float(), partial)


def test_compiled_it_is_one_operator_with_the_same_bits() -> None:
    module = Experts(normed=True)
    prepared(module)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *given: experts_forward(module, *given), fullgraph=True, backend=counter)
    for tokens in (3, 7):
        given = operands(tokens)
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert torch.equal(compiled(*given), experts_forward(module, *given))
    (graph,) = counter.graphs
    assert [str(node.target) for node in graph.graph.nodes].count("tilecast.experts.default") == 1
    assert not any("silu" in str(node.target) for node in graph.graph.nodes)
    torch._dynamo.reset()


def test_weights_are_stored_once_and_come_back() -> None:
    module, known = Experts(gate="interleaved", transposed=True), Experts(gate="interleaved", transposed=True)
    state = prepared(module)
    assert module.gate_up_proj.untyped_storage().nbytes() == 4
    assert all(torch.equal(tensor, known.state_dict()[name]) for name, tensor in module.state_dict().items())
    state.restore(module)
    assert torch.equal(module.gate_up_proj, known.gate_up_proj)


def test_a_copy_runs_its_own_norm() -> None:
    module = Experts(normed=True)
    prepared(module)
    given = operands(4)
    wanted = experts_forward(module, *given)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.post_expert_norm.weight.mul_(2)
    assert torch.equal(experts_forward(copied, *given), 2 * wanted)
    assert torch.equal(experts_forward(module, *given), wanted)


def test_a_gate_that_mixes_rows_is_not_run() -> None:
    with pytest.raises(Unsupported, match="does not go row by row"):
        form_of(Experts(gate="mixed"))


def test_both_layers_are_looked_up() -> None:
    model: Any = tiny_model("mixtral", hidden_act="quick_gelu", num_hidden_layers=1)
    wanted = model(torch.arange(10)[None]).logits
    model.config._experts_implementation = "tilecast"
    used = runtime.use_table(TuningTable())
    (found,) = prepare_model(model).modules
    assert [layer.label for layer in found.layers] == [
        "E8 H64 I96 top2 fp32 identity-ungated",
        "E8 H64 I48 top2 fp32 identity-ungated",
    ]
    with torch.no_grad():
        assert (model(torch.arange(10)[None]).logits - wanted).abs().max() < 2e-5
    assert {miss.layer for miss in used.misses()} == set(found.layers)
    assert adapted_of(experts_modules(model)[0][1]) is not None
