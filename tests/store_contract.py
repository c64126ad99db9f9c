"""The contract of `tilecast.store.Store` as tests. A test class per implementation inherits `StoreContract`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import delete, make_url, text

from tilecast.cache_store import models
from tilecast.cache_store.files import sqlite_path
from tilecast.cache_store.queries import read_measurements
from tilecast.cache_store.session import Database, open_server, open_sqlite
from tilecast.cache_store.store import open_store
from tilecast.environment import Environment
from tilecast.errors import CacheError, SchemaError
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.problem import Bucket, ExpertLayer, TileConfig
from tilecast.store import Store

HERE = Environment(
    device_kind="cpu",
    device="Some CPU",
    arch="x86_64",
    features="avx2,fma",
    units=8,
    llc_bytes=32 << 20,
    kernel_source="0" * 64,
    torch="2.13.0",
    compiler="0.50.0",
)
THERE = replace(HERE, device="Another CPU")
LAYER = ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2)
CONFIG = TileConfig("llvm.moe_gemm", {"mr": 6, "nr": 16})
OTHER = CONFIG.with_params(mr=8)


def measurement(**changes: object) -> Measurement:
    values = {"environment": HERE.digest, "gemm": LAYER.up, "tokens": 4, "config": CONFIG, "samples_us": (3.0, 2.5)}
    return Measurement(**{**values, **changes})  # type: ignore[arg-type]


def decision(above: int = 0, tokens: int = 4, **changes: object) -> Decision:
    choice = Choice(config=CONFIG, p50_us=2.5, default=OTHER, default_us=3.0, noise=0.01, numerics="a" * 64)
    values = {"environment": HERE.digest, "layer": LAYER, "policy": "reproducible", "up": choice, "down": choice}
    return Decision(bucket=Bucket(above=above, tokens=tokens), **{**values, **changes})  # type: ignore[arg-type]


class StoreContract:
    """Inherit, define the fixture `store` (an empty open store), and all of this runs."""

    @pytest.fixture
    def ready(self, store: Store) -> Store:
        """The store with two environments."""
        store.add_environment(HERE)
        store.add_environment(THERE)
        return store

    def test_fresh_store_is_empty(self, store: Store) -> None:
        assert store.environments() == []
        assert store.measurements() == []
        assert store.table() == TuningTable()

    def test_environments_are_kept_once_in_order_of_digest(self, store: Store) -> None:
        for environment in (HERE, THERE, HERE):
            assert store.add_environment(environment) == environment.digest
        assert store.environments() == sorted([HERE, THERE], key=lambda e: e.digest)

    def test_first_measurement_of_a_key_stays(self, ready: Store) -> None:
        first = measurement(detail="first")
        again = measurement(detail="second", samples_us=(9.0,))
        assert first.key == again.key
        assert ready.add_measurements([first, again]) == 1
        assert ready.add_measurements([again]) == 0
        assert ready.measurements() == [first]

    def test_no_measurements_at_all(self, ready: Store) -> None:
        assert ready.add_measurements([]) == 0

    def test_every_part_of_the_key_tells_measurements_apart(self, ready: Store) -> None:
        wider = replace(LAYER, hidden=128)
        changes: list[dict[str, object]] = [
            {}, {"environment": THERE.digest}, {"gemm": LAYER.down}, {"gemm": wider.up}, {"tokens": 8},
            {"config": OTHER}, {"routing": "zipf"}, {"rank": 1, "world_size": 2}, {"run": 1}, {"round": 1},
        ]  # fmt: skip
        all_of_them = [measurement(**change) for change in changes]
        assert ready.add_measurements(all_of_them) == len(changes)
        assert ready.measurements() == all_of_them

    def test_measurements_come_in_the_order_they_were_added(self, ready: Store) -> None:
        rounds = [7, 0, 3, 1 << 31, 2]
        for number in rounds[:2]:
            ready.add_measurements([measurement(round=number)])
        ready.add_measurements([measurement(round=number) for number in rounds[2:]])
        assert [m.round for m in ready.measurements()] == rounds

    def test_filters_narrow_together(self, ready: Store) -> None:
        wanted = measurement(tokens=8, routing="zipf", run=2)
        others = [
            measurement(),
            measurement(tokens=8, routing="zipf", run=2, gemm=LAYER.down),
            measurement(tokens=8, routing="zipf", run=2, environment=THERE.digest),
            measurement(tokens=8, routing="zipf", run=1),
            measurement(tokens=8, routing="uniform", run=2),
            measurement(tokens=9, routing="zipf", run=2),
        ]
        ready.add_measurements([*others, wanted])
        found = ready.measurements(environment=HERE.digest, gemm=LAYER.up, tokens=8, routing="zipf", run=2)
        assert found == [wanted]
        assert ready.measurements(run=0) == [others[0]]
        assert ready.measurements(tokens=5) == []

    def test_failures_are_kept_with_their_reason(self, ready: Store) -> None:
        failed = measurement(status="compile_error", samples_us=(), detail="no such register: zmm32\nat line 3")
        ready.add_measurements([failed])
        assert ready.measurements() == [failed]

    def test_unprintable_and_endless_details_are_cut_to_what_can_be_kept(self, ready: Store) -> None:
        ready.add_measurements([
            measurement(status="timeout", samples_us=(), detail="bad \udcff and \0"),
            measurement(status="timeout", samples_us=(), detail="x" * 100_000, round=1),
        ])  # fmt: skip
        first, second = ready.measurements()
        assert first.detail == "bad ? and �"
        assert len(second.detail) == 4096
        assert second.detail.endswith("x…")

    @pytest.mark.parametrize(
        "changes", [{"routing": "a\0b"}, {"routing": "\udc00"}, {"numerics": "n" * 257}, {"measured_at": float("nan")}]
    )
    def test_what_no_store_can_hold_is_refused_and_nothing_kept(self, ready: Store, changes: dict[str, object]) -> None:
        with pytest.raises(CacheError):
            ready.add_measurements([measurement(), measurement(round=1, **changes)])
        assert ready.measurements() == []

    def test_unknown_environment_is_refused_and_nothing_kept(self, store: Store) -> None:
        store.add_environment(HERE)
        stray = "f" * 64
        with pytest.raises(CacheError, match="no environment ffffffffffff; add"):
            store.add_measurements([measurement(), measurement(environment=stray)])
        with pytest.raises(CacheError, match="no environment ffffffffffff; add"):
            store.put_decisions([decision(), decision(environment=stray)])
        assert store.measurements() == []
        assert len(store.table()) == 0

    def test_decision_of_the_same_key_replaces(self, ready: Store) -> None:
        ready.put_decisions([decision(certificate="none")])
        ready.put_decisions([decision(certificate="static"), decision(above=2, certificate="hardware")])
        assert ready.table().decisions == (decision(above=2, certificate="hardware"),)

    def test_no_decisions_at_all(self, ready: Store) -> None:
        ready.put_decisions([])
        assert ready.table() == TuningTable()

    def test_decision_displaces_those_it_overlaps_and_no_others(self, ready: Store) -> None:
        ready.put_decisions([decision(0, 4), decision(4, 16), decision(16, 64), decision(0, 64, policy="fastest")])
        ready.put_decisions([decision(4, 8)])
        found = [(d.policy, d.bucket.above, d.bucket.tokens) for d in ready.table().decisions]
        assert found == [
            ("fastest", 0, 64),
            ("reproducible", 0, 4),
            ("reproducible", 4, 8),
            ("reproducible", 16, 64),
        ]

    def test_overlap_within_one_call_is_refused_and_nothing_kept(self, ready: Store) -> None:
        with pytest.raises(CacheError, match="overlap"):
            ready.put_decisions([decision(0, 8), decision(4, 16)])
        assert len(ready.table()) == 0

    def test_table_filters_and_holds_only_environments_in_use(self, ready: Store) -> None:
        mine, fast, theirs = decision(), decision(policy="fastest"), decision(environment=THERE.digest)
        ready.put_decisions([mine, fast])
        assert ready.table() == TuningTable((HERE,), (mine, fast))
        ready.put_decisions([theirs])
        assert ready.table() == TuningTable((HERE, THERE), (mine, fast, theirs))
        assert ready.table(environment=THERE.digest) == TuningTable((THERE,), (theirs,))
        assert ready.table(environment=HERE.digest, policy="fastest") == TuningTable((HERE,), (fast,))
        assert ready.table(policy="fastest", environment=THERE.digest) == TuningTable()

    def test_returned_lists_are_fresh(self, ready: Store) -> None:
        ready.add_measurements([measurement()])
        ready.measurements().clear()
        ready.environments().clear()
        assert len(ready.measurements()) == 1
        assert len(ready.environments()) == 2

    def test_closed_store_refuses(self, store: Store) -> None:
        store.close()
        store.close()
        for use in (store.environments, store.measurements, store.table):
            with pytest.raises(CacheError, match="closed"):
                use()
        with pytest.raises(CacheError, match="closed"):
            store.add_environment(HERE)

    def test_leaving_the_context_closes(self, store: Store) -> None:
        with store as same:
            assert same is store
        with pytest.raises(CacheError, match="closed"):
            store.environments()

    def test_threads_share_one_store(self, ready: Store) -> None:
        counts: list[int] = []

        def add(rank: int) -> None:
            # Each measurement is offered by two threads; exactly one of them is first.
            counts.extend(ready.add_measurements([measurement(round=number)]) for number in range(rank // 2 * 5, 10))

        threads = [threading.Thread(target=add, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(counts) == 10
        assert sorted(m.round for m in ready.measurements()) == list(range(10))


class SharedStoreContract:
    """What holds between several users of one store. Define the fixture `where`: a path or URL of a fresh store."""

    def test_what_one_writes_all_see(self, where: str) -> None:
        with open_store(where) as first, open_store(where) as second:
            first.add_environment(HERE)
            second.add_measurements([measurement()])
            first.put_decisions([decision()])
            assert first.measurements() == [measurement()]
            assert second.table().decisions == (decision(),)

    def test_readers_wait_for_no_writer_and_see_one_instant(self, where: str) -> None:
        with open_store(where) as store:
            store.add_environment(HERE)
            store.add_measurements([measurement()])
        with database(where) as reader, database(where) as writer:
            with reader.reading() as before:
                assert len(read_measurements(before)) == 1
                with open_store(where) as store:
                    store.add_measurements([measurement(round=1)])
                with writer.writing() as unfinished:
                    unfinished.execute(delete(models.measurement))
                    assert len(read_measurements(before)) == 1
                    with reader.reading() as meanwhile:
                        assert len(read_measurements(meanwhile)) == 2
            with reader.reading() as after:
                assert read_measurements(after) == []

    def test_measurements_offered_by_many_in_any_order_are_kept_once(self, where: str) -> None:
        """In another order by each: row locks taken so would wait for each other in a circle."""
        offered = [measurement(round=number) for number in range(40)]
        counts: list[int] = []

        def add(number: int) -> None:
            chance = random.Random(number)
            with open_store(where) as store:
                store.add_environment(HERE)
                for _ in range(3):
                    counts.append(store.add_measurements(chance.sample(offered, k=len(offered))))

        in_threads(4, add)
        with open_store(where) as store:
            assert sorted(m.round for m in store.measurements()) == list(range(40))
        assert sum(counts) == 40

    def test_decisions_put_by_many_never_overlap(self, where: str) -> None:
        def put(number: int) -> None:
            chance = random.Random(number)
            with open_store(where) as store:
                store.add_environment(HERE)
                for _ in range(10):
                    above = chance.randrange(20)
                    store.put_decisions([decision(above, above + chance.randrange(1, 20))])
                    assert len(store.table()) > 0  # A table with overlaps would not be one.

        in_threads(4, put)

    def test_fresh_store_is_opened_by_many_at_once(self, where: str) -> None:
        gate = threading.Barrier(6)

        def start(number: int) -> None:
            gate.wait()
            with open_store(where) as store:
                store.add_environment(HERE)
                store.add_measurements([measurement(run=number)])

        in_threads(6, start)
        with open_store(where) as store:
            assert len(store.measurements()) == 6

    def test_what_another_cleaned_up_is_written_again(self, where: str) -> None:
        with open_store(where) as store:
            store.add_environment(HERE)
            store.add_measurements([measurement()])
            with database(where) as other, other.writing() as connection:
                for table in (models.measurement, models.layer, models.config):
                    connection.execute(delete(table))
            store.add_measurements([measurement(round=1)])
            store.put_decisions([decision()])
            assert store.measurements() == [measurement(round=1)]
            with database(where) as other, other.writing() as connection:
                for table in (models.decision, models.measurement, models.environment):
                    connection.execute(delete(table))
            with pytest.raises(CacheError, match="no environment"):
                store.add_measurements([measurement(round=2)])

    def test_unknown_revision_is_refused_in_one_line(self, where: str) -> None:
        open_store(where).close()
        with database(where) as other, other.writing() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(SchemaError, match="has schema 9999, this Tilecast reads up to") as caught:
            open_store(where)
        assert "\n" not in str(caught.value)

    def test_failed_transaction_leaves_nothing(self, where: str) -> None:
        with open_store(where) as store:
            store.add_environment(HERE)
            with pytest.raises(ZeroDivisionError), database(where) as other, other.writing() as connection:
                connection.execute(delete(models.environment))
                raise ZeroDivisionError
            assert store.environments() == [HERE]


def database(where: str) -> contextlib.closing[Database]:
    """The store's database itself, to hold transactions open and to delete behind a store's back."""
    path = sqlite_path(where)
    return contextlib.closing(open_server(make_url(where)) if path is None else open_sqlite(path))


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in threads and raise what any of them raised."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, number) for number in range(count)]:
            done.result()
