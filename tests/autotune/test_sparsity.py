"""Profiles that say how sparse relu layers are, and operands drawn by them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilecast.autotune.routing_profiles import RoutingProfile, load_profile, parse_profile, plain_histogram
from tilecast.autotune.workload import Workload
from tilecast.environment import cpu_environment
from tilecast.errors import InputError
from tilecast.kernels.reference import reference_up
from tilecast.problem import ExpertLayer

LAYER = ExpertLayer(hidden=512, intermediate=256, experts=2, top_k=1, activation="relu")
HERE = cpu_environment()


def zeros(layer: ExpertLayer, routing: str) -> tuple[float, float]:
    """Return the share of zeros that up makes and that down gets."""
    load = Workload(HERE, routing=routing)
    inputs, weights = load.inputs(layer.up, 40, 0), load.plain(layer.up)
    made = reference_up(layer, inputs.rows, weights.data, inputs.route, weights.bias)
    rows = load.inputs(layer.down, 40, 0).rows
    return float((made == 0).double().mean()), float((rows == 0).double().mean())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "layer",
    [
        LAYER,
        replace(LAYER, activation="drelu", dtype="fp16"),
        replace(LAYER, activation="relu2", gated=False, bias=True, dtype="fp32"),
    ],
    ids=lambda layer: layer.label,
)
def test_as_many_neurons_are_dead_as_the_profile_says(layer: ExpertLayer, share: float) -> None:
    up, down = zeros(layer, f"uniform+sparsity:{share}")
    assert abs(up - share) < 0.04
    assert abs(down - share) < 0.02


def test_operands_are_what_they_were_where_nothing_is_said_of_sparsity() -> None:
    silu = replace(LAYER, activation="silu")
    for gemm in silu.gemms:
        plain, sparse = (Workload(HERE, routing=name) for name in ("uniform", "uniform+sparsity:0.9"))
        assert torch.equal(plain.inputs(gemm, 4, 0).rows, sparse.inputs(gemm, 4, 0).rows)
        assert torch.equal(plain.plain(gemm).data, sparse.plain(gemm).data)
        assert plain.copies(gemm) == sparse.copies(gemm)
    assert zeros(LAYER, "uniform")[1] == 0


def test_more_copies_are_rotated_where_little_of_each_is_read() -> None:
    environment = replace(HERE, llc_bytes=1 << 20)
    dense, sparse = (Workload(environment, routing=name) for name in ("uniform", "uniform+sparsity:0.9"))
    assert sparse.copies(LAYER.down) >= 9 * dense.copies(LAYER.down) - 9


def test_a_share_has_one_name() -> None:
    profile = parse_profile("zipf:1.20+sparsity:0.90")
    assert (profile.name, profile.exponent, profile.sparsity) == ("zipf:1.2+sparsity:0.9", 1.2, 0.9)
    assert load_profile("uniform+sparsity:0.5").is_uniform
    for one in (profile, plain_histogram([3, 1]).with_sparsity("0.7")):
        again = RoutingProfile.from_json(one.to_json())
        assert again == one and again.sparsity == one.sparsity and again.counts == one.counts
    assert parse_profile("uniform").sparsity is None


@pytest.mark.parametrize(
    "text", ["uniform+sparsity:", "uniform+sparsity:1.5", "uniform+sparsity:x", "zipf:1+sparsity:-1"]
)
def test_a_share_that_is_none_is_told_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"expected a decimal from 0 to 1"):
        parse_profile(text)
