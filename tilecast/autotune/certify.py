"""Certificates of numerics classes: on this device, do all members of a class give the same bits?

The tuner checks the configs that it chose (`classes`). A certificate asks the class itself: many members, chosen to
differ, on many inputs, each input alone by the class's reference and in batches by every member.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations

import torch

from tilecast.autotune.certificate import (
    CERTIFICATE_INPUTS,
    Certificate,
    ClassResult,
    Comparison,
    Difference,
    Foreign,
    Member,
)
from tilecast.autotune.classes import INTEGERS, wide_operands
from tilecast.autotune.controls import foreign_config, sums_exactly
from tilecast.autotune.prescreen import prescreen
from tilecast.autotune.seeds import hash_seed
from tilecast.autotune.workload import Inputs, in_order, in_slot_order, launch, poisoned_output
from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels import sort_slots
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import PLAIN, GemmWeights, Registry, numerics_class
from tilecast.kernels.stacks import backward, reversal
from tilecast.problem import ExpertGemm, TileConfig

BATCHES = (7, 251)
"""Tokens a launch: fewer and more than a tile's rows, and no multiple of any block. Each input runs in both."""
ALONE = 4
"""Inputs that every member also runs alone; the reference runs all of them alone."""
MEMBERS = 12
"""Members of a class that are run unless told otherwise."""

Report = Callable[[float, str], None]


def claimed_configs(
    gemm: ExpertGemm, tokens: Iterable[int], environment: Environment, registry: Registry
) -> tuple[TileConfig, ...]:
    """Return every valid config of every kernel's space and default for these token counts, each once.

    Raises DeviceError when no kernel can run the GEMM here.
    """
    found = [prescreen(gemm, count, environment, registry).by_config for count in tokens]
    return tuple(dict.fromkeys(config for configs in found for config in configs))


def spread(configs: Sequence[TileConfig], limit: int) -> tuple[TileConfig, ...]:
    """Return up to `limit` of the configs: the first, then always the one with most that was not seen yet.

    A kernel's name and each parameter's value count alike. Ties go to the config that differs in most from the chosen
    one nearest to it, then to the earlier one.
    """
    traits = {config: {("kernel", config.kernel), *config.params} for config in configs}
    left = list(traits)
    chosen: list[TileConfig] = []
    seen: set[tuple[str, object]] = set()
    while left and len(chosen) < limit:

        def gain(config: TileConfig) -> tuple[int, int]:
            own = traits[config]
            return len(own - seen), min((len(own - traits[other]) for other in chosen), default=0)  # noqa: B023

        best = left[0] if not chosen else max(left, key=gain)
        left.remove(best)
        chosen.append(best)
        seen |= traits[best]
    return tuple(chosen)


def certify(
    gemm: ExpertGemm,
    configs: Iterable[TileConfig],
    environment: Environment,
    registry: Registry,
    *,
    inputs: int = CERTIFICATE_INPUTS,
    seed: int = 0,
    members: int | None = MEMBERS,
    report: Report | None = None,
) -> Certificate:
    """Run members of every numerics class among `configs` on this machine's device and compare bits.

    An input is one token, in all its slots. The class's reference (`default(like=…)` at one token) runs each input
    alone; each of up to `members` members (None: all) runs all inputs in batches of 7 and of 251 tokens, at other
    places in each, and some alone. `down` is compared once rounded and once not. The negative control runs the
    reference with K reversed: most inputs must then have other bits. Where a class takes all of K as one exact sum none
    may, and most must have other bits in another class of the kernel (`controls`). Everything follows from `seed`.

    Configs that do not claim to be free of the batch promise no bits and are left out. What a kernel raises becomes
    part of the result, unless it left the device unusable: DeviceError. Raises InputError for `inputs` below 1 or a
    bad seed.
    """
    given = tuple(dict.fromkeys(configs))
    promised = [config for config in given if registry[config.kernel].batch_invariant(gemm, config)]
    groups: dict[str, list[TileConfig]] = {}
    for config in promised:
        groups.setdefault(numerics_class(registry[config.kernel], gemm, config, environment), []).append(config)
    # Validated before anything runs.
    certificate = Certificate(
        environment=environment, gemm=gemm, inputs=inputs, seed=seed, classes=(), unpromised=len(given) - len(promised)
    )
    bench = _Bench(gemm, environment, registry, inputs=inputs, seed=seed)
    results, outputs = [], {}
    for place, (numerics, group) in enumerate(groups.items()):

        def progress(share: float, text: str, place: int = place) -> None:
            if report is not None:
                report((place + share) / len(groups), text)

        result, expected = _certify_class(bench, numerics, group, members, progress)
        results.append(result)
        if expected is not None:
            outputs[numerics] = expected
    pairs = tuple(
        Comparison(first=a, second=b, different=int(_differing(outputs[a], outputs[b]).sum()))
        for a, b in combinations(outputs, 2)
    )
    return replace(certificate, classes=tuple(results), comparisons=pairs)


