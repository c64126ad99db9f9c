"""What routers do: which experts they choose, how close each call was, and what their weights add up to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilecast.canonical import Json
from tilecast.engine.compare_capture import Prompts, Trace
from tilecast.engine.compare_difference import finite, routing

EXAMPLES = 5
"""Tokens with another choice that are listed."""


@dataclass(frozen=True, kw_only=True)
class OtherChoice:
    """A token that chose other experts than in the reference, and by how little the reference chose its own.

    `margin` is the reference's smallest logit among the chosen less its largest among the others. It is below 0 where
    a family does not choose by logits alone (a correction bias, or groups of experts).
    """

    prompt: int
    position: int
    chosen: tuple[int, ...]
    reference: tuple[int, ...]
    margin: float


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """One router against the reference's.

    `others`: tokens that chose other experts; `others_given_equal`: those that do so on the reference's own input;
    `others_in_float32`: tokens that choose other experts when this router runs in a wider dtype on the same input
    (None: not tried), and the same for the reference. Sums are the lowest and highest sum of a token's weights.
    """

    layer: int | None
    name: str
    tokens: int
    others: int
    others_given_equal: int
    others_in_float32: int | None
    reference_others_in_float32: int | None
    logits_dtype: str
    sums: tuple[float, float]
    reference_sums: tuple[float, float]
    smallest_margin: float
    examples: tuple[OtherChoice, ...]

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        examples: list[Json] = [
            {
                "prompt": one.prompt, "position": one.position, "chosen": list(one.chosen),
                "reference": list(one.reference), "margin": finite(one.margin),
            }
            for one in self.examples
        ]  # fmt: skip
        return {
            "layer": self.layer, "operation": self.name, "tokens": self.tokens, "other_experts": self.others,
            "other_experts_given_equal_input": self.others_given_equal,
            "other_experts_in_float32": self.others_in_float32,
            "reference_other_experts_in_float32": self.reference_others_in_float32,
            "logits_dtype": self.logits_dtype, "weight_sums": [finite(value) for value in self.sums],
            "reference_weight_sums": [finite(value) for value in self.reference_sums],
            "smallest_margin": finite(self.smallest_margin), "examples": examples,
        }  # fmt: skip


def routing_reports(
    prompts: Prompts, ours: Trace, theirs: Trace, forced: Trace, wide: Trace | None
) -> tuple[RoutingReport, ...]:
    """Compare all routers of two free runs, of ours on the reference's inputs, and of a wider dtype on them."""
    found = []
    for name, record in theirs.items():
        mine, reference = ours.get(name), routing(record)
        if mine is None or reference is None or (own := routing(mine)) is None:
            continue
        given = routing(forced[name])
        assert given is not None, "a router gives the same tensors in every run"
        wider = None if wide is None or name not in wide else routing(wide[name])
        other = _others(own[2], reference[2])
        margins = _margins(reference[0], reference[2])
        rows = other.nonzero().flatten().tolist()
        found.append(
            RoutingReport(
                layer=record.operation.layer, name=name, tokens=len(own[2]), others=len(rows),
                others_given_equal=int(_others(given[2], reference[2]).sum()),
                others_in_float32=None if wider is None else int(_others(given[2], wider[2]).sum()),
                reference_others_in_float32=None if wider is None else int(_others(reference[2], wider[2]).sum()),
                logits_dtype=str(own[0].dtype).removeprefix("torch."),
                sums=_sums(own[1]), reference_sums=_sums(reference[1]),
                smallest_margin=float(margins.min()) if len(margins) else 0.0,
                examples=tuple(
                    _example(prompts, row, own[2], reference[2], float(margins[row])) for row in rows[:EXAMPLES]
                ),
            )
        )  # fmt: skip
    return tuple(found)


def _others(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return for each token whether it chose another set of experts; the order of the choice does not count."""
    if ours.shape != theirs.shape:
        return torch.ones(len(ours), dtype=torch.bool)
    return (ours.sort(1).values != theirs.sort(1).values).any(1)


def _margins(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return each token's smallest chosen logit less its largest other one; infinite where all are chosen."""
    values = logits.double()
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter(1, index.clamp(max=values.shape[1] - 1), True)
    lowest = values.masked_fill(~chosen, float("inf")).min(1).values
    return lowest - values.masked_fill(chosen, float("-inf")).max(1).values


def _sums(weights: torch.Tensor) -> tuple[float, float]:
    sums = weights.double().sum(1)
    return (float(sums.min()), float(sums.max())) if len(sums) else (0.0, 0.0)


def _example(prompts: Prompts, row: int, ours: torch.Tensor, theirs: torch.Tensor, margin: float) -> OtherChoice:
    prompt, position = prompts.place(row)
    return OtherChoice(
        prompt=prompt, position=position, chosen=tuple(sorted(ours[row].tolist())),
        reference=tuple(sorted(theirs[row].tolist())), margin=margin,
    )  # fmt: skip
