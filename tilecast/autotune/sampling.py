"""The samples of one race's configs: of all that wait for them within the same time, where the measurer can do that.

A machine is slowed down and gets faster again within 10 to 100 ms. Of two configs sampled one after the other either
may look the slower one for that, and no statistic over the few samples that they get can tell; launches that take
turns meet the same machine.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from itertools import pairwise

from tilecast.autotune.gate import Verdict
from tilecast.autotune.measure import SAMPLE_US, Together, failure
from tilecast.autotune.prescreen import Candidate
from tilecast.autotune.session import Session
from tilecast.autotune.stretch import STRETCH_S, Stretch
from tilecast.errors import DeviceError
from tilecast.evidence import Measurement
from tilecast.problem import ExpertGemm, TileConfig

logger = logging.getLogger(__name__)

WAIT_S = 5.0
"""Configs are timed this long after the first of them passed its gate: a tuner that is killed loses no more."""


class Sampling:
    """Takes and keeps samples for one task, and knows what they cost."""

    def __init__(
        self, session: Session, gemm: ExpertGemm, tokens: int, candidates: Mapping[TileConfig, Candidate]
    ) -> None:
        """Measure `candidates` of `gemm` at so many tokens for `session`."""
        self.session = session
        self.gemm = gemm
        self.tokens = tokens
        self._candidates = candidates
        self._cost_s: dict[TileConfig, float] = {}
        device_kind = session.plan.environment.device_kind
        self._least_s = SAMPLE_US[device_kind] / 1e6
        # On a GPU a sample is one graph, shorter than what disturbs.
        self._measurer = session.measurer if isinstance(session.measurer, Together) and device_kind == "cpu" else None

    @property
    def together(self) -> bool:
        """Whether configs are sampled together."""
        return self._measurer is not None

    def cost_s(self, config: TileConfig) -> float | None:
        """Return the seconds of a sample; None before anything is known of it."""
        return self._cost_s.get(config)

    def passed(self, config: TileConfig, verdict: Verdict) -> None:
        """Take a sample to cost what a launch in the gate did, until there is one."""
        if verdict.launch_us > 0:
            self._cost_s.setdefault(config, max(self._least_s, verdict.launch_us / 1e6))

    def take(self, config: TileConfig, number: int, count: int, verdict: Verdict) -> Measurement:
        """Return a config's samples in round `number`, or why there are none."""
        status, detail = verdict.status, verdict.detail
        samples: tuple[float, ...] = ()
        if status == "ok":
            try:
                samples = self.session.measurer.sample(self.gemm, self.tokens, config, round=number, count=count)
            except DeviceError:
                # Nothing is known of the config: measuring itself does not work.
                raise
            except Exception as error:  # Whatever a kernel raises is evidence about it, not the end of tuning.
                status, detail = failure(error)
        return self._measurement(config, number, verdict, status, detail, samples)

    def take_together(
        self, verdicts: Mapping[TileConfig, Verdict], number: int, count: int
    ) -> list[Measurement] | None:
        """Return the samples of several configs in round `number`; None where something went wrong with any of them."""
        assert self._measurer is not None
        try:
            samples = self._measurer.sample_together(self.gemm, self.tokens, list(verdicts), round=number, count=count)
        except DeviceError:
            raise
        except Exception as error:  # One of them; which one shows when each runs alone.
            logger.debug("sampling %d configs together failed: %s", len(verdicts), error)
            return None
        return [
            self._measurement(config, number, verdict, "ok", verdict.detail, taken)
            for (config, verdict), taken in zip(verdicts.items(), samples, strict=True)
        ]

    def _measurement(
        self,
        config: TileConfig,
        number: int,
        verdict: Verdict,
        status: str,
        detail: str,
        samples: tuple[float, ...],
    ) -> Measurement:
        if samples:
            self._cost_s[config] = max(self._least_s, max(samples) / 1e6)
        session = self.session
        return Measurement(
            environment=session.plan.environment.digest,
            gemm=self.gemm,
            tokens=self.tokens,
            config=config,
            status=status,
            samples_us=samples,
            routing=session.plan.routing,
            numerics=self._candidates[config].numerics,
            error_ratio=verdict.error_ratio,
            rank=session.peers.rank,
            world_size=session.peers.world_size,
            run=session.run,
            round=number,
            detail=detail,
            measured_at=time.time(),
        )


class Batch:
    """The configs of one round that passed the gate and wait for their samples."""

    def __init__(self, sampling: Sampling, number: int, count: int) -> None:
        """Take `count` samples of each in round `number`."""
        self._sampling = sampling
        self._number = number
        self._count = count
        self._stretch = Stretch(sampling.session)
        self._waiting: dict[TileConfig, Verdict] = {}
        self._since = 0.0
        self._failed: dict[TileConfig, Measurement] = {}

    def waiting_s(self) -> float:
        """Return the seconds that sampling those that wait takes, as far as that is known."""
        return self._count * sum(self._sampling.cost_s(config) or 0.0 for config in self._waiting)

    def add(self, config: TileConfig, verdict: Verdict) -> list[Measurement]:
        """Have a config sampled, now or with others; return what was kept by now."""
        sampling = self._sampling
        if not sampling.together:
            return self._stretch.add(lambda: [sampling.take(config, self._number, self._count, verdict)])
        if verdict.status != "ok":
            return [self._stretch.keep(sampling.take(config, self._number, self._count, verdict))]
        sampling.passed(config, verdict)
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting[config] = verdict
        return self._sample() if time.monotonic() - self._since > WAIT_S else []

    def close(self) -> list[Measurement]:
        """Sample those that still wait and keep all."""
        return [*self._sample(), *self._stretch.close()]

    def _sample(self) -> list[Measurement]:
        made: list[Measurement] = []
        for group in self._groups():
            made += self._stretch.add(partial(self._take, group))
            # Groups are as long as a stretch should be.
            made += self._stretch.close()
        self._waiting = {}
        return made

    def _groups(self) -> list[dict[TileConfig, Verdict]]:
        """Return those that wait in groups of about equal size, whose samples of one kind take a stretch's time."""
        if not self._waiting:
            return []
        waiting = list(self._waiting.items())
        whole_s = sum(self._sampling.cost_s(config) or 0.0 for config in self._waiting)
        groups = min(len(waiting), max(1, math.ceil(whole_s / STRETCH_S)))
        bounds = [round(i * len(waiting) / groups) for i in range(groups + 1)]
        return [dict(waiting[low:high]) for low, high in pairwise(bounds)]

    def _take(self, group: Mapping[TileConfig, Verdict]) -> list[Measurement]:
        running = {config: verdict for config, verdict in group.items() if config not in self._failed}
        if len(running) > 1 and (found := self._sampling.take_together(running, self._number, self._count)) is not None:
            return [*(self._failed[config] for config in group if config in self._failed), *found]
        return [self._alone(config, verdict) for config, verdict in group.items()]

    def _alone(self, config: TileConfig, verdict: Verdict) -> Measurement:
        if config not in self._failed:
            found = self._sampling.take(config, self._number, self._count, verdict)
            if found.status == "ok":
                return found
            self._failed[config] = found
        return self._failed[config]
