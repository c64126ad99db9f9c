"""From how many tokens on the far experts' weights are better sent near: times from the table, bandwidth by a probe."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from tilecast.engine.placed_choice import Shares
from tilecast.engine.placement import break_even
from tilecast.engine.placement_part import classes_of
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import Environment
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertLayer

PROBE_BYTES = 64 << 20
PROBES = 4
"""Copies of a probe, of which the fastest counts; the first one is never it."""


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """What sending weights would bring to one layer.

    tokens: from how many on it is faster, None if at none of the token counts that are tuned. bytes: of the far
    experts' weights. bytes_per_second: as probed; None where nothing was, as the table lacks the times of a share.
    """

    tokens: int | None
    bytes: int
    bytes_per_second: float | None


def times_of(
    table: TuningTable, layer: ExpertLayer, here: Environment, *, policy: str, routing: str
) -> dict[int, float]:
    """Return the seconds that a layer takes at each token count it is tuned for on a device like `here`."""
    usable = {environment.digest for environment in table.environments if here.accepts(environment)}
    return {
        decision.bucket.tokens: decision.tuned_us / 1e6
        for decision in table.decisions
        if decision.environment in usable and decision.layer == layer
        and (decision.policy, decision.routing) == (policy, routing)
    }  # fmt: skip


def break_even_of(
    table: TuningTable,
    shares: Shares,
    *,
    near: Environment,
    far: Environment,
    policy: str,
    routing: str,
    device: torch.device,
) -> BreakEven:
    """Return the break-even of a layer whose near and far share `table` is tuned for; `device` is the near one.

    Near, the whole layer takes its own time where the table has it, else that of both shares one after the other.
    """
    layer, near_share, far_share = shares
    if far_share is None:
        return BreakEven(tokens=None, bytes=0, bytes_per_second=None)

    def seconds(part: ExpertLayer, where: Environment) -> dict[int, float]:
        return times_of(table, part, where, policy=policy, routing=routing)

    whole = seconds(layer, near)
    if not whole:
        whole = seconds(far_share, near)
        if near_share is not None:
            first = seconds(near_share, near)
            whole = {tokens: whole[tokens] + first[tokens] for tokens in whole.keys() & first.keys()}
    alone = seconds(far_share, far)
    size = sum(gemm.weight_bytes() for gemm in far_share.gemms)
    if not whole.keys() & alone.keys():
        return BreakEven(tokens=None, bytes=size, bytes_per_second=None)
    rate = copy_rate(device)
    found = break_even(layer, near_times=whole, far_times=alone, bytes_to_stream=size, bytes_per_second=rate)
    return BreakEven(tokens=found, bytes=size, bytes_per_second=rate)


def break_even_in(near: Runtime, far: Runtime, shares: Shares, device: torch.device) -> BreakEven:
    """Return the break-even of a layer by the table in use, which is that of both devices; `device` is the near one."""
    return break_even_of(
        near.table, shares, near=near.environment, far=far.environment, policy=near.policy, routing=near.routing,
        device=device,
    )  # fmt: skip


def may_stream(near: Runtime, far: Runtime, shares: Shares) -> bool:
    """Whether far experts' weights may be sent near at all.

    Under `reproducible` not between two numerics classes: bits must not depend on the number of tokens.
    """
    if shares.far is None:
        return False
    if "reproducible" not in (near.policy, far.policy):
        return True
    return classes_of(near, shares.near or shares.far) == classes_of(far, shares.far)


def stream_from(near: Runtime, far: Runtime, shares: Shares, device: torch.device) -> int | None:
    """Return from how many tokens on far experts' weights are sent near, by the table in use; None: never."""
    return break_even_in(near, far, shares, device).tokens if may_stream(near, far, shares) else None


def break_even_line(shares: Shares, found: BreakEven) -> str:
    """Return what was found for one layer in a line."""
    label = shares.layer.label
    if found.bytes_per_second is None:
        return f"{label}: the table has no times of both shares, so there is no break-even"
    sent = f"{found.bytes / 2**20:.1f} MiB of far experts at {found.bytes_per_second / 1e9:.1f} GB/s"
    when = "at no tuned token count" if found.tokens is None else f"from {found.tokens} tokens on"
    return f"{label}: sending {sent} to the near device is faster {when}"


@cache
def copy_rate(near: torch.device) -> float:
    """Return how many bytes a second reach a device from the CPU's memory, by a few copies of 64 MiB.

    From pinned memory where that is a GPU.
    """
    on_gpu = near.type == "cuda"
    # Written to, so that there is memory behind it.
    source = torch.ones(PROBE_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=near)
    least = float("inf")
    for _ in range(PROBES):
        if on_gpu:
            torch.cuda.synchronize(near)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(near)
        least = min(least, time.perf_counter() - start)
    return PROBE_BYTES / max(least, 1e-9)