Outputs = dict[torch.dtype, torch.Tensor]
"""By output dtype: what each input gave, [inputs, slots of a token (1 for down), columns], on the CPU."""


def _certify_class(
    bench: _Bench, numerics: str, group: Sequence[TileConfig], members: int | None, progress: Report
) -> tuple[ClassResult, Outputs | None]:
    start = time.monotonic()
    reference = bench.reference(group[0], numerics)
    chosen = group if members is None else spread(group, members)
    result = ClassResult(
        numerics=numerics,
        fields=bench.fields(reference),
        reference=reference,
        members=(),
        inputs=bench.inputs,
        control=0,
        outputs="",
    )
    progress(0.0, f"{reference.label} alone")
    try:
        expected = bench.alone(reference)
    except Exception as error:  # Whatever a kernel raises says the same: it cannot be relied on.
        return replace(result, error=bench.raised(reference, error), seconds=time.monotonic() - start), None
    found: dict[TileConfig, Member] = {}
    # Those of one layout one after the other, so that no two packed stacks lie in memory.
    for config in sorted(chosen, key=bench.layout):
        progress((1 + len(found)) / (len(chosen) + 2), config.label)
        found[config] = bench.member(config, expected)
    progress((1 + len(found)) / (len(chosen) + 2), "negative control")
    control, control_error = bench.control(reference, expected)
    foreign = None
    if sums_exactly(result.fields, bench.gemm):
        foreign, foreign_error = bench.foreign(reference, expected)
        control_error = control_error or foreign_error
    return (
        replace(
            result,
            members=tuple(found[config] for config in chosen),
            control=control,
            control_error=control_error,
            foreign=foreign,
            outputs=_sha256(expected),
            seconds=time.monotonic() - start,
        ),
        expected,
    )


