"""Activation-aware scales: which inputs of the experts matter, and what is gained by rounding those less.

As in AWQ (Lin et al., 2024): an input channel's weights are multiplied by a scale before they are rounded, and the
channel is divided by it, so that channels which carry much are rounded finely. The scale is mean |x|^α for the α
that leaves the smallest error of the experts' outputs on a text; α = 0 is plain rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tilecast.errors import InputError

ALPHAS = tuple(step / 10 for step in range(11))
MAX_ROWS = 1024
"""Tokens of a layer that errors are measured on."""
SEQUENCE = 512
MAX_TOKENS = 64 * SEQUENCE

Round = Callable[[torch.Tensor], torch.Tensor]
"""Takes a weight [N, K] in float32 and returns it as it will be after rounding."""


@dataclass(kw_only=True)
class Seen:
    """What one layer's experts were given: mean |x| [H] over all tokens, and some tokens' rows, experts and weights."""

    total: torch.Tensor
    tokens: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)
    ids: list[torch.Tensor] = field(default_factory=list)
    kept: int = 0

    @property
    def mean(self) -> torch.Tensor:
        """Mean |x| of each channel: float32 [H]."""
        return self.total / max(self.tokens, 1)

    def of_expert(self, expert: int) -> torch.Tensor:
        """Return the kept rows that were sent to an expert: float32 [rows, H]."""
        if not self.rows:
            return self.total.new_zeros((0, len(self.total)))
        chosen = (torch.cat(self.ids) == expert).any(dim=1)
        return torch.cat(self.rows)[chosen].float()

    def add(self, hidden: torch.Tensor, ids: torch.Tensor, most: int) -> None:
        """Take note of one call's tokens, and keep at most `most` of them, spread evenly."""
        hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.total += hidden.float().abs().sum(dim=0)
        self.tokens += len(hidden)
        count = min(most, MAX_ROWS - self.kept, len(hidden))
        if count > 0:
            places = torch.linspace(0, len(hidden) - 1, count, device=hidden.device).round().long()
            self.rows.append(hidden[places].clone())
            self.ids.append(ids.detach().reshape(len(hidden), -1)[places].clone())
            self.kept += count


def watch(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], sequences: Sequence[Sequence[int]]) -> Any:
    """Run a model over sequences of token ids and return what its experts modules were given, by name.

    Raises InputError where there are no tokens.
    """
    if not any(sequences):
        raise InputError("the calibration text has no tokens")
    seen: dict[str, Seen] = {}
    share = max(1, MAX_ROWS // len(sequences))
    with _watched(modules, seen, share), torch.no_grad():
        device = next(model.parameters()).device
        for sequence in sequences:
            if sequence:
                model(torch.tensor([list(sequence)], device=device), use_cache=False)
    return seen


def sequences_of(ids: Sequence[int]) -> list[list[int]]:
    """Cut a text's token ids into sequences; what is longer than MAX_TOKENS is left out."""
    ids = list(ids)[:MAX_TOKENS]
    return [ids[start : start + SEQUENCE] for start in range(0, len(ids), SEQUENCE)]


def shared_scales(seen: Seen, weights: Sequence[tuple[torch.Tensor, ...]], round_: Round) -> torch.Tensor:
    """Return the scales [H] of what all experts of a layer are given, for their weights [N, H], by expert.

    They are powers of two: what they are folded into (a norm, a router, shared experts) changes in no bit of what it
    computes, so that routing stays as it is.
    """
    rows = [seen.of_expert(expert) for expert in range(len(weights))]

    def error(scales: torch.Tensor) -> float:
        return sum(
            _error(x, weight, scales, round_) for x, own in zip(rows, weights, strict=True) if len(x) for weight in own
        )

    return _best(seen.mean, error, lambda scales: scales.log2().round().exp2())


def own_scales(rows: torch.Tensor, weight: torch.Tensor, round_: Round) -> torch.Tensor:
    """Return the scales [I] of the rows [T, I] that one expert's down projection [H, I] is given; ones without rows."""
    if not len(rows):
        return torch.ones(weight.shape[1], device=weight.device)
    return _best(rows.abs().mean(dim=0), lambda scales: _error(rows, weight, scales, round_), lambda scales: scales)


def _error(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, round_: Round) -> float:
    rounded = round_(weight * scales) / scales
    return float(((rows @ (rounded - weight).T) ** 2).sum())


def _best(
    mean: torch.Tensor, error: Callable[[torch.Tensor], float], form: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the scales of the α with the smallest error; ones unless another is better."""
    best, least = torch.ones_like(mean), error(torch.ones_like(mean))
    for alpha in ALPHAS[1:]:
        scales = mean.clamp(min=1e-6) ** alpha
        scales = form((scales / (scales.max() * scales.min()).sqrt()).clamp(2.0**-6, 2.0**6))
        found = error(scales)
        if found < least:
            best, least = scales, found
    return best


@contextmanager
def _watched(modules: Mapping[str, torch.nn.Module], seen: dict[str, Seen], share: int) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, *routing = (*args, *kwargs.values())
            ids = next(tensor for tensor in routing if not tensor.dtype.is_floating_point)
            if name not in seen:
                seen[name] = Seen(total=torch.zeros(hidden.shape[-1], device=hidden.device))
            seen[name].add(hidden, ids, share)

        return note

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
