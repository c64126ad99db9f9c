"""`tilecast compare`: why do a model's outputs differ? Against a reference, and against itself run in other ways.

The reference, a wide copy of it and the model under test are loaded one after the other, and only what their
operations gave stays in memory.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from tilecast.canonical import Json
from tilecast.engine.agreement import process_group
from tilecast.engine.checkpoint import experts_of, inspect_checkpoint
from tilecast.engine.compare_capture import Prompts, alone, digests, run
from tilecast.engine.compare_invariance import (
    ARRANGED,
    CHECKS,
    EDGES,
    Invariance,
    check_arrangements,
    check_traces,
    compare_digests,
    random_prompts,
)
from tilecast.engine.compare_reference import Reference, ReferenceReport, compare_to, reference_of
from tilecast.engine.group import Group
from tilecast.engine.invariant import outside
from tilecast.engine.invariant_attention import row_by_row, row_wise_attention
from tilecast.engine.load import Loaded, check_parallel, load_model
from tilecast.engine.placed_choice import as_choice, check_choice
from tilecast.engine.watch import together
from tilecast.errors import ModelError, TilecastError, UsageError
from tilecast.settings import child_environment

EXPECTATIONS = {
    "close": "no operation is beyond rounding on the reference's inputs",
    "equal": "all bits are equal to the reference's",
    "routing": "no token chooses other experts than in the reference",
    "tokens": "the same next token after every token",
    "invariant": "all checks that were asked for found equal bits",
}
"""What may be expected of a comparison; the name of a check is an expectation, too."""

RESTART_TIMEOUT_S = 1800
TEXTS = (
    "The experts of a layer are chosen by the router.",
    "def add(a, b):\n    return a + b",
    "Why is the sky blue? Because",
)
"""Prompts beside the random ones, where the checkpoint has a tokenizer."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare: a checkpoint folder whose experts run on `experts`, against the same on `against`.

    `prompts` and `texts` (which need the checkpoint's tokenizer) go together; without both, prompts are random ids,
    and texts where there is a tokenizer. dtype, device, policy, table and gpu_experts None are what `load_model` takes
    then; the last is for `experts` alone. `against` None leaves the reference out. With `reproducible` the model under
    test runs inside `invariant()`. `edges` are token counts of buckets.
    """

    folder: str
    experts: str = "tilecast"
    against: str | None = "eager"
    dtype: str | None = None
    device: str | None = None
    tp: int = 1
    ep: int = 1
    policy: str | None = None
    table: str | None = None
    gpu_experts: str | None = None
    prompts: Prompts | None = None
    texts: tuple[str, ...] = ()
    reproducible: bool = False
    checks: tuple[str, ...] = tuple(CHECKS)
    edges: tuple[int, ...] = EDGES
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the names of checks. Raises UsageError."""
        for check in self.checks:
            if check not in CHECKS:
                raise UsageError(f"check is {check!r:.40}, expected some of {', '.join(CHECKS)}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found. `wide` names the dtype of the exact results, None without any.

    `uncovered` names operations that ran inside `invariant()` and that it has no form free of the batch for.
    """

    experts: str
    against: str | None
    dtype: str
    wide: str | None
    prompts: Prompts
    ranks: int
    reference: ReferenceReport | None
    invariance: tuple[Invariance, ...]
    reproducible: bool = False
    uncovered: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "experts": self.experts, "against": self.against, "dtype": self.dtype, "wide_dtype": self.wide,
            "ranks": self.ranks, "prompts": [list(ids) for ids in self.prompts.ids],
            "reference": None if self.reference is None else self.reference.to_json(),
            "invariance": [one.to_json() for one in self.invariance],
            "reproducible": self.reproducible, "uncovered": list(self.uncovered),
        }  # fmt: skip


def compare(
    request: Request,
    report: Report = lambda _text: None,
    on_stuck: Callable[[TilecastError], None] | None = None,
) -> Comparison:
    """Load what is to be compared and compare it; all ranks must call it. `report` is told what is being done.

    `on_stuck` is as `watch.together` says.

    Raises what `load_model` raises, and ModelError for prompts that are not ids of the model's vocabulary.
    """
    group = process_group()
    with together(group, on_stuck):
        return _compared(request, group, report)


def _compared(request: Request, group: Group, report: Report) -> Comparison:
    reference: Reference | None = None
    prompts: Prompts | None = None
    wide: torch.dtype | None = None
    _check_first(request, group)
    if request.against is not None:
        report(f"runs the reference ({request.against})")
        loaded = _load(request, request.against, group)
        prompts = prompts_for(loaded, request)
        wide = torch.float64 if loaded.dtype == torch.float32 else torch.float32
        reference = _reference(request, loaded, prompts, wide, group, report)
        wide = None if reference.wide_forced is None else wide
        del loaded
        gc.collect()
    report(f"runs the model on {request.experts}")
    loaded = _load(request, request.experts, group)
    prompts = prompts_for(loaded, request) if prompts is None else prompts
    request = replace(request, prompts=prompts, texts=())
    with _surroundings(request, loaded.model) as uncovered:
        found = None if reference is None else compare_to(reference, loaded.model)
        checks = tuple(_checks(request, loaded, prompts, group, report))
    return Comparison(
        experts=loaded.experts, against=request.against, dtype=_name(loaded.dtype),
        wide=None if wide is None else _name(wide), prompts=prompts, ranks=group.world_size, reference=found,
        invariance=checks, reproducible=request.reproducible, uncovered=tuple(sorted(uncovered)),
    )  # fmt: skip


def _check_first(request: Request, group: Group) -> None:
    """Raise what loading the model under test would for its options, before the reference has run."""
    check_parallel(group.world_size, request.tp, request.ep)
    if request.gpu_experts is not None:
        check_choice(as_choice(request.gpu_experts), experts_of(inspect_checkpoint(request.folder).config))


@contextmanager
def _surroundings(request: Request, model: Any) -> Iterator[Mapping[str, int]]:
    """Run the block inside `invariant()` if that is asked for; yield what it could not vouch for, filled as it runs."""
    if not request.reproducible:
        yield {}
        return
    with row_by_row(model) as context:
        yield context.uncovered


def prompts_for(loaded: Loaded, request: Request) -> Prompts:
    """Return the prompts that were asked for, or the default ones. Raises ModelError for ids it does not have."""
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    vocabulary = min(vocabulary, int(getattr(loaded.model.config.get_text_config(), "vocab_size", vocabulary)))
    prompts, texts = request.prompts, request.texts
    if prompts is None and not texts:
        prompts, texts = random_prompts(vocabulary, seed=request.seed), TEXTS if loaded.tokenizer is not None else ()
    if texts:
        if loaded.tokenizer is None:
            raise ModelError(f"{request.folder} has no tokenizer for prompts of text; give token ids")
        known = tuple(tuple(map(int, loaded.tokenizer(text)["input_ids"])) for text in texts)
        prompts = Prompts((*(() if prompts is None else prompts.ids), *known))
    assert prompts is not None
    if not prompts.ids or not all(prompts.ids):
        raise UsageError("a prompt has no token, expected at least one")
    foreign = next((token for ids in prompts.ids for token in ids if not 0 <= token < vocabulary), None)
    if foreign is not None:
        raise ModelError(f"a prompt holds token {foreign}, expected ids from 0 to {vocabulary - 1}")
    return prompts


def check_expected(request: Request, expected: Sequence[str]) -> None:
    """Raise UsageError for an expectation that is unknown, or that the request cannot answer."""
    for name in expected:
        if name not in EXPECTATIONS and name not in CHECKS:
            raise UsageError(f"expectation is {name!r:.40}, expected some of {', '.join([*EXPECTATIONS, *CHECKS])}")
        if name in EXPECTATIONS and name != "invariant" and request.against is None:
            raise UsageError(f"{name!r} is expected, but there is no reference to compare with")
        if name in CHECKS and name not in request.checks:
            raise UsageError(f"{name!r} is expected, but that check is not asked for")


def unmet(comparison: Comparison, expected: Sequence[str]) -> str | None:
    """Return in one line which expectation does not hold, or None."""
    for name in expected:
        if comparison.reference is not None and (text := _unmet_reference(comparison.reference, name)) is not None:
            return text
        for check in comparison.invariance:
            if check.verdict != "equal" and name in ("invariant", check.check):
                where = check.detail if check.first is None else f"first at {check.first.operation.label}"
                return f"{check.check}: bits {'differ' if check.verdict == 'differs' else 'were not compared'}, {where}"
    return None


def _unmet_reference(found: ReferenceReport, name: str) -> str | None:
    if name == "close" and (fault := found.first_fault) is not None:
        return f"{fault.operation.label} is beyond rounding on the reference's own input: {fault.reason}"
    if name == "equal" and (first := found.first_difference) is not None:
        return f"bits differ from the reference's, first at {first.operation.label}"
    if name == "routing":
        router = next((one for one in found.routers if one.others), None)
        if router is not None:
            return f"{router.others} of {router.tokens} tokens choose other experts in {router.name}"
    if name == "tokens" and found.outcome is not None and found.outcome.agreeing < found.outcome.tokens:
        return f"{found.outcome.tokens - found.outcome.agreeing} of {found.outcome.tokens} next tokens differ"
    return None


def _reference(
    request: Request, loaded: Loaded, prompts: Prompts, wide: torch.dtype, group: Group, report: Report
) -> Reference:
    def load_wide() -> Any:
        report(f"runs the reference in {_name(wide)}")
        return _load(request, "eager", group, dtype=wide).model

    return reference_of(prompts, loaded.model, load_wide, sharded=group.world_size > 1)


def _load(
    request: Request, experts: str, group: Group, *, dtype: torch.dtype | None = None, policy: str | None = None
) -> Loaded:
    ours = experts == "tilecast"
    # What `invariant()` promises holds with experts of one class alone.
    asked = policy or request.policy or ("reproducible" if request.reproducible else None)
    return load_model(
        request.folder, dtype=dtype or request.dtype, device=request.device, tp=request.tp, ep=request.ep,
        policy=asked if ours else None, table=request.table if ours else None,
        group=group, experts=experts, experts_only=True, gpu_experts=request.gpu_experts if ours else None,
    )  # fmt: skip


def _checks(
    request: Request, loaded: Loaded, prompts: Prompts, group: Group, report: Report
) -> list[Invariance]:  # fmt: skip
    found = []
    for check in request.checks:
        report(f"checks {check}: {CHECKS[check]}")
        if check in ARRANGED:
            anywhere = partial(_anywhere, group, f"compare {check}")
            result = check_arrangements(loaded.model, prompts, check, request.edges, anywhere)
        else:
            result = _OTHER_CHECKS[check](request, loaded, prompts, group)
        found.append(result)
    return found


def _anywhere(group: Group, name: str, here: bool) -> bool:
    """Return whether any rank says so: all ranks must go on in the same way."""
    return any(answer == b"1" for answer in group.gather(name, b"1" if here else b"0"))


def check_restart(request: Request, loaded: Loaded, prompts: Prompts, group: Group) -> Invariance:
    """Run the prompts again in a new process, and compare digests of all rows."""
    if group.world_size > 1:
        return Invariance(check="restart", verdict="unknown", detail="needs a single process")
    order = {**asdict(replace(request, prompts=prompts, checks=())), "threads": torch.get_num_threads()}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tilecast.engine.compare_restart"], input=json.dumps(order), text=True,
            capture_output=True, check=False, timeout=RESTART_TIMEOUT_S, env=child_environment({}),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Invariance(check="restart", verdict="unknown", detail=f"took longer than {RESTART_TIMEOUT_S} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Invariance(check="restart", verdict="unknown", detail=f"the new process failed: {last[:200]}")
    there = json.loads(done.stdout.splitlines()[-1])
    trace = run(loaded.model, prompts, alone(prompts))
    return compare_digests("restart", "in a new process", prompts, trace, digests(trace), there)


def digests_of(order: dict[str, Any]) -> dict[str, list[str]]:
    """Do what `check_restart` asks the new process for."""
    torch.set_num_threads(order.pop("threads"))
    prompts = Prompts(tuple(map(tuple, order.pop("prompts")["ids"])))
    lists: dict[str, Any] = {name: tuple(order.pop(name)) for name in ("checks", "edges", "texts")}
    request = Request(**order, **lists, prompts=prompts)
    loaded = _load(request, request.experts, process_group())
    with _surroundings(request, loaded.model):
        return digests(run(loaded.model, prompts, alone(prompts)))


def check_policy(request: Request, loaded: Loaded, prompts: Prompts, group: Group) -> Invariance:
    """Run the prompts with the policy that the model does not have now."""
    if loaded.experts != "tilecast":
        return Invariance(
            check="policy", verdict="unknown", detail=f"experts run on {loaded.experts}, without policies"
        )
    ours = run(loaded.model, prompts, alone(prompts))
    for policy in ("reproducible", "fastest"):
        # What loading does to weights says nothing of how they run.
        with outside():
            other = _load(request, request.experts, group, policy=policy)
        with row_wise_attention(other.model) if request.reproducible else nullcontext():
            theirs = run(other.model, prompts, alone(prompts))
        found = check_traces("policy", policy, prompts, ours, theirs)
        if found.verdict != "equal":
            return found
    return replace(found, detail="reproducible; fastest")


def check_ranks(request: Request, loaded: Loaded, prompts: Prompts, group: Group) -> Invariance:
    """Compare all ranks' bits with rank 0's."""
    if group.world_size == 1:
        return Invariance(check="ranks", verdict="unknown", detail="there is one rank; start with torchrun")
    trace = run(loaded.model, prompts, alone(prompts))
    if request.ep > 1:
        # With expert parallelism each rank's router keeps only what its own experts are to do.
        trace = {name: record for name, record in trace.items() if record.operation.kind != "router"}
    gathered = group.gather("compare ranks", json.dumps(digests(trace)).encode("ascii"))
    found = [json.loads(payload) for payload in gathered]
    for rank in range(1, group.world_size):
        result = compare_digests("ranks", f"rank {rank}", prompts, trace, found[0], found[rank])
        if result.verdict != "equal":
            return result
    return Invariance(check="ranks", verdict="equal", detail=f"{group.world_size} ranks")


_OTHER_CHECKS: dict[str, Callable[[Request, Loaded, Prompts, Group], Invariance]] = {
    "restart": check_restart,
    "policy": check_policy,
    "ranks": check_ranks,
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