class _Bench:
    """One GEMM's operands on the device, and what configs make of them."""

    def __init__(
        self, gemm: ExpertGemm, environment: Environment, registry: Registry, *, inputs: int, seed: int
    ) -> None:
        self.gemm = gemm
        self._environment = environment
        self._registry = registry
        self.inputs = inputs
        self._seed = seed
        # The interpreter runs GPU kernels on CPU tensors.
        on_gpu = environment.device_kind != "cpu" and torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        made = wide_operands(gemm, seed, inputs, self._device)
        self._small, self._weights = made.gemm, made.weights
        self._rows, self._topk_weights = made.rows, made.topk_weights
        # A token without any expert has no sum: every input must have one to count.
        self._ids = made.ids.cpu()
        self._ids[(self._ids < 0).all(1), 0] = 0
        self._packed: tuple[tuple[str, str], GemmWeights] | None = None

    # What is asked without running ---------------------------------------------------

    def reference(self, config: TileConfig, numerics: str) -> TileConfig:
        """Return the class's config for one token, or `config` where the kernel's is of another class."""
        found = self._registry[config.kernel].default(self.gemm, 1, self._environment, like=config)
        same = numerics_class(self._registry[found.kernel], self.gemm, found, self._environment) == numerics
        return found if same and self._registry.invalid(self.gemm, found, self._environment) is None else config

    def fields(self, config: TileConfig) -> dict[str, Json]:
        return dict(self._registry[config.kernel].numerics(self.gemm, config, self._environment))

    def layout(self, config: TileConfig) -> tuple[str, str]:
        return config.kernel, self._registry[config.kernel].layout(self.gemm, config)

    # What runs -----------------------------------------------------------------------

    def alone(self, config: TileConfig) -> Outputs:
        """Return what `config` makes of each input in a launch of its own."""
        return self._in_batches(config, self._pack(config), 1, torch.arange(self.inputs))

    def member(self, config: TileConfig, expected: Outputs) -> Member:
        """Compare what `config` gives in batches with what is expected of each input."""
        ran = torch.zeros(self.inputs, dtype=torch.bool)
        different, first = ran.clone(), None
        try:
            for batch, order in self._arrangements():
                got = self._in_batches(config, self._pack(config), batch, order)
                found = _differing(got, {dtype: rows[order] for dtype, rows in expected.items()})
                if first is None and bool(found.any()):
                    first = _first_difference(got, expected, order, int(found.nonzero()[0, 0]), batch)
                different[order[found]] = True
                ran[order] = True
        except Exception as error:  # As for the reference.
            equal, other = int((ran & ~different).sum()), int(different.sum())
            return Member(config=config, equal=equal, different=other, first=first, error=self.raised(config, error))
        return Member(config=config, equal=int((~different).sum()), different=int(different.sum()), first=first)

    def control(self, config: TileConfig, expected: Outputs) -> tuple[int, str]:
        """Return on how many inputs the sum taken from the other end has other bits, and what raised, if so."""
        turned = replace(self._weights, data=backward(self._weights.data, self._small), plans={})
        batch, order = self._arrangements()[-1]
        try:
            got = self._in_batches(config, self._packed_as(config, turned), batch, order, turned=True)
        except Exception as error:  # As for the reference.
            return 0, self.raised(config, error)
        return int(_differing(got, {dtype: rows[order] for dtype, rows in expected.items()}).sum()), ""

    def foreign(self, config: TileConfig, expected: Outputs) -> tuple[Foreign, str]:
        """Return on how many inputs another class of the kernel has other bits, and what raised, if so."""
        other = foreign_config(self.gemm, config, self._environment, self._registry)
        if other is None:
            return Foreign(config=None, different=0), ""
        batch, order = self._arrangements()[-1]
        try:
            got = self._in_batches(other, self._pack(other), batch, order)
        except Exception as error:  # As for the reference.
            return Foreign(config=other, different=0), self.raised(other, error)
        found = _differing(got, {dtype: rows[order] for dtype, rows in expected.items()})
        return Foreign(config=other, different=int(found.sum())), ""

    def raised(self, config: TileConfig, error: Exception) -> str:
        """Return what a kernel raised, in one line. Raises DeviceError if nothing else can run after it."""
        text = _text(error)
        check_usable(self._device, f"{config.label} raised {text}")
        return text

    def _arrangements(self) -> list[tuple[int, torch.Tensor]]:
        """Return (tokens a launch, which input stands at each place): a few alone, then all in each kind of batch."""
        orders = []
        for batch in (1, *BATCHES):
            generator = torch.Generator().manual_seed(hash_seed(self._seed, 23, batch))
            order = torch.randperm(self.inputs, generator=generator)
            orders.append((batch, order[:ALONE] if batch == 1 else order))
        return orders

    def _in_batches(
        self, config: TileConfig, weights: GemmWeights, batch: int, order: torch.Tensor, *, turned: bool = False
    ) -> Outputs:
        layer = self._small.layer
        dtype = TORCH_DTYPES[layer.dtype]
        # As in the class check: the partial sum of a rank hides nothing, the rounded one is what a single rank returns.
        dtypes = (dtype,) if self._small.name == "up" else tuple(dict.fromkeys((torch.float32, dtype)))
        parts: dict[torch.dtype, list[torch.Tensor]] = {kind: [] for kind in dtypes}
        for tokens in torch.split(order, batch):
            route = sort_slots(self._ids[tokens].to(self._device), layer.experts)
            rows = self._rows[tokens.to(self._device)].flatten(0, -2)
            rows = rows.index_select(-1, reversal(self._small).to(self._device)) if turned else rows
            for kind in dtypes:
                parts[kind].append(self._launch(config, weights, tokens, route, rows, kind))
        return {kind: torch.cat(made) for kind, made in parts.items()}

    def _launch(
        self,
        config: TileConfig,
        weights: GemmWeights,
        tokens: torch.Tensor,
        route: ExpertLayout,
        rows: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Run one batch: [tokens, slots of a token (1 for down), columns] in slot order, on the CPU."""
        gemm, kernel = self._small, self._registry[config.kernel]
        order = kernel.order(gemm, config)
        out = poisoned_output(gemm, len(tokens), dtype, self._device)
        given = Inputs(rows=rows, route=route, topk_weights=self._topk_weights[tokens.to(self._device)])
        launch(kernel, config, weights, in_order(gemm, given, order), out)
        out = in_slot_order(gemm, out, route, order).cpu()
        return out.view(len(tokens), -1, out.shape[1])

    def _pack(self, config: TileConfig) -> GemmWeights:
        key = self.layout(config)
        if key[1] == PLAIN:
            return self._weights
        if self._packed is None or self._packed[0] != key:
            self._packed = None  # Before and not after: memory holds one packed stack.
            self._packed = key, self._packed_as(config, self._weights)
        return self._packed[1]

    def _packed_as(self, config: TileConfig, weights: GemmWeights) -> GemmWeights:
        kernel, layout = self._registry[config.kernel], self.layout(config)[1]
        return weights if layout == PLAIN else kernel.pack(weights, layout)


def _differing(a: Outputs, b: Outputs) -> torch.Tensor:
    """Return bool [inputs]: whether any bit differs in any dtype. NaN equals itself, −0 is not 0."""
    found = [
        (a[dtype].view(kind) != b[dtype].view(kind)).flatten(1).any(1) for dtype in a for kind in [INTEGERS[dtype]]
    ]
    return torch.stack(found).any(0)


def _first_difference(got: Outputs, expected: Outputs, order: torch.Tensor, place: int, batch: int) -> Difference:
    """Return where the input at `place` of `order` differs first."""
    number = int(order[place])
    for dtype, rows in got.items():
        kind = INTEGERS[dtype]
        mine, other = rows[place].contiguous().view(kind), expected[dtype][number].contiguous().view(kind)
        where = (mine != other).nonzero()
        if len(where):
            slot, column = where[0].tolist()
            return Difference(
                input=number,
                batch=min(batch, len(order) - place // batch * batch),
                row=place % batch * rows.shape[1] + slot,
                column=column,
                dtype=str(dtype).removeprefix("torch."),
                expected=_hexadecimal(other[slot, column]),
                got=_hexadecimal(mine[slot, column]),
            )
    raise AssertionError("no bit differs")


def _hexadecimal(bits: torch.Tensor) -> str:
    width = 8 * bits.element_size()
    return f"0x{int(bits) % (1 << width):0{width // 4}x}"


def _sha256(outputs: Outputs) -> str:
    total = hashlib.sha256()
    for dtype, rows in outputs.items():
        total.update(f"{dtype} {tuple(rows.shape)}\n".encode("ascii"))
        total.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def check_usable(device: torch.device, before: str) -> None:
    """Raise DeviceError, with what happened `before`, if a GPU no longer answers: some errors outlast their launch."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise DeviceError(f"{before}, and left the device unusable to this process; certify without it") from error


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
