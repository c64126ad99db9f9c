"""Every way in which ranks may fail; each scenario has a group of its own. Run on ranks without a launcher.

At the end the last rank kills itself while all tune, and the others must end with one message and exit code.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
from torch.distributed.rendezvous import rendezvous

from tests.engine.tables import LAYER, decided, default_config, inputs, weights
from tests.torchrun.small_kernel import small_registry
from tilecast.autotune.plan import make_plan
from tilecast.autotune.race import Progress
from tilecast.cache_store.bundle import export_table
from tilecast.cache_store.store import open_store
from tilecast.engine.agreement import agree_on_environment, agree_on_table, startup
from tilecast.engine.group import Group
from tilecast.engine.group_store import KeyValueStore
from tilecast.engine.parallel import TensorParallelExperts
from tilecast.engine.runtime import use_table
from tilecast.engine.tuning import tune_together
from tilecast.environment import cpu_environment
from tilecast.errors import AgreementError, TilecastError
from tilecast.kernels.formats import quantize
from tilecast.problem import TileConfig
from tilecast.settings import Settings, TuneSettings

HERE = cpu_environment()


class Tampered(Group):
    """A group whose rank 1 receives rank 0's bytes with one of them changed."""

    def broadcast(self, name: str, payload: bytes | None) -> bytes:
        received = super().broadcast(name, payload)
        return received.replace(b"llvm", b"LLVM") if self.rank == 1 else received


