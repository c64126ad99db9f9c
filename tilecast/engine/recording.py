"""TM_GEMM_RECORD: while serving, count which layers run at which token counts, what misses, and where tokens go.

Counting is on the way to every launch, so it is a dictionary access on the host and a few small operations on the
device, without waiting for it: slots per expert are added up there and read when the record is written. Nothing is
counted while a CUDA graph is captured, and so nothing of its replays. Recording never fails serving: the first error
ends it, with one warning.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tilecast.autotune.record import Calls, LayerRecord, Load, ServingRecord, rank_path
from tilecast.problem import MAX_DIMENSION, ExpertLayer
from tilecast.settings import launcher

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

logger = logging.getLogger(__name__)

INTERVAL_S = 60.0
"""The record is written at most this often while serving, and once more at the end."""
MAX_COUNTS = 512
"""Distinct token counts that a layer's record holds; further ones count as the next power of two."""
MAX_PLACES = 1024
"""Places of a model, all its layers together, whose experts are counted apart; further ones are not counted."""


@dataclass(slots=True)
class _Seen:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    """Calls and defaults by token count."""
    places: dict[int, torch.Tensor] = field(default_factory=dict)
    """Slots per expert, absent ones last, int64 [experts + 1] on the layer's device, by the place in the model."""


class Recorder:
    """Counts the calls of expert layers and writes them to a file; threads may share one."""

    def __init__(
        self,
        path: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Record to `path`, ranks but the first to `PATH.rankN`; what is there is replaced at the first writing."""
        self.path = path
        self._target = rank_path(path, rank)
        self._rank, self._world_size = rank, world_size
        self._interval_s, self._clock = interval_s, clock
        self._begin = clock()
        self._due = self._begin + interval_s
        self._lock = threading.Lock()
        self._layers: dict[ExpertLayer, _Seen] = {}
        self._places = 0
        self._pid = os.getpid()
        self._failed = False
        self._changed = False

    def count(self, layer: ExpertLayer, ids: torch.Tensor, *, hit: bool, place: int) -> None:
        """Count one call: integers [T, k] of this rank's experts, others absent; `place` tells equal layers apart."""
        import torch

        if self._failed or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        with self._lock:
            try:
                self._count(layer, ids, hit, place)
                if self._clock() >= self._due:
                    self._write()
            except (OSError, RuntimeError, ValueError) as error:
                self._fail(error)

    def flush(self) -> None:
        """Write what was counted, if anything was since the last writing."""
        # A forked child has its parent's counts and exit handlers; the parent writes them.
        if self._failed or os.getpid() != self._pid:
            return
        with self._lock:
            try:
                if self._changed:
                    self._write()
            except (OSError, RuntimeError, ValueError) as error:
                self._fail(error)

    def record(self) -> ServingRecord:
        """Return what was counted so far. Waits for the device."""
        layers = []
        for layer, seen in self._layers.items():
            tokens = {count: Calls(calls, defaults) for count, (calls, defaults) in seen.tokens.items()}
            loads = []
            for counts in seen.places.values():
                *slots, absent = counts.tolist()
                loads.append(Load(tuple(slots), absent))
            layers.append(LayerRecord(layer=layer, tokens=tokens, loads=tuple(loads)))
        seconds = round(self._clock() - self._begin, 3)
        return ServingRecord(layers=tuple(layers), rank=self._rank, world_size=self._world_size, seconds=seconds)

    def _count(self, layer: ExpertLayer, ids: torch.Tensor, hit: bool, place: int) -> None:
        import torch

        seen = self._layers.get(layer)
        if seen is None:
            seen = self._layers[layer] = _Seen()
        tokens = ids.shape[0]
        if tokens not in seen.tokens and len(seen.tokens) >= MAX_COUNTS:
            tokens = min(MAX_DIMENSION, 1 << (tokens - 1).bit_length())
        calls = seen.tokens.setdefault(tokens, [0, 0])
        calls[0] += 1
        calls[1] += not hit
        self._changed = True
        counts = seen.places.get(place)
        if counts is None:
            if self._places >= MAX_PLACES:
                return
            self._places += 1
            # Made outside of inference mode: what is made within cannot be changed without.
            with torch.inference_mode(False):
                counts = torch.zeros(layer.experts + 1, dtype=torch.int64, device=ids.device)
            seen.places[place] = counts
        with torch.no_grad():
            flat = ids.reshape(-1).to(torch.int64)
            experts = torch.where((flat >= 0) & (flat < layer.experts), flat, layer.experts)
            counts.scatter_add_(0, experts, torch.ones_like(experts))

    def _write(self) -> None:
        data = json.dumps(self.record().to_json(), separators=(",", ":")).encode("ascii")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._target.parent, prefix=f".{self._target.name}.")
        try:
            with os.fdopen(handle, "wb") as part:
                part.write(data)
            os.chmod(name, 0o644)
            os.replace(name, self._target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        self._changed = False
        # From the end of the writing, so that a slow disk does not make serving wait all the time.
        self._due = self._clock() + self._interval_s

    def _fail(self, error: Exception) -> None:
        self._failed = True
        detail = " ".join(str(error).split())[:200]
        logger.warning("recording to %s ended, serving goes on: %s: %s", self._target, type(error).__name__, detail)


_recorder: Recorder | None = None


def active() -> Recorder | None:
    """Return the recorder of this process, None where nothing is recorded."""
    return _recorder


def start(path: str | None) -> None:
    """Record to `path` from now on (None: no more); what was recorded to another file before is written first."""
    global _recorder
    wanted = None if path is None else Path(path).absolute()
    if _recorder is not None:
        if _recorder.path == wanted:
            return
        stop()
    if wanted is not None:
        started = launcher()
        rank, world_size = (0, 1) if started is None else (started.rank, started.world_size)
        _recorder = Recorder(wanted, rank=rank, world_size=world_size)
        atexit.register(_recorder.flush)


def stop() -> None:
    """Write what was recorded and record no more."""
    global _recorder
    if _recorder is not None:
        _recorder.flush()
        atexit.unregister(_recorder.flush)
        _recorder = None
