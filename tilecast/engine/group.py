"""Ranks talking through the launcher's key-value store: gather, broadcast, and failing together.

Nothing here blocks in a collective: every wait polls the store and looks, while it polls, whether another
rank has failed or fallen silent. So a rank may compile for an hour while the others wait, and yet the death
or error of any rank ends all of them within seconds, with the same error type and message.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, cast

import torch.distributed as dist

from tilecast.canonical import canonical_json
from tilecast.engine.group_store import Failure, KeyValueStore, first_line, store_errors, suppressed
from tilecast.errors import AgreementError, InputError, TilecastError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
"""Largest value stored under one key; torch's TCPStore refuses 8 MiB and more."""

WATCH_S = 0.5
"""How often a waiting rank looks for failures of others."""

REPORT_S = 60.0
"""How often a waiting rank logs for whom it waits."""

ACKNOWLEDGE_S = 5.0
"""How long failing ranks wait for one another, so that a launcher does not kill one before it has spoken."""

LEFT = b"left"
_instances = itertools.count()


class Group:
    """All ranks of a job, able to exchange bytes and to fail together.

    Every rank must call the same methods with the same names in the same order. A group of one rank needs no
    store and passes its own payloads through. After a failure every method raises that failure again.
    """

    def __init__(
        self,
        store: KeyValueStore | None,
        *,
        rank: int,
        world_size: int,
        name: str | None = None,
        beat_s: float = 1.0,
        dead_after_s: float = 10.0,
        start_within_s: float = 60.0,
    ) -> None:
        """Join the ranks that share `store` and start sending heartbeats.

        `name` keeps groups that share a store apart; by default groups are numbered as each process makes them.
        A rank silent for `dead_after_s` seconds is dead; one that never spoke is given `start_within_s`.
        Raises InputError for a rank outside 0 to world_size - 1, AgreementError when the store is gone.
        """
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank}, expected 0 to {world_size - 1} (the world size is {world_size})")
        if world_size > 1 and store is None:
            raise InputError(f"world size is {world_size} but no store was given, expected one that all ranks share")
        self.rank = rank
        self.world_size = world_size
        self._beat_s, self._dead_after_s, self._start_within_s = beat_s, dead_after_s, start_within_s
        self._step = 0
        self._posted: list[str] = []
        self._failure: Failure | None = None
        self._stop = threading.Event()
        self._next_watch = 0.0
        self._started = time.monotonic()
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._thread: threading.Thread | None = None
        self._store: KeyValueStore | None = None
        self._prefix = ""
        if world_size > 1 and store is not None:
            # Groups of one job are made in the same order everywhere; the number keeps their keys apart.
            self._prefix = f"tilecast/{next(_instances) if name is None else name}/"
            self._store = store
            self._set(f"beat/{rank}", b"0")
            self._thread = threading.Thread(target=self._send_beats, name="tilecast-heartbeat", daemon=True)
            self._thread.start()
            atexit.register(self._silence)

    @classmethod
    def alone(cls) -> Group:
        """Return the group of a process on its own."""
        return cls(None, rank=0, world_size=1)

    @classmethod
    def connect(cls, *, launched: bool, timeout_s: float = 60.0) -> Group:
        """Return the group of all ranks that the launcher started.

        Uses torch.distributed's default process group if there is one; otherwise, if `launched` says that
        torchrun's variables are set, its rendezvous. Else a group of one. Raises AgreementError.
        """
        if dist.is_available() and dist.is_initialized():
            # torch's stubs leave out clone and bytes as values; every store has both.
            default = cast(KeyValueStore, dist.distributed_c10d._get_default_store())
            return cls(default, rank=dist.get_rank(), world_size=dist.get_world_size())
        if not launched:
            return cls.alone()
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, world_size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
        except (RuntimeError, ValueError) as error:
            raise AgreementError(f"cannot reach the launcher's store: {first_line(error)}") from error
        return cls(store if world_size > 1 else None, rank=rank, world_size=world_size)

    # Exchanging bytes -------------------------------------------------------------------------------------

    def gather(self, name: str, payload: bytes) -> list[bytes]:
        """Give `payload` to all ranks and return every rank's, in rank order, when all have come.

        Waits as long as all ranks live. Raises what any rank failed with; AgreementError when a rank died,
        left, or is at a step of another name.
        """
        if self.world_size == 1:
            return [payload]
        self._post(name, payload)
        keys = [f"{self._step}/{rank}" for rank in range(self.world_size)]
        self._await(keys, name)
        found = [self._fetch(key, name, rank) for rank, key in enumerate(keys)]
        self._forget_previous()
        return found

    def broadcast(self, name: str, payload: bytes | None) -> bytes:
        """Return rank 0's `payload` on every rank; the others' is ignored. Raises as `gather` does."""
        # A gather, so that nobody runs ahead: keys of the step before can then be deleted.
        return self.gather(name, (payload or b"") if self.rank == 0 else b"")[0]

    def _post(self, name: str, payload: bytes) -> None:
        self._step += 1
        head = f"{self._step}/{self.rank}"
        chunks = [payload[at : at + CHUNK_BYTES] for at in range(0, len(payload), CHUNK_BYTES)]
        for number, chunk in enumerate(chunks):
            self._set(f"{head}/{number}", chunk)
        # Written last: whoever sees it can read all chunks.
        self._set(head, canonical_json({"name": name, "chunks": len(chunks)}).encode("ascii"))
        self._posted += [head, *(f"{head}/{number}" for number in range(len(chunks)))]

    def _fetch(self, key: str, name: str, rank: int) -> bytes:
        head = json.loads(self._get(key))
        if head["name"] != name:
            seen = sorted({f"rank {self.rank} at {name!r}", f"rank {rank} at {head['name']!r}"})
            self.fail(AgreementError(f"ranks are out of step: {' and '.join(seen)}; start all with the same input"))
        return b"".join(self._get(f"{key}/{number}") for number in range(head["chunks"]))

    def _forget_previous(self) -> None:
        """Delete this rank's keys of earlier steps: all ranks are at this step, so all have read them."""
        assert self._store is not None
        kept = f"{self._step}/"
        for key in [key for key in self._posted if not key.startswith(kept)]:
            with store_errors():
                self._store.delete_key(self._prefix + key)
        self._posted = [key for key in self._posted if key.startswith(kept)]

    def _await(self, keys: list[str], name: str) -> None:
        pause_s = 0.0005
        next_report = time.monotonic() + REPORT_S
        while not self._has(keys):
            self.check()
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.05)
            if time.monotonic() > next_report:
                absent = [rank for rank, key in enumerate(keys) if not self._has([key])]
                logger.warning("still waiting for ranks %s at %r; they are alive", absent, name)
                next_report = time.monotonic() + REPORT_S

    # Failing together -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what any rank failed with, or AgreementError if one died or left; cheap to call often."""
        if self.world_size == 1:
            return
        now = time.monotonic()
        if self._failure is None and now < self._next_watch:
            return
        self._next_watch = now + WATCH_S
        if self._failure is not None or self._has(["failure"]):
            self._raise_shared()
        for rank in range(self.world_size):
            if rank != self.rank:
                self._check_beat(rank, now)

    def fail(self, error: BaseException) -> NoReturn:
        """Make every rank raise `error`'s type with the same message, this one too; the first failure wins.

        An error that is not Tilecast's own becomes a TilecastError that names it. Alone, raises `error`.
        """
        if self.world_size == 1 or self._store is None:
            raise error
        own = isinstance(error, TilecastError)
        text = first_line(error) if own else f"{type(error).__name__}: {first_line(error)}"
        # What ranks find out about one another names the ranks itself.
        text = text if isinstance(error, AgreementError) else f"rank {self.rank}: {text}"
        failure = Failure(type(error).__name__ if own else "TilecastError", text)
        with store_errors():
            self._store.compare_set(self._prefix + "failure", "", failure.to_bytes().decode("ascii"))
        self._raise_shared(error)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run a block whose errors, of any kind, reach all ranks as `fail` says. Interrupts end all ranks too."""
        try:
            yield
        except KeyboardInterrupt:
            with suppressed():
                self.fail(AgreementError(f"rank {self.rank} was interrupted"))
            raise
        except Exception as error:
            self.fail(error)

    def _raise_shared(self, cause: BaseException | None = None) -> NoReturn:
        first = self._failure is None
        if self._failure is None:
            self._failure = Failure.from_bytes(self._get("failure"))
        if first:
            with suppressed():
                self._acknowledge()
        raise self._failure.error() from cause

    def _acknowledge(self) -> None:
        self._set(f"seen/{self.rank}", b"1")
        deadline = time.monotonic() + ACKNOWLEDGE_S
        while time.monotonic() < deadline:
            now = time.monotonic()
            waiting = [r for r in range(self.world_size) if r != self.rank and not self._has([f"seen/{r}"])]
            if all(self._gone(rank, now) for rank in waiting):
                return
            time.sleep(0.02)

    def _gone(self, rank: int, now: float) -> bool:
        """Whether a rank cannot be waited for: it left, or has been silent for too long."""
        if not self._has([f"beat/{rank}"]):
            return now - self._started > self._start_within_s
        beat = self._get(f"beat/{rank}")
        seen, since = self._beats.get(rank, (b"", now))
        if beat != seen:
            self._beats[rank] = (beat, now)
            return beat == LEFT
        return beat == LEFT or now - since > self._dead_after_s

    def _check_beat(self, rank: int, now: float) -> None:
        if not self._gone(rank, now):
            return
        known = self._beats.get(rank)
        if known is None:
            text = f"rank {rank} did not start within {self._start_within_s:g} s"
        elif known[0] == LEFT:
            # It may have left after giving what is waited for; whoever waits looks for that first.
            if self._has([f"{self._step}/{rank}"]):
                return
            text = f"rank {rank} ended while the others were still waiting for it"
        else:
            text = f"rank {rank} died: no sign of life for {self._dead_after_s:g} s"
        self.fail(AgreementError(f"{text}; start all ranks again"))

    def _send_beats(self) -> None:
        assert self._store is not None
        # A connection of its own, so that a large transfer of the main thread delays no heartbeat.
        with suppressed():
            store = self._store.clone()
            for beat in itertools.count(1):
                if self._stop.wait(self._beat_s):
                    return
                store.set(f"{self._prefix}beat/{self.rank}", str(beat))

    # Leaving ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave: stop the heartbeats and tell the others. Rank 0, whose process may host the store, goes last."""
        if self._store is None or self._stop.is_set():
            return
        self._silence()
        if self.rank == 0 and self._failure is None:
            deadline = time.monotonic() + ACKNOWLEDGE_S
            with suppressed():
                while time.monotonic() < deadline and not all(
                    self._gone(rank, time.monotonic()) for rank in range(1, self.world_size)
                ):
                    time.sleep(0.02)

    def _silence(self) -> None:
        atexit.unregister(self._silence)
        if self._thread is None or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(timeout=2 * self._beat_s)
        with suppressed():
            self._set(f"beat/{self.rank}", LEFT)

    def __enter__(self) -> Group:
        """Return the group itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the group."""
        self.close()

    # The store --------------------------------------------------------------------------------------------

    def _set(self, key: str, value: bytes) -> None:
        assert self._store is not None
        with store_errors():
            self._store.set(self._prefix + key, value)

    def _get(self, key: str) -> bytes:
        assert self._store is not None
        with store_errors():
            return self._store.get(self._prefix + key)

    def _has(self, keys: list[str]) -> bool:
        assert self._store is not None
        with store_errors():
            return self._store.check([self._prefix + key for key in keys])