class Scenarios:
    """Runs scenarios by name, with what they need."""

    def __init__(self, folder: Path) -> None:
        found, self.rank, self.world_size = next(iter(rendezvous("env://", timeout=timedelta(seconds=60))))
        self.store = cast(KeyValueStore, found)
        self.folder = folder
        self.cache = folder / "cache"

    def group(self, name: str, kind: type[Group] = Group, dead_after_s: float = 30.0) -> Group:
        # Only where a rank dies is anybody waited for: elsewhere a busy machine is not to look like a death.
        limits = {"beat_s": 0.5, "dead_after_s": dead_after_s}
        return kind(self.store, rank=self.rank, world_size=self.world_size, name=name, **limits)

    def settings(self, **options: object) -> Settings:
        return Settings(cache_dir=self.cache, **options)  # type: ignore[arg-type]  # each fault gives settings

    def another_device(self, group: Group) -> None:
        agree_on_environment(group, replace(HERE, device="another CPU") if self.rank == 1 else HERE)

    def another_kernel(self, group: Group) -> None:
        startup(
            [LAYER],
            self.settings(),
            group=group,
            environment=replace(HERE, kernel_source="f" * 64) if self.rank == 2 else HERE,
        )

    def soft_difference(self, group: Group) -> None:
        agreed = agree_on_environment(group, replace(HERE, system=f"system {self.rank}"))
        raise TilecastError(f"agreed on {agreed.system}")

    def wrong_digest(self, group: Group) -> None:
        agree_on_table(self.group("tampered", Tampered), decided(LAYER))

    def no_such_file(self, group: Group) -> None:
        startup([LAYER], self.settings(import_from=str(self.folder / "absent.db")), group=group)

    def not_a_table(self, group: Group) -> None:
        path = self.folder / "text.db"
        if self.rank == 0:
            path.write_text("this is not SQLite" * 100)
        startup([LAYER], self.settings(import_from=str(path)), group=group)

    def unwritable_export(self, group: Group) -> None:
        startup([LAYER], self.settings(export_to=str(self.folder / "no" / "folder" / "x.db")), group=group)

    def impossible_config(self, group: Group) -> None:
        self.import_of(group, choose=lambda gemm, tokens: default_config(gemm, tokens).with_params(mr=99))

    def unknown_kernel(self, group: Group) -> None:
        self.import_of(group, choose=lambda gemm, tokens: TileConfig("no.such_kernel"))

    def table_of_another_device(self, group: Group) -> None:
        self.import_of(group, environment=replace(HERE, device="another CPU"))

    def import_of(self, group: Group, **options: object) -> None:
        path = self.folder / "imported.db"
        if self.rank == 0:
            export_table(decided(LAYER, **options), path)  # type: ignore[arg-type]
        startup([LAYER], self.settings(import_from=str(path)), group=group)

    def some_ranks_hit(self, group: Group) -> None:
        path = self.folder / "half.db"
        if self.rank == 0:
            export_table(decided(LAYER), path)
        own = LAYER if self.rank < 2 else replace(LAYER, intermediate=95)
        startup([own], self.settings(import_from=str(path)), group=group)

    def another_model(self, group: Group) -> None:
        startup(
            [LAYER] * (1 if self.rank else 2) + [replace(LAYER, hidden=32)] * (self.rank == 0),
            self.settings(),
            group=group,
        )

    def other_options(self, group: Group) -> None:
        plan = make_plan([LAYER], (1, 2) if self.rank == 2 else (1, 4), HERE)
        tune_together(plan, None, group, registry=small_registry())

    def unfit_shard(self, group: Group) -> None:
        use_table(None)
        w = weights(LAYER)
        w2 = w.w2[:, :, 1:].contiguous() if self.rank == 1 else w.w2
        TensorParallelExperts(w.w13, w2, top_k=2, group=group)

    def cut_group(self, group: Group) -> None:
        use_table(None)
        layer = replace(LAYER, intermediate=64, weight_format="int4_g32")
        w13, w2 = (quantize(torch.randn(layer.experts, gemm.n, gemm.k), gemm) for gemm in layer.gemms)
        TensorParallelExperts(w13, w2, top_k=2, dtype=torch.float32, group=group)

    def unfit_input(self, group: Group) -> None:
        use_table(None)
        w, (hidden, ids, scales) = weights(LAYER), inputs(LAYER, 3)
        layer = TensorParallelExperts(w.w13, w.w2, top_k=2, group=group)
        layer(hidden.double() if self.rank == 2 else hidden, ids, scales)

    def error_while_tuning(self, group: Group) -> None:
        def stumble(event: Progress) -> None:
            if self.rank == 1 and event.task == 1:
                raise OSError("no space left on device")

        startup(
            [LAYER], self.settings(tune=TuneSettings(tokens=(1, 4)), import_from=None), group=group,
            registry=small_registry(), store=None, progress=stumble,
        )  # fmt: skip

    def error_before_joining(self, group: Group) -> None:
        """The first layer over ranks, so torch.distributed's group is not there yet: nobody may wait in it."""
        use_table(None)
        with group.guard():
            if self.rank == 1:
                raise OSError("the checkpoint's second file is missing")
            w = weights(LAYER)
            TensorParallelExperts(w.w13, w.w2, top_k=2, group=group)

    def logged(self) -> list[str]:
        """What this rank logs about a table that was tuned on another number of threads."""
        lines: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("tilecast").addHandler(handler)
        with self.group("logged") as group:
            self.import_of(group, environment=replace(HERE, threads=77))
        logging.getLogger("tilecast").removeHandler(handler)
        return lines

    def run(self, name: str) -> tuple[str, str, float]:
        scenario: Callable[[Group], None] = getattr(self, name)
        begin = time.monotonic()
        with self.group(name) as group:
            try:
                scenario(group)
            except TilecastError as error:
                return type(error).__name__, str(error), time.monotonic() - begin
        return "", "", time.monotonic() - begin

    def die_while_tuning(self) -> None:
        def die(event: Progress) -> None:
            if self.rank == self.world_size - 1 and event.task == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        plan = make_plan([LAYER], (1, 4), HERE)
        store = open_store(self.folder / "store.db") if self.rank == 0 else None
        tune_together(plan, store, self.group("death", dead_after_s=5.0), registry=small_registry(), progress=die)


SCENARIOS = (
    "error_before_joining", "another_device", "another_kernel", "soft_difference", "wrong_digest", "no_such_file",
    "not_a_table", "unwritable_export", "impossible_config", "unknown_kernel", "table_of_another_device",
    "some_ranks_hit", "another_model", "other_options", "unfit_input", "unfit_shard", "cut_group",
    "error_while_tuning",
)  # fmt: skip


def main(folder: Path) -> None:
    scenarios = Scenarios(folder)
    results = {name: scenarios.run(name) for name in SCENARIOS}
    report = {**results, "logged": scenarios.logged()}
    (folder / f"rank{scenarios.rank}.json").write_text(json.dumps(report))
    begin = time.monotonic()
    try:
        scenarios.die_while_tuning()
    except AgreementError as error:
        print(f"{time.monotonic() - begin:.1f}", file=sys.stderr)
        print(f"tilecast: {error}", file=sys.stderr)
        sys.exit(5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
