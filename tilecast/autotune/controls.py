"""What stands for the negative control where the order of a sum cannot show: another class of the same kernel.

The class check and certificates compare bits, and a control shows that they would see a config that computes otherwise.
Where sums are rounded on their way that is the same sum from the other end of K. A class that takes all of K as
one exact sum (integer codes, rows as integers) has the same bits from either end, rightly, so K reversed shows
nothing. What such a class does round is rows, before they are multiplied. What can go wrong is that a row is rounded
otherwise in a batch than alone: against the largest element of its tile, or not at all because a path for few rows
multiplies floats. So the control is a config that rounds elsewhere: the same kernel on the same inputs, in another of
its classes. It has other bits only if the inputs show where rows are rounded; on inputs of few bits, which no rounding
changes, it has none, and equal bits prove nothing there.

K reversed is run all the same, and must leave every bit: the class has said that it would. No class that did not say
so is excused from the order of its sums.
"""

from __future__ import annotations

from collections.abc import Mapping

from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig


def sums_exactly(fields: Mapping[str, Json], gemm: ExpertGemm) -> bool:
    """Whether a class with these fields says that it takes all of K as one exact sum, whose order cannot show.

    It says so in `group_sums`, which then begins with `exact`, of sums over `flush_k` elements of K.
    """
    length = fields.get("flush_k")
    return str(fields.get("group_sums")).startswith("exact") and isinstance(length, int) and gemm.k <= length


def foreign_config(
    gemm: ExpertGemm, config: TileConfig, environment: Environment, registry: Registry
) -> TileConfig | None:
    """Return a config of the same kernel and another class, of the same weight layout if there is one; None if none.

    A class that rounds rows to another type (the field `activations`) does not count: its bits differ on any inputs, so
    it says nothing about these. Nor does one that does not claim to be free of the batch.
    """
    kernel = registry[config.kernel]
    own, layout = kernel.numerics(gemm, config, environment), kernel.layout(gemm, config)
    found = None
    for other in kernel.space(gemm, 1, environment):
        fields = kernel.numerics(gemm, other, environment)
        if fields == own or fields.get("activations") != own.get("activations"):
            continue
        if registry.invalid(gemm, other, environment) is not None or not kernel.batch_invariant(gemm, other):
            continue
        if kernel.layout(gemm, other) == layout:
            return other
        found = found or other
    return found
