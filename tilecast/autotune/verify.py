"""Whether decisions still hold: their configs and the defaults beside them, measured again on this device."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tilecast.autotune.measure import Measurer, failure
from tilecast.autotune.timing import Timing, noise, pool
from tilecast.evidence import Choice, Decision, Measurement
from tilecast.problem import ExpertGemm, TileConfig

ROUNDS = 5
SAMPLES = 3
"""Samples of a config in one round."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One decided config measured again. Times are medians in µs, None where it did not run; changes are relative.

    `verdict` is `holds`, `slower` (than stored, beyond the noise), `no win` (it was chosen for a win over the
    default that is gone) or `fails`; `detail` says it in words. `noise` is what a change had to exceed.
    """

    decision: Decision
    gemm: ExpertGemm
    verdict: str
    detail: str
    p50_us: float | None = None
    default_us: float | None = None
    noise: float | None = None

    @property
    def choice(self) -> Choice:
        """What the table says."""
        return self.decision.choice(self.gemm.name)

    @property
    def drifted(self) -> bool:
        """Whether the decision does not hold any more."""
        return self.verdict != "holds"


def sample_decided(decisions: Iterable[Decision], count: int, seed: int) -> list[tuple[Decision, ExpertGemm]]:
    """Return `count` of the decided configs, or all if there are fewer, in table order; equal seeds draw alike."""
    decided = [(decision, gemm) for decision in decisions for gemm in decision.layer.gemms]
    drawn = random.Random(seed).sample(range(len(decided)), min(count, len(decided)))
    # In order, so that a GEMM's weights are built once.
    return [decided[place] for place in sorted(drawn)]


def verify(measurer: Measurer, decision: Decision, gemm: ExpertGemm, *, rounds: int = ROUNDS) -> Verified:
    """Measure a decided config and the default, interleaved, and compare with what the decision stores.

    What a kernel raises becomes the verdict `fails`. Raises DeviceError if the GEMM does not fit the device.
    """
    choice, tokens = decision.choice(gemm.name), decision.bucket.tokens
    configs = list(dict.fromkeys((choice.config, choice.default)))
    measurer.prepare(gemm)
    made: list[Measurement] = []
    for number in range(rounds):
        turn = number % len(configs)
        for config in configs[turn:] + configs[:turn]:
            try:
                samples = measurer.sample(gemm, tokens, config, round=number, count=SAMPLES)
            except Exception as error:  # what a kernel may raise has no bounds, as in the tuner
                status, detail = failure(error)
                what = "the decided config" if config == choice.config else "the default"
                return Verified(decision=decision, gemm=gemm, verdict="fails", detail=f"{what}: {status}: {detail}")
            made.append(_measurement(decision, gemm, config, number, samples))
    timings, _ = pool(made)
    return judge(decision, gemm, timings[choice.config], timings[choice.default])


def judge(decision: Decision, gemm: ExpertGemm, now: Timing, default: Timing) -> Verified:
    """Compare timings made now with the stored ones. A change must exceed the noise stored and that of now together."""
    choice = decision.choice(gemm.name)
    # Of one config the comparison is with its own stored time; a tuned one also raced the default.
    allowed = (choice.noise**2 + noise(now, default) ** 2) ** 0.5
    verdict, detail = "holds", "as stored"
    slower = now.p50_us / choice.p50_us - 1
    win, stored_win = default.p50_us / now.p50_us - 1, choice.default_us / choice.p50_us - 1
    if choice.config != choice.default and win <= noise(now, default) and (1 + win) * (1 + allowed) < 1 + stored_win:
        verdict, detail = "no win", f"{win:+.1%} over the default now, {stored_win:+.1%} when it was decided"
    elif slower > allowed:
        verdict, detail = "slower", _against(now.p50_us, choice.p50_us)
    elif slower < -allowed:
        detail = f"faster than stored: {slower:+.1%}"
    return Verified(
        decision=decision, gemm=gemm, verdict=verdict, detail=detail, p50_us=now.p50_us, default_us=default.p50_us,
        noise=allowed,
    )  # fmt: skip


def _against(now_us: float, stored_us: float) -> str:
    """Return how much slower a time is than the stored one: a percentage, or from twice on a factor."""
    factor = now_us / stored_us
    return f"{factor:,.1f} × the stored time" if factor >= 2 else f"{factor - 1:+.1%} against the stored time"


def _measurement(
    decision: Decision, gemm: ExpertGemm, config: TileConfig, number: int, samples: Sequence[float]
) -> Measurement:
    return Measurement(
        environment=decision.environment, gemm=gemm, tokens=decision.bucket.tokens, config=config,
        samples_us=tuple(samples), routing=decision.routing, round=number,
    )  # fmt: skip
