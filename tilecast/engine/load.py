"""Loading a checkpoint folder into transformers' model, strictly: all weights or none, on all ranks or on none.

What does not fit is an error (`pretrained`). What one rank alone can notice (a missing file, too little memory) is
agreed on before the first collective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tilecast.engine.agreement import process_group
from tilecast.engine.checkpoint import (
    Checkpoint,
    agree_on_checkpoint,
    agree_on_table_file,
    experts_of,
    inspect_checkpoint,
)
from tilecast.engine.group import Group
from tilecast.engine.placed_choice import Asked, Choice, as_choice, check_choice
from tilecast.engine.pretrained import first_line, import_transformers, model_of, quiet, tokenizer_of
from tilecast.engine.watch import together
from tilecast.errors import DeviceError, ModelError, TilecastError, UsageError
from tilecast.settings import Settings, launcher

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLLECTIVE_TIMEOUT_S = 1800.0
"""Of torch.distributed: a rank may compile for long; one that died is noticed by the watch, within seconds."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to generate. `tokenizer` is None where the checkpoint has none; `experts` is what runs experts."""

    model: Any
    tokenizer: Any | None
    folder: Path
    device: torch.device
    dtype: torch.dtype
    tp: int
    ep: int
    experts: str
    group: Group


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    tp: int = 1,
    ep: int = 1,
    policy: str | None = None,
    table: str | None = None,
    group: Group | None = None,
    experts: str = "tilecast",
    gpu_experts: Asked | Choice | None = None,
    experts_only: bool | None = None,
    on_stuck: Callable[[TilecastError], None] | None = None,
) -> Loaded:
    """Load a checkpoint folder (config.json, safetensors, tokenizer if any) and make its experts ready.

    `dtype` None is the checkpoint's own; `device` None the rank's GPU or the CPU. `tp` ranks split attention, dense
    layers and every expert's I; `ep` ranks split attention and dense layers alike, but keep whole experts each. One of
    them is 1, the other the world size. `policy` and `table` replace TM_GEMM_POLICY and TM_GEMM_IMPORT. `experts` is
    any name that transformers knows as `experts_implementation`. `gpu_experts` keeps these experts of each layer on
    `device` and the others on the CPU, as `read_choice` says. `experts_only` leaves linears and attention to torch
    (None: as `register_transformers` was told). `on_stuck` is as `together` says.

    Raises, on all ranks with one message: UsageError for options that do not fit, ModelError for a checkpoint that
    is not complete or has weights that the model does not, DeviceError for too little memory, AgreementError for
    ranks that differ or die, and what start-up raises.
    """
    group = group or process_group()
    with group.guard():
        transformers = import_transformers()
        choice = None if gpu_experts is None else _placement(gpu_experts, max(group.world_size, tp * ep), experts)
        check_parallel(group.world_size, tp, ep)
        settings = _settings(policy, table)
        checkpoint = inspect_checkpoint(folder)
        check_experts(experts_of(checkpoint.config), ep)
        if choice is not None:
            check_choice(choice, experts_of(checkpoint.config))
        wanted = _dtype(dtype, checkpoint)
        place = _device(device, group)
        # Experts that are placed come into the CPU's memory first.
        _check_memory(checkpoint, wanted, place if choice is None else torch.device("cpu"), tp=tp * ep)
        orders = {
            "tp": tp,
            "ep": ep,
            "dtype": str(wanted),
            "experts": experts,
            "transformers": transformers.__version__,
        }
        agree_on_checkpoint(group, checkpoint, {**orders, "device": place.type})
        agree_on_table_file(group, (settings or Settings.from_environment()).import_from)
        if group.world_size > 1:
            _join_collectives(group, place)
    with together(group, on_stuck):
        with quiet(transformers):
            model = model_of(transformers, checkpoint, wanted, tp=tp, ep=ep)
            if group.world_size == 1 and choice is None:
                model = model.to(place)
            model.eval()
            tokenizer = tokenizer_of(transformers, checkpoint.folder)
        used = _use_experts(
            model, experts, settings, None if choice is None else replace(choice, near=place), experts_only
        )
        # Nobody generates before all have loaded.
        group.gather("loaded", b"")
    return Loaded(
        model=model, tokenizer=tokenizer, folder=checkpoint.folder, device=place, dtype=wanted, tp=tp, ep=ep,
        experts=used, group=group,
    )  # fmt: skip


def leave(loaded: Loaded) -> None:
    """End a program's work on several ranks, which torch.distributed and the group want to be told of."""
    group = loaded.group
    if group.world_size > 1:
        group.gather("leaving", b"")
        if dist.is_initialized():
            dist.destroy_process_group()
    group.close()


