"""The class check: on this machine, do a config's rows in a batch have the bits of the same rows alone?

A numerics class is a claim that a kernel makes. What is promised to users (docs/numerics.md) is checked here on
the very configs that were chosen, on inputs that make any other order of summation show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from tilecast.autotune.controls import foreign_config, sums_exactly
from tilecast.autotune.measure import device_lost, failure
from tilecast.autotune.prescreen import describe
from tilecast.autotune.seeds import hash_seed
from tilecast.autotune.stacks import half_of, moved, one_exact_sum, wide_stack
from tilecast.autotune.workload import Inputs, device_of, in_order, in_slot_order, launch, poisoned_output, synchronise
from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels import sort_slots
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.spec import PLAIN, GemmWeights, Registry
from tilecast.kernels.stacks import Weights, backward, reversal
from tilecast.problem import Bucket, ExpertGemm, TileConfig

EXPONENTS = 12
"""Operands spread over this many powers of two, products over twice as many."""
LOUDER = 4
"""Powers of two that rows may be raised by as wholes, where only their rounding can tell classes apart."""
PROBES = 12
"""Tokens whose rows are compared; each gives top_k × N (up) or H (down) sums of K products."""
MAX_EXPERTS = 2
FLOPS_PER_LAUNCH = 1e10
MIN_TOKENS_CAP, MAX_TOKENS_CAP = 16, 1024
"""Token counts above a cap are checked at the cap: the largest with this many operations a launch."""
POOL_ELEMENTS = 1 << 22
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Verifier(Protocol):
    """Checks that a config keeps the bits of its numerics class."""

    def verify(self, gemm: ExpertGemm, config: TileConfig, bucket: Bucket) -> str | None:
        """Return why `config` does not have its class's bits in `bucket`, None if it has."""
        ...

    def control(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        """Return why the check could not tell another class from `config`'s, None if it can."""
        ...

    def release(self) -> None:
        """Drop what was kept."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """A batch to draw from: rows [M, …, K] by token, ids [M, k], float32 topk_weights [M, k]."""

    gemm: ExpertGemm
    weights: GemmWeights
    rows: torch.Tensor
    ids: torch.Tensor
    topk_weights: torch.Tensor

    def inputs(self, tokens: torch.Tensor) -> Inputs:
        """Return the batch of these tokens (integers [T], on any device), rows in slot order."""
        tokens = tokens.to(self.rows.device)
        return Inputs(
            rows=self.rows[tokens].flatten(0, -2),
            route=sort_slots(self.ids[tokens], self.gemm.layer.experts),
            topk_weights=self.topk_weights[tokens],
        )


class ClassVerifier:
    """The check on this machine's device, on a layer with the true K and N and at most two experts.

    For a bucket, batches of above+1, tokens−1 and tokens rows are run with the config; the rows of some tokens
    must equal, bit for bit, the rows that the class's reference config (`default(like=config)` at one token)
    gives for the token alone.
    """

    def __init__(
        self, environment: Environment, registry: Registry, *, seed: int = 0, device: torch.device | None = None
    ) -> None:
        """Check kernels of `registry` in `environment`, on inputs that follow from `seed` alone.

        They run on `device`, by default the environment's; the first check raises DeviceError if it is not here.
        """
        self._environment = environment
        self._registry = registry
        self._seed = seed
        self._device = device
        self._operands: _Operands | None = None
        self._of: ExpertGemm | None = None
        self._packed: dict[tuple[str, str], GemmWeights] = {}
        self._reversed: dict[tuple[str, str], GemmWeights] = {}
        self._alone: dict[tuple[TileConfig, int, torch.dtype], torch.Tensor] = {}

    def verify(self, gemm: ExpertGemm, config: TileConfig, bucket: Bucket) -> str | None:
        """Return why `config` does not have its class's bits in `bucket`, None if it has.

        An exception of the kernel is a reason as well; DeviceError if it left the device unusable.
        """
        kernel = self._registry[config.kernel]
        reference = kernel.default(gemm, 1, self._environment, like=config)
        claimed = describe(gemm, config, self._environment, self._registry)
        meant = describe(gemm, reference, self._environment, self._registry)
        if (claimed.numerics, claimed.layout) != (meant.numerics, meant.layout):
            return f"the reference config {reference.label} is of another class or layout"
        operands = self._prepare(gemm)
        try:
            for tokens in self.token_counts(gemm, bucket):
                reason = self._differs(operands, config, reference, tokens)
                if reason is not None:
                    return reason
        except Exception as error:  # Whatever a kernel raises says the same: it cannot be relied on.
            return _raised(config, error)
        return None

    def control(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        """Return why the check could not tell another class from `config`'s, None if it can.

        The negative control: the probes' tokens once more, with K reversed in rows and weights alike. The sums are
        mathematically the same, taken by the same kernel in the opposite order; so most rows must have other bits.
        Where the class takes all of K as one exact sum no row may, and most must have other bits in another class of
        the kernel: `controls` says why that is evidence.
        """
        operands = self._prepare(gemm)
        try:
            inputs = operands.inputs(torch.arange(PROBES))
            rows = self._run(operands, config, inputs, self._out_dtypes(operands.gemm)[0])
            turned = inputs.rows.index_select(-1, reversal(operands.gemm).to(inputs.rows.device))
            backwards = self._backward(operands, config)
            other_way = self._launch(config, replace(inputs, rows=turned), backwards, rows.dtype)
        except Exception as error:  # As in `verify`.
            return _raised(config, error)
        other, compared = _other_rows(operands.gemm, inputs, rows, other_way)
        seen = f"{other} of {compared} rows had other bits"
        if sums_exactly(self._registry[config.kernel].numerics(gemm, config, self._environment), gemm):
            if other:
                return f"the class claims exact sums, but with K reversed {seen}"
            return self._foreign_control(gemm, operands, config, inputs, rows)
        return None if 2 * other >= max(1, compared) else f"with K reversed only {seen}"

    def _foreign_control(
        self, gemm: ExpertGemm, operands: _Operands, config: TileConfig, inputs: Inputs, rows: torch.Tensor
    ) -> str | None:
        """Return why another class of the kernel cannot be told from the one that gave `rows`, None if it can."""
        foreign = foreign_config(gemm, config, self._environment, self._registry)
        if foreign is None:
            return f"sums over K are exact and {config.kernel} has no other class to tell it from"
        try:
            others = self._run(operands, foreign, inputs, rows.dtype)
        except Exception as error:  # As in `verify`.
            return _raised(foreign, error)
        other, compared = _other_rows(operands.gemm, inputs, rows, others)
        if 2 * other >= max(1, compared):
            return None
        return f"with {foreign.label} of another class only {other} of {compared} rows had other bits"

    def release(self) -> None:
        """Drop the operands and expected rows."""
        self._operands, self._of = None, None
        self._packed.clear()
        self._reversed.clear()
        self._alone.clear()

    def token_counts(self, gemm: ExpertGemm, bucket: Bucket) -> tuple[int, ...]:
        """Return the batch sizes that are checked: the bucket's edges, capped for cost."""
        cap = tokens_cap(gemm)
        edges = (bucket.above + 1, max(bucket.above + 1, bucket.tokens - 1), bucket.tokens)
        return tuple(sorted({min(edge, cap) for edge in edges}))

    def _prepare(self, gemm: ExpertGemm) -> _Operands:
        if self._operands is None or self._of != gemm:
            self.release()
            device = device_of(self._environment) if self._device is None else self._device
            self._operands, self._of = wide_operands(gemm, self._seed, device=device), gemm
        return self._operands

    def _differs(self, operands: _Operands, config: TileConfig, reference: TileConfig, tokens: int) -> str | None:
        for start in range(0, PROBES, max(tokens, 3)):
            batch, probes = self._batch(operands, tokens, start)
            inputs = operands.inputs(batch)
            for out_dtype in self._out_dtypes(operands.gemm):
                rows = self._run(operands, config, inputs, out_dtype)
                rows = rows.view(tokens, -1, rows.shape[1])
                for position, token in probes:
                    alone = self._alone_rows(operands, reference, token, out_dtype)
                    if not same_bits(rows[position], alone):
                        return f"at {tokens} tokens row {position} differs from the same row alone ({reference.label})"
        return None

    @staticmethod
    def _out_dtypes(gemm: ExpertGemm) -> tuple[torch.dtype, ...]:
        dtype = TORCH_DTYPES[gemm.layer.dtype]
        # The unrounded partial sum hides nothing; the rounded one is what a single rank returns.
        return (dtype,) if gemm.name == "up" else tuple(dict.fromkeys((torch.float32, dtype)))

    def _batch(self, operands: _Operands, tokens: int, start: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Return which token stands at each row, and (row, token) of the probes among them."""
        generator = torch.Generator().manual_seed(hash_seed(self._seed, tokens, start))
        batch = torch.randint(operands.ids.shape[0], (tokens,), generator=generator)
        places = torch.randperm(tokens, generator=generator)[: min(tokens, PROBES)].tolist()
        # The first and the last row are where a tail is handled wrongly.
        places = list(dict.fromkeys([0, tokens - 1, *places]))[: min(tokens, PROBES)]
        probes = [(place, (start + number) % PROBES) for number, place in enumerate(places)]
        for place, token in probes:
            batch[place] = token
        return batch, probes

    def _alone_rows(
        self, operands: _Operands, reference: TileConfig, token: int, out_dtype: torch.dtype
    ) -> torch.Tensor:
        key = (reference, token, out_dtype)
        if key not in self._alone:
            self._alone[key] = self._run(operands, reference, operands.inputs(torch.tensor([token])), out_dtype)
        return self._alone[key]

    def _run(self, operands: _Operands, config: TileConfig, inputs: Inputs, out_dtype: torch.dtype) -> torch.Tensor:
        layout = self._registry[config.kernel].layout(operands.gemm, config)
        key = (config.kernel, layout)
        if key not in self._packed:
            self._packed[key] = self._pack(config, operands.weights)
        return self._launch(config, inputs, self._packed[key], out_dtype)

    def _backward(self, operands: _Operands, config: TileConfig) -> GemmWeights:
        """Return the weights with K reversed, in the config's layout."""
        key = config.kernel, self._registry[config.kernel].layout(operands.gemm, config)
        if key not in self._reversed:
            data = backward(operands.weights.data, operands.gemm)
            self._reversed[key] = self._pack(config, replace(operands.weights, data=data, plans={}))
        return self._reversed[key]

    def _pack(self, config: TileConfig, weights: GemmWeights) -> GemmWeights:
        kernel = self._registry[config.kernel]
        layout = kernel.layout(weights.gemm, config)
        return weights if layout == PLAIN else kernel.pack(weights, layout)

    def _launch(self, config: TileConfig, inputs: Inputs, weights: GemmWeights, out_dtype: torch.dtype) -> torch.Tensor:
        gemm, kernel, device = weights.gemm, self._registry[config.kernel], inputs.rows.device
        order = kernel.order(gemm, config)
        out = poisoned_output(gemm, inputs.route.tokens, out_dtype, device)
        launch(kernel, config, weights, in_order(gemm, inputs, order), out)
        synchronise(device)
        return in_slot_order(gemm, out, inputs.route, order)


def _other_rows(gemm: ExpertGemm, inputs: Inputs, a: torch.Tensor, b: torch.Tensor) -> tuple[int, int]:
    """Return how many rows of two outputs differ in any bit, and how many there are of slots or tokens with experts."""
    present = (inputs.route.ids >= 0) & (inputs.route.ids < gemm.layer.experts)
    compared = present.flatten() if gemm.name == "up" else present.any(1)
    kind = INTEGERS[a.dtype]
    other = (a.view(kind) != b.view(kind)).any(1)[compared]
    return int(other.sum()), len(other)


def _raised(config: TileConfig, error: Exception) -> str:
    """Return what a kernel raised as a reason. Raises DeviceError if nothing can be checked after it."""
    _, detail = failure(error)
    if device_lost(detail):
        raise DeviceError(f"{config.label} left the device unusable: {detail}; tune without it, in a new process")
    return detail


def tokens_cap(gemm: ExpertGemm) -> int:
    """Return the largest batch size that the check runs for `gemm`."""
    affordable = int(FLOPS_PER_LAUNCH / gemm.flops(gemm.layer.top_k))
    return min(max(affordable, MIN_TOKENS_CAP), MAX_TOKENS_CAP)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits: NaN equals itself, −0 is not 0."""
    kind = INTEGERS[a.dtype]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def wide_operands(
    gemm: ExpertGemm, seed: int, tokens: int | None = None, device: torch.device | None = None
) -> _Operands:
    """Return operands on which any other order of summation shows, by default for as many tokens as a launch takes.

    They have the same values on every device. Signs are random, exponents spread over `EXPONENTS`
    powers of two. The second half of K repeats the first with the rows' sign turned, but for a sixteenth of much
    smaller weights: large partial sums cancel, and what is left is of the size of their rounding errors, so that
    even a result rounded to bfloat16 tells orders apart. Quantised weights cannot be much smaller at some elements of
    K; there the rows are. Where all of K may be one exact sum, rows are of several magnitudes as wholes, too: what is
    rounded there is a row, against the power of two of its largest element, which short rows would nearly all share.
    Some slots are absent; a token may use an expert twice.
    """
    device = device or torch.device("cpu")
    layer = replace(gemm.layer, experts=min(MAX_EXPERTS, gemm.layer.experts))
    small = ExpertGemm(layer=layer, name=gemm.name)
    dtype = TORCH_DTYPES[layer.dtype]
    generator = torch.Generator().manual_seed(hash_seed(seed, 17))
    weight, left = _wide_weights(small, generator)
    half = half_of(small)
    bias = _wide((layer.experts, small.n), -EXPONENTS, 0, generator).to(dtype) if layer.bias else None
    tokens = tokens or max(PROBES, tokens_cap(gemm))
    per_token = 1 if gemm.name == "up" else layer.top_k
    rows = _wide((tokens, per_token, small.k), 3 - EXPONENTS, 3, generator).to(dtype)
    rows[..., half : 2 * half] = -rows[..., :half]
    if layer.weight_format != "dense":
        # What no half of whole groups holds does not cancel either.
        places = torch.cat((left, left + half, torch.arange(2 * half, small.k)))
        rows[..., places] = _wide((tokens, per_token, len(places)), -3 - EXPONENTS, -3, generator).to(dtype)
    ids = torch.randint(layer.experts, (tokens, layer.top_k), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 1 / 16] = -1
    topk_weights = torch.rand(tokens, layer.top_k, generator=generator) + 0.1
    if one_exact_sum(small):
        # Drawn last: the rest is what it is for other sizes.
        rows = torch.ldexp(rows, torch.randint(LOUDER + 1, (tokens, per_token, 1), generator=generator)).to(dtype)
    bias = None if bias is None else bias.to(device)
    weight = weight.to(device) if isinstance(weight, torch.Tensor) else moved(weight, device)
    return _Operands(
        gemm=small,
        weights=GemmWeights(gemm=small, layout=PLAIN, data=weight, bias=bias),
        rows=rows.to(device),
        ids=ids.to(torch.int32).to(device),
        topk_weights=topk_weights.to(device),
    )


def _wide_weights(gemm: ExpertGemm, generator: torch.Generator) -> tuple[Weights, torch.Tensor]:
    """Return weights whose second half of K repeats the first, and the elements of a half where sums do not cancel."""
    half = half_of(gemm)
    if gemm.layer.weight_format != "dense":
        return wide_stack(gemm, generator), torch.randperm(half, generator=generator)[: math.ceil(half / 16)]
    experts, dtype = gemm.layer.experts, TORCH_DTYPES[gemm.layer.dtype]
    weight = _wide((experts, gemm.n, gemm.k), -EXPONENTS, 0, generator).to(dtype)
    left = torch.randperm(half, generator=generator)[: math.ceil(half / 16)]
    for columns in (left, left + half):
        small_values = _wide((experts, gemm.n, len(left)), -EXPONENTS - 6, -6, generator)
        weight[..., half : 2 * half] = weight[..., :half]
        weight[..., columns] = small_values.to(dtype)
    return weight, left


def _wide(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    """Return float32 values of random sign and mantissa with exponents from `low` to `high`."""
    count = math.prod(shape)
    size = min(count, POOL_ELEMENTS)
    mantissa = torch.rand(size, generator=generator) + 1
    exponent = torch.randint(low, high + 1, (size,), generator=generator)
    sign = torch.randint(2, (size,), generator=generator) * 2 - 1
    pool = torch.ldexp(mantissa * sign, exponent)
    out = torch.empty(count)
    for start in range(0, count, max(size, 1)):
        # Rolled by a stretch of its own, so that no two experts hold the same rows.
        length = min(size, count - start)
        shift = int(torch.randint(size, (1,), generator=generator)) if start else 0
        first = min(length, size - shift)
        out[start : start + first] = pool[shift : shift + first]
        out[start + first : start + length] = pool[: length - first]
    return out.view(shape)
