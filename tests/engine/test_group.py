"""The group of ranks, here as threads over a real store; processes are in test_ranks.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import pytest
import torch.distributed as dist

from tilecast.engine.group import CHUNK_BYTES, Group
from tilecast.engine.group_store import KeyValueStore
from tilecast.errors import AgreementError, CacheError, ConfigError, InputError, TilecastError

T = TypeVar("T")


class Ranks:
    """Runs one function on every rank, each in a thread with its own connection."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.starts = 0

    def join(self, rank: int, **options: float) -> Group:
        store = cast(KeyValueStore, self.store.clone())
        return Group(store, rank=rank, world_size=self.count, name=f"test{self.starts}", **options)  # type: ignore[arg-type]

    def run(self, work: Callable[[Group], T], **options: float) -> list[T | BaseException]:
        """Return every rank's result or the exception it ended with."""
        self.starts += 1

        def one(rank: int) -> T | BaseException:
            with self.join(rank, **options) as group:
                try:
                    return work(group)
                except BaseException as error:
                    return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return Ranks(3)


def same_error(results: list[object], kind: type[TilecastError]) -> str:
    """Check that all results are the same error; return its message."""
    assert [type(result) for result in results] == [kind] * len(results)
    messages = {str(result) for result in results}
    assert len(messages) == 1
    return messages.pop()


def test_gather_returns_every_payload_in_rank_order(ranks: Ranks) -> None:
    sizes = (0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5)

    def work(group: Group) -> list[bytes]:
        for size in sizes:
            found = group.gather("data", bytes([group.rank, 255, 0]) * 1 + bytes(size))
            assert found == [bytes([rank, 255, 0]) + bytes(size) for rank in range(3)]
        return group.gather("last", b"x" * group.rank)

    assert ranks.run(work) == [[b"", b"x", b"xx"]] * 3


def test_broadcast_gives_rank_0s_payload(ranks: Ranks) -> None:
    assert ranks.run(lambda group: group.broadcast("data", bytes([group.rank]))) == [b"\0"] * 3


def test_keys_of_earlier_steps_are_deleted(ranks: Ranks) -> None:
    def work(group: Group) -> int:
        for step in range(20):
            group.gather(f"step {step}", b"payload")
        return group.world_size

    before = ranks.store.num_keys()
    ranks.run(work)
    # Per rank: a heartbeat and the two keys of the last step or two.
    assert ranks.store.num_keys() - before <= 3 * 5


def test_one_rank_waits_for_a_slow_one(ranks: Ranks) -> None:
    def work(group: Group) -> list[bytes]:
        if group.rank == 1:
            time.sleep(1.5)
        return group.gather("slow", b"here")

    # Longer than a rank may be silent: its heartbeats go on meanwhile.
    assert ranks.run(work, beat_s=0.1, dead_after_s=0.7) == [[b"here"] * 3] * 3


@pytest.mark.parametrize("kind", [CacheError, ConfigError, AgreementError])
def test_an_error_of_one_rank_is_raised_on_all(ranks: Ranks, kind: type[TilecastError]) -> None:
    def work(group: Group) -> None:
        with group.guard():
            if group.rank == 2:
                raise kind("cannot read table.db")
            group.gather("table", b"")

    prefix = "" if kind is AgreementError else "rank 2: "
    assert same_error(ranks.run(work), kind) == f"{prefix}cannot read table.db"


def test_a_foreign_error_becomes_ours_and_keeps_its_name(ranks: Ranks) -> None:
    def work(group: Group) -> None:
        with group.guard():
            if group.rank == 0:
                raise ZeroDivisionError("division by zero\nsecond line")
            group.gather("table", b"")

    assert same_error(ranks.run(work), TilecastError) == "rank 0: ZeroDivisionError: division by zero"


def test_the_first_of_several_errors_wins(ranks: Ranks) -> None:
    def work(group: Group) -> None:
        with group.guard():
            raise CacheError(f"own error of {group.rank}")

    assert same_error(ranks.run(work), CacheError) in {f"rank {r}: own error of {r}" for r in range(3)}


def test_a_rank_that_computes_learns_of_it_by_checking(ranks: Ranks) -> None:
    def work(group: Group) -> None:
        with group.guard():
            if group.rank == 0:
                raise CacheError("gone")
            for _ in range(200):
                time.sleep(0.02)
                group.check()

    assert same_error(ranks.run(work), CacheError) == "rank 0: gone"


def test_an_interrupt_ends_the_others_and_stays_an_interrupt(ranks: Ranks) -> None:
    def work(group: Group) -> None:
        with group.guard():
            if group.rank == 1:
                raise KeyboardInterrupt
            group.gather("table", b"")

    first, second, third = ranks.run(work)
    assert isinstance(second, KeyboardInterrupt)
    assert same_error([first, third], AgreementError) == "rank 1 was interrupted"


def test_ranks_out_of_step_are_told_so(ranks: Ranks) -> None:
    message = same_error(ranks.run(lambda group: group.gather("a" if group.rank else "b", b"")), AgreementError)
    assert "out of step" in message and "'a'" in message and "'b'" in message


def test_a_rank_that_left_is_not_waited_for(ranks: Ranks) -> None:
    def work(group: Group) -> list[bytes] | None:
        return None if group.rank == 1 else group.gather("table", b"")

    first, second, third = ranks.run(work)
    assert second is None
    assert "rank 1 ended while the others were still waiting" in same_error([first, third], AgreementError)


def test_a_silent_rank_is_dead(ranks: Ranks) -> None:
    ranks.starts += 1
    silent = ranks.join(1, beat_s=1000.0)
    silent._stop.set()  # stops its heartbeats without a goodbye, as a kill does
    results: list[BaseException] = []

    def work(rank: int) -> None:
        with ranks.join(rank, beat_s=0.1, dead_after_s=1.0) as group, pytest.raises(AgreementError) as caught:
            group.gather("table", b"")
        results.append(caught.value)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert same_error(list(results), AgreementError).startswith("rank 1 died: no sign of life for 1 s")


def test_a_rank_that_never_came_is_named(ranks: Ranks) -> None:
    ranks.starts += 1
    with ranks.join(0, start_within_s=0.5) as group, pytest.raises(AgreementError, match=r"rank [12] did not start"):
        group.gather("table", b"")


def test_a_lost_store_is_an_agreement_error() -> None:
    lonely = Ranks(2)
    group = lonely.join(0)
    group._silence()
    del lonely.store
    with pytest.raises(AgreementError, match="store is gone"):
        group.gather("table", b"")


def test_one_rank_alone_needs_no_store() -> None:
    with Group.alone() as group:
        assert group.gather("x", b"a") == [b"a"] and group.broadcast("x", b"b") == b"b"
        group.check()
        with pytest.raises(ZeroDivisionError), group.guard():
            raise ZeroDivisionError
        with pytest.raises(KeyboardInterrupt), group.guard():
            raise KeyboardInterrupt
    assert Group.connect(launched=False).world_size == 1


def test_impossible_places() -> None:
    with pytest.raises(InputError, match="rank is 2, expected 0 to 1"):
        Group(None, rank=2, world_size=2)
    with pytest.raises(InputError, match="no store"):
        Group(None, rank=0, world_size=2)
