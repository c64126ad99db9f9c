"""The correctness gate: no config is timed, let alone chosen, whose result was not compared with the oracle."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tilecast.autotune.seeds import hash_seed
from tilecast.autotune.workload import (
    SORTED,
    Inputs,
    Workload,
    in_order,
    in_slot_order,
    launch,
    poisoned_output,
    present_slots,
    synchronise,
)
from tilecast.kernels import routing, sort_slots
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.reference import reference_down, reference_up
from tilecast.kernels.spec import Kernel
from tilecast.kernels.stacks import Weights
from tilecast.problem import ExpertGemm, TileConfig

MAX_ERROR_RATIO = 2.0
"""A result passes with at most twice the error that same-dtype torch makes (QuACK's criterion)."""
SAMPLED_SLOTS = 32
"""Slots per launch that are compared with the oracle; every slot is checked for being written and finite."""
ABSENT_SHARE = 0.125
ORACLES_AT_ONCE = 8
"""Token counts whose expected values are worked out in one pass over the weights."""
GATE_SEED = 1 << 20
"""Inputs of the gate are none of those that are timed."""


Expected = tuple[torch.Tensor, torch.Tensor]
"""What rows should be: in float64, and in the layer's dtype by torch; both as float64 [rows, columns]."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found: a measurement's status, the error ratio where there is one, and why not `ok`.

    `launch_us` is how long the faster of its launches took, 0 where that is not known.
    """

    status: str = "ok"
    error_ratio: float | None = None
    detail: str = ""
    launch_us: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One launch on the full problem and the expected values of the sampled rows of its output.

    `rows` are the sampled output rows, `exact` and `torch_values` float64 [rows, columns]; `written` says for
    every output row whether the kernel has to write it.
    """

    inputs: Inputs
    out_dtype: torch.dtype
    written: torch.Tensor
    rows: torch.Tensor
    exact: torch.Tensor
    torch_values: torch.Tensor


class Gate:
    """Checks configs on two launches of the full problem: as routed, and with some slots absent.

    Outputs are poisoned with NaN before, and so is what no present slot may read. Expected values are made
    once per (GEMM, tokens) in float64, on a few seeded tokens, the first and the last among them; for kernels whose
    numerics round activations first, from rows rounded so.
    """

    def __init__(self, workload: Workload, tokens: Sequence[int] = ()) -> None:
        """Take operands from `workload`; `tokens` are counts that will be checked, whose oracles share their work."""
        self._workload = workload
        self._tokens = tuple(sorted(tokens))
        self._known: dict[tuple[int, str], list[Expected]] = {}
        self._held: tuple[ExpertGemm, int] | None = None
        self._cases: dict[str, tuple[_Case, ...]] = {}
        self._launches_us: dict[tuple[ExpertGemm, int, TileConfig], list[float]] = {}

    def launch_us(self, gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        """Return how long the faster of a config's launches here took, seen from the host; 0 if there was none."""
        return min(self._launches_us.get((gemm, tokens, config), ()), default=0.0)

    def check(self, gemm: ExpertGemm, tokens: int, config: TileConfig, kernel: Kernel) -> Verdict:
        """Launch `config` and judge its output. Whatever the kernel raises passes through."""
        if self._held is None or self._held[0] != gemm:
            self._known.clear()
        if self._held != (gemm, tokens):
            self._held, self._cases = (gemm, tokens), {}
        activations = str(kernel.numerics(gemm, config, self._workload.environment).get("activations", ""))
        if activations not in self._cases:
            self._cases[activations] = self._make_cases(gemm, tokens, activations)
        weights = self._workload.weights(gemm, kernel, kernel.layout(gemm, config))
        order = kernel.order(gemm, config)
        worst, launches_us = 0.0, self._launches_us.setdefault((gemm, tokens, config), [])
        for case in self._cases[activations]:
            device = self._workload.device
            out = poisoned_output(gemm, tokens, case.out_dtype, device)
            inputs = in_order(gemm, case.inputs, order)
            start = time.perf_counter()
            launch(kernel, config, weights, inputs, out)
            synchronise(device)
            launches_us.append(1e6 * (time.perf_counter() - start))
            detail = _beyond_the_last(gemm, out, case.inputs, order)
            out = in_slot_order(gemm, out, case.inputs.route, order)
            detail = detail or _unwritten(out, case.written)
            if detail:
                return Verdict(status="wrong_result", detail=detail)
            ratio = error_ratio(out[case.rows], case.exact, case.torch_values, gemm.k)
            assert math.isfinite(ratio), "the oracle's inputs overflow the layer's dtype"
            worst = max(worst, ratio)
        if worst > MAX_ERROR_RATIO:
            detail = f"error is {worst:.3g} times that of torch in {gemm.layer.dtype}, at most {MAX_ERROR_RATIO} passes"
            return Verdict(status="wrong_result", error_ratio=worst, detail=detail)
        return Verdict(error_ratio=worst, launch_us=min(launches_us))

    def _variants(self, gemm: ExpertGemm, tokens: int) -> list[Inputs]:
        full = self._workload.inputs(gemm, tokens, GATE_SEED)
        return [full] if tokens * gemm.layer.top_k == 1 else [full, _with_absent_slots(gemm, full)]

    def _sampled(self, gemm: ExpertGemm, tokens: int) -> torch.Tensor:
        count = max(2, SAMPLED_SLOTS // gemm.layer.top_k)
        return _sampled_tokens(tokens, count).to(self._workload.device)

    def _expected(self, gemm: ExpertGemm, tokens: int, activations: str) -> list[Expected]:
        """Return what each variant's sampled rows should be, worked out together with those of the counts to come."""
        if (tokens, activations) not in self._known:
            later = [t for t in self._tokens if t > tokens and (t, activations) not in self._known]
            together = (tokens, *later[: ORACLES_AT_ONCE - 1])
            asked = [(v, self._sampled(gemm, t)) for t in together for v in self._variants(gemm, t)]
            # Plain weights are the oracle's, whatever layout the kernel reads.
            weights = self._workload.plain(gemm)
            found = iter(_expected(gemm, asked, weights.data, weights.bias, activations))
            for t in together:
                self._known[t, activations] = [next(found) for _ in self._variants(gemm, t)]
        return self._known[tokens, activations]

    def release(self) -> None:
        """Drop the expected values."""
        self._held, self._cases = None, {}
        self._known.clear()
        self._launches_us.clear()

    def _make_cases(self, gemm: ExpertGemm, tokens: int, activations: str) -> tuple[_Case, ...]:
        device = self._workload.device
        variants, sampled = self._variants(gemm, tokens), self._sampled(gemm, tokens)
        expected = self._expected(gemm, tokens, activations)
        dtypes, cases = out_dtypes(gemm), []
        for number, (inputs, (exact, torch_values)) in enumerate(zip(variants, expected, strict=True)):
            present = _present(gemm, inputs)
            rows, written = sampled, torch.ones(tokens, dtype=torch.bool, device=device)
            if gemm.name == "up":
                written = present
                slots = _slots_of(sampled, gemm.layer.top_k)
                rows = slots[present[slots]]
                exact, torch_values = exact[present[slots]], torch_values[present[slots]]
            cases.append(
                _Case(inputs=inputs, out_dtype=dtypes[-1 if number else 0], written=written, rows=rows, exact=exact,
                      torch_values=torch_values)
            )  # fmt: skip
        return tuple(cases)


def out_dtypes(gemm: ExpertGemm) -> tuple[torch.dtype, ...]:
    """Return what the gate's launches write: the layer's dtype, and of down a rank's partial sum, not rounded."""
    dtype = TORCH_DTYPES[gemm.layer.dtype]
    return (dtype,) if gemm.name == "up" else tuple(dict.fromkeys((dtype, torch.float32)))


def error_ratio(out: torch.Tensor, exact: torch.Tensor, torch_values: torch.Tensor, k: int) -> float:
    """Return the error of `out` in units of same-dtype torch's error; at most 2 passes.

    All are [rows, columns]. The larger of two ratios counts: maximum norm, which sees one wrong element, and
    root mean square, which sees a small error everywhere. Half of ε is added to torch's error, as torch may
    be exact by luck or sum in blocks: ε = √K · 2⁻²⁴ · scale is the size of rounding errors of a float32 chain
    of K products (a random walk of K roundings), four times that for the maximum over many elements. One
    wrong or missing product is of size scale / √K, thousands of times larger.
    """
    if exact.numel() == 0:
        return 0.0
    error, torch_error = (out.double() - exact).abs(), (torch_values - exact).abs()
    unit = math.sqrt(k) * 2.0**-24
    largest = float(exact.abs().max())
    maximum = float(error.max()) / (float(torch_error.max()) + 2 * unit * max(1.0, largest))
    rms = _rms(error) / (_rms(torch_error) + 0.5 * unit * max(1.0, _rms(exact)))
    return max(maximum, rms)


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _unwritten(out: torch.Tensor, written: torch.Tensor) -> str:
    finite = torch.isfinite(out).all(1)
    bad = torch.nonzero(written & ~finite).flatten()
    if bad.numel():
        return f"{bad.numel()} of {int(written.sum())} rows not written or not finite, the first is row {int(bad[0])}"
    touched = torch.nonzero(~written & ~torch.isnan(out).all(1)).flatten()
    if touched.numel():
        return f"{touched.numel()} rows of absent slots were written, the first is row {int(touched[0])}"
    return ""


def _beyond_the_last(gemm: ExpertGemm, out: torch.Tensor, inputs: Inputs, order: str) -> str:
    """Return what is wrong where a sorted intermediate has no rows; what stands there nobody may rely on."""
    if gemm.name == "down" or order != SORTED:
        return ""
    present = len(present_slots(inputs.route))
    touched = torch.nonzero(~torch.isnan(out[present:]).all(1)).flatten()
    if touched.numel():
        return f"{touched.numel()} rows beyond the {present} present slots were written"
    return ""


def _slots_of(tokens: torch.Tensor, top_k: int) -> torch.Tensor:
    return (tokens[:, None] * top_k + torch.arange(top_k, device=tokens.device)).flatten()


def _sampled_tokens(tokens: int, count: int) -> torch.Tensor:
    if tokens <= count:
        return torch.arange(tokens)
    generator = torch.Generator().manual_seed(tokens)
    inner = torch.randperm(tokens - 2, generator=generator)[: count - 2] + 1
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([tokens - 1])])