def check_parallel(world_size: int, tp: int, ep: int) -> None:
    """Raise UsageError where tensor and expert parallelism do not fit one another or the number of ranks."""
    if tp < 1 or ep < 1:
        raise UsageError(f"tp is {tp} and ep {ep}, expected at least 1")
    if tp > 1 and ep > 1:
        raise UsageError(f"tp is {tp} and ep {ep}; transformers splits experts one way or the other, give one of them")
    ranks = tp * ep
    if ranks != world_size:
        start = (
            f"start with torchrun --nproc-per-node {ranks}" if ranks > 1 else "leave out torchrun, or give --tp or --ep"
        )
        raise UsageError(f"tp={tp} and ep={ep} need {ranks} ranks, but there are {world_size}; {start}")


def check_experts(counts: Sequence[int], ep: int) -> None:
    """Raise ModelError where `ep` ranks cannot keep as many experts each: transformers splits them evenly or not."""
    for count in counts:
        if count % ep:
            raise ModelError(f"ep={ep} cannot share out a layer's {count} experts evenly; use a number that divides it")


def _settings(policy: str | None, table: str | None) -> Settings | None:
    """Return the environment's settings with what was given instead; None where nothing was."""
    if policy is None and table is None:
        return None
    settings = Settings.from_environment()
    if policy is not None:
        settings = replace(settings, policy=policy)
    return settings if table is None else replace(settings, import_from=table)


def _placement(asked: Asked | Choice, ranks: int, experts: str) -> Choice:
    """Return which experts are near. Raises UsageError where the other options leave no way to place them."""
    if ranks > 1:
        raise UsageError(f"gpu_experts is for one process, not for {ranks} ranks; leave it out, or tp, ep and torchrun")
    if experts != "tilecast":
        raise UsageError(f"gpu_experts needs Tilecast's experts, but they are to run on {experts!r:.40}")
    return as_choice(asked)


# Before anything is loaded -----------------------------------------------------------------------------------


def _dtype(asked: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    config = checkpoint.config
    nested = config.get("text_config")
    name = asked or config.get("dtype") or config.get("torch_dtype")
    if name is None and isinstance(nested, Mapping):
        name = nested.get("dtype") or nested.get("torch_dtype")
    name = "float32" if name is None else str(name).removeprefix("torch.")
    if name not in DTYPES:
        where = "dtype" if asked else f"{checkpoint.folder}: the config's dtype"
        kind = UsageError if asked else ModelError
        raise kind(f"{where} is {name!r:.40}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _device(asked: torch.device | str | None, group: Group) -> torch.device:
    if asked is not None:
        try:
            device = torch.device(asked)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"device is {str(asked)!r:.40}, expected cpu or cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(f"device is {device}, but there is no GPU of that number that torch can use here")
        if group.world_size > 1 and device.type == "cpu" and torch.cuda.is_available():
            raise UsageError("several ranks run on the GPUs where there are any; hide them to run on the CPU")
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    started = launcher()
    index = 0 if started is None else started.local_rank
    if index >= torch.cuda.device_count():
        raise DeviceError(f"local rank {index} has no GPU of its own: this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_memory(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, tp: int) -> None:
    """Raise DeviceError when a rank's share of the weights is larger than what is free."""
    needed = checkpoint.needed_bytes(dtype.itemsize) // tp
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is not None and needed > free:
        raise DeviceError(
            f"the weights need {needed / 2**30:.1f} GiB on each rank, {free / 2**30:.1f} GiB are free on {device}; "
            f"use more ranks or a smaller dtype"
        )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of memory that processes can still take, or None where the system does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _join_collectives(group: Group, device: torch.device) -> None:
    """Make torch.distributed's default process group: transformers' own timeout is two hours."""
    if dist.is_initialized():
        return
    # All ranks have just exchanged what they load, so none is missing here.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=group.rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        device_id=device if device.type == "cuda" else None,
    )


# After it ----------------------------------------------------------------------------------------------------


def _use_experts(
    model: Any, experts: str, settings: Settings | None, placement: Choice | None, experts_only: bool | None
) -> str:
    """Switch the model's experts over, which for Tilecast's starts up on all ranks; return what runs them."""
    # Imported here: transformers' own experts need none of it.
    from tilecast.engine import transformers as adapter

    found = adapter.experts_modules(model)
    if not found and placement is not None:
        raise ModelError("gpu_experts is given, but the model has no experts that transformers lets others run")
    if not found:
        logger.warning("the model has no experts that transformers lets others run, so its own code runs it")
        return "its own"
    try:
        with adapter.started_by(settings, placement, experts_only) if experts == adapter.NAME else nullcontext():
            model.set_experts_implementation(experts)
    except ValueError as error:
        raise UsageError(f"experts are to run on {experts!r:.40}: {first_line(error)}") from error
    return experts
