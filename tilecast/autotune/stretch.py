"""Measurements made one after the other, between two looks at what else uses the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from tilecast.autotune.contention import MIN_STRETCH_S
from tilecast.autotune.measure import device_lost
from tilecast.autotune.session import TRIES, Session
from tilecast.errors import DeviceError
from tilecast.evidence import Measurement

STRETCH_S = 0.4
"""Time between two looks at what else uses the device."""
PAUSE_S = 0.5
"""The wait before a disturbed stretch is measured again.

It is, up to TRIES times. Each stretch that this did not help halves how often the next one may be: a neighbour that
stays would otherwise make a tuning many times as long and change nothing. The first quiet one gives all tries back.
"""


Take = Callable[[], list[Measurement]]


class Stretch:
    """Measurements made one after the other: kept at once, or when a watch has seen that nothing disturbed them.

    What was taken while something else used the device is taken again, a few times, fewer where that has not helped
    before; then it is kept with the reason as its detail.
    """

    def __init__(self, session: Session) -> None:
        """Measure for `session`, under its watch."""
        self._session = session
        self._watch = session.watch
        # A measurer in a process of its own gets another one when the device is lost to it.
        self._restarts = bool(getattr(session.measurer, "restarts", False))
        self._start: object = None
        self._began = 0.0
        self._held: list[tuple[Take, list[Measurement]]] = []

    def add(self, take: Take) -> list[Measurement]:
        """Measure; return what was kept by now. What failed is as it is: only what ran is asked for again."""
        if self._watch is None:
            return [self.keep(m) for m in take()]
        if not self._held:
            self._start, self._began = self._watch.read(), time.monotonic()
        self._held.append((take, take()))
        return self.close() if time.monotonic() - self._began > STRETCH_S else []

    def close(self) -> list[Measurement]:
        """Keep what is held, measured again as long as it was disturbed."""
        if self._watch is None or not self._held:
            return []
        reason = self._watch.disturbed(self._start, self._watch.read())
        for _ in range(self._session.tries):
            if reason is None:
                break
            self._session.disturbed += 1
            time.sleep(PAUSE_S)
            start, began = self._watch.read(), time.monotonic()
            self._held = [
                (take, take() if any(m.status == "ok" for m in found) else found) for take, found in self._held
            ]
            # Without its gate a stretch may be too short for the counters to tell.
            time.sleep(max(0.0, MIN_STRETCH_S - (time.monotonic() - began)))
            reason = self._watch.disturbed(start, self._watch.read())
        self._session.tries = TRIES if reason is None else self._session.tries // 2
        found = [
            m if reason is None or m.status != "ok" else replace(m, detail=reason)
            for _, taken in self._held
            for m in taken
        ]
        self._held = []
        return [self.keep(m) for m in found]

    def keep(self, measurement: Measurement) -> Measurement:
        """Keep a measurement. Raises DeviceError if it lost the device to this process."""
        self._session.keep(measurement)
        if measurement.status == "runtime_error" and device_lost(measurement.detail) and not self._restarts:
            raise DeviceError(
                f"{measurement.config.label} left the device unusable to this process ({measurement.detail}); "
                "that is recorded: run tune again, it goes on without this config"
            )
        return measurement