def _present(gemm: ExpertGemm, inputs: Inputs) -> torch.Tensor:
    ids = inputs.route.ids.flatten()
    return (ids >= 0) & (ids < gemm.layer.experts)


def _with_absent_slots(gemm: ExpertGemm, full: Inputs) -> Inputs:
    layer, route = gemm.layer, full.route
    generator = torch.Generator().manual_seed(hash_seed(route.tokens, GATE_SEED))
    absent = torch.rand(route.tokens, route.top_k, generator=generator) < ABSENT_SHARE
    if route.tokens >= 3:
        absent[route.tokens // 2] = True
    absent[-1, -1] = True
    absent = absent.to(route.ids.device)
    present = (route.ids >= 0) & (route.ids < layer.experts)
    if not bool((present & ~absent).any()):
        # Something must be left to compute, or the launch would say nothing.
        token, position = torch.nonzero(present)[0].tolist()
        absent[token, position] = False
    ids = torch.where(absent, -1, route.ids)
    gone = (ids < 0) | (ids >= layer.experts)
    rows = full.rows.clone()
    # What belongs to absent slots alone is never to be read: `up` leaves such rows as they were.
    rows[gone.all(1) if gemm.name == "up" else gone.flatten()] = math.nan
    return Inputs(rows=rows, route=sort_slots(ids, layer.experts), topk_weights=full.topk_weights)


def _expected(
    gemm: ExpertGemm,
    asked: Sequence[tuple[Inputs, torch.Tensor]],
    weight: Weights,
    bias: torch.Tensor | None,
    activations: str,
) -> list[Expected]:
    """Return the results of each variant's sampled tokens.

    All go through the reference at once, as converting the weights costs the most.
    """
    layer, top_k = gemm.layer, gemm.layer.top_k
    ids = torch.cat([v.route.ids[sampled] for v, sampled in asked])
    # The oracle's own way to sort, which no kernel uses.
    route = routing.sort_slots(ids, layer.experts)
    results = []
    for dtype in (torch.float64, TORCH_DTYPES[layer.dtype]):
        if gemm.name == "up":
            rows = torch.cat([v.rows[sampled] for v, sampled in asked])
            result = reference_up(layer, rows, weight, route, bias, dtype, activations)
        else:
            rows = torch.cat([v.rows[_slots_of(sampled, top_k)] for v, sampled in asked])
            scale = torch.cat([v.topk_weights[sampled] for v, sampled in asked])
            result = reference_down(layer, rows, weight, route, scale, bias, dtype, activations)
        results.append(result.double())
    each = [len(sampled) * (top_k if gemm.name == "up" else 1) for _, sampled in asked]
    exact, torch_values = (result.split_with_sizes(each) for result in results)
    return list(zip(exact, torch_values, strict=True))
