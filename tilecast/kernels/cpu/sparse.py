"""`llvm.sparse_experts`: grouped expert GEMMs that leave out what relu, relu² or dReLU made zero.

Up reads the up rows whose gate is alive, and every gate row, or those of which a screen leaves open whether the gate is
dead; down reads the weight rows of live neurons alone. Nothing is predicted: zeros are exact. Bits are those of
`llvm.moe_gemm` with dot=fma, so both are one class and the tuner may mix them. What is left out is a product of zero:
only where the dense sum meets an infinite or NaN weight there (it becomes NaN), or has underflowed to −0 (it may become
+0), is the result another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.errors import ConfigError
from tilecast.kernels.cpu._screen import GROUP, groups_of, padded_groups
from tilecast.kernels.cpu.columns import gate_gemm, padded_columns, padded_k, pitch, row_pitch
from tilecast.kernels.cpu.isa import Isa, host_isa
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.screen_work import screen_work
from tilecast.kernels.cpu.slots import SlotKernel
from tilecast.kernels.cpu.tiles import rows_per_expert
from tilecast.kernels.cpu.work import sparse_work
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.kernels.work import UNKNOWN_SPARSITY, Work
from tilecast.problem import DTYPES, EXACT_ZEROS, ExpertGemm, ParamValue, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.cpu.launch import Plan
    from tilecast.kernels.cpu.slots import Rows
    from tilecast.kernels.routing import ExpertLayout

NAME = "llvm.sparse_experts"
NEURONS = "neurons"
"""The layout of down: one neuron's row behind the other."""
GATES = {f"gate{panel}": panel for panel in (16, 32, 64)}
"""The layouts of up, and the columns of their gate rows' panels."""
SCREEN = "screen128"
"""The layout of up with a screen: gate rows neuron by neuron, and once more as int8 codes, a scale for 128 of K."""
SCREENED_ROWS = 2
"""Rows an expert up to which reading less weighs more than screening each row."""
_NO_TILE = {"mr": 1, "nv": 1, "unroll": 1, "prefetch": 0}
"""What these parameters are for down, which has no register tile."""


class SparseExperts(SlotKernel):
    """Exact zeros left out. Parameters:

    layout: `gateN` (up: gate rows in panels of N columns), `screen128` (up: gate rows neuron by neuron, behind a screen
    of 8-bit codes) or `neurons` (down); neurons: neurons multiplied (up) or added (down) at once; ahead: 1 if the next
    ones are asked for; block_n: columns of one job; threads: at most so many (0 = all that torch uses); mr, nv, unroll,
    prefetch: of the tiles of gate rows in panels, as `llvm.moe_gemm` has them.
    """

    name = NAME
    device_kind = "cpu"
    skips_zeros = True
    domain: dict[str, tuple[ParamValue, ...] | range] = {  # noqa: RUF012  # the protocol wants an instance's view
        "mr": range(1, 15),
        "nv": (1, 2, 4, 8),
        "unroll": (1, 2, 4, 8),
        "prefetch": (0, 1, 2, 4, 8),
        "layout": (*GATES, SCREEN, NEURONS),
        "neurons": (1, 2, 4, 8),
        "ahead": (0, 1),
        "block_n": (64, 128, 256, 512, 1024, 2048, 4096),
        "threads": (0, 1, *range(2, 257)),
    }

    def __init__(self, isa: Isa | None = None) -> None:
        """Use this machine's instruction set, or another one for static questions."""
        self.isa = isa or host_isa()
        self.dense = MoeGemm(self.isa)

    # What is asked before anything runs ----------------------------------------------

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        """Return why this kernel cannot run `gemm` in `environment` at all."""
        layer = gemm.layer
        if layer.activation not in EXACT_ZEROS:
            return f"needs exact zeros, of {', '.join(EXACT_ZEROS)}; the activation is {layer.activation}"
        if layer.weight_format != "dense":
            return f"takes dense weights, not {layer.weight_format}"
        if gemm.name == "up" and not layer.gated:
            return "without a gate every row of the up projection has to be computed"
        return self.dense.rejects(gemm, environment)

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        """Return why `config` cannot run `gemm` in `environment`."""
        layout, block_n = str(config["layout"]), config.integer("block_n")
        if (gemm.name == "down") != (layout == NEURONS):
            return f"layout {layout} is not of {gemm.name}"
        if gemm.name == "down":
            if reason := _without_tile(config):
                return reason
            if block_n % (8 * self.isa.lanes):
                return f"block_n={block_n} is not a multiple of 8 vectors of {self.isa.lanes}"
            return None
        if block_n > 1024:
            return f"block_n={block_n}, up takes at most 1024"
        if layout == SCREEN:
            return _without_tile(config)
        return self.dense.invalid(gate_gemm(gemm), self._gate_config(config), environment)

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering for this many tokens, in a fixed order; some may be invalid."""
        if gemm.name == "down":
            for block_n, neurons in product((4096, 2048, 1024, 512, 256), (8, 4)):
                yield self._config(**_NO_TILE, layout=NEURONS, neurons=neurons, ahead=1, block_n=block_n)
            return
        gates = [
            self._up(gemm, tokens, environment, layout) for layout in (self._gates(gemm, tokens, environment), "gate32")
        ]
        for base in dict.fromkeys((self._up(gemm, tokens, environment, SCREEN), *gates)):
            for block_n, neurons in product((256, 512, 128), (4, 8)):
                yield base.with_params(block_n=block_n, neurons=neurons)

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config; with `like`, one of the same weight layout."""
        if gemm.name == "down":
            columns = padded_columns(gemm, self.isa.lanes)
            active = min(gemm.layer.experts, tokens * gemm.layer.top_k)
            # The longer a stretch, the nearer its rate to that of dense weights; every thread has a job.
            blocks = [n for n in (4096, 2048, 1024) if active * columns >= n * max(1, environment.threads)]
            return self._config(**_NO_TILE, layout=NEURONS, neurons=8, ahead=1, block_n=blocks[0] if blocks else 512)
        if like is not None and like.kernel == NAME and like["layout"] != NEURONS:
            return self._up(gemm, tokens, environment, str(like["layout"]))
        # The more rows an expert has, the more of its gates are open in one of them.
        screened = rows_per_expert(gemm, tokens) <= SCREENED_ROWS
        return self._up(gemm, tokens, environment, SCREEN if screened else self._gates(gemm, tokens, environment))

    def _up(self, gemm: ExpertGemm, tokens: int, environment: Environment, layout: str) -> TileConfig:
        """Return the heuristic config of an up projection in one of its layouts."""
        gates, rows = self.dense.default(gate_gemm(gemm), tokens, environment), rows_per_expert(gemm, tokens)
        tile = _NO_TILE if layout == SCREEN else {name: gates[name] for name in _NO_TILE}
        block_n = 512 if rows > 16 else 256 if rows > 1 or layout == SCREEN else 128
        return self._config(**tile, layout=layout, neurons=4, ahead=1, block_n=block_n)

    def _gates(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> str:
        """Return the layout without a screen whose panels are the dense kernel's."""
        return f"gate{str(self.dense.default(gate_gemm(gemm), tokens, environment)['layout']).removeprefix('panel')}"

    def _config(self, **params: ParamValue) -> TileConfig:
        return TileConfig(NAME, {"threads": 0, **params})

    def _gate_config(self, config: TileConfig) -> TileConfig:
        """Return the dense kernel's config that computes the gate rows as `config` does."""
        taken = {name: config[name] for name in ("mr", "nv", "unroll", "prefetch", "block_n", "threads")}
        layout = f"panel{GATES[str(config['layout'])]}"
        return TileConfig(self.dense.name, {**taken, "layout": layout, "stage": 0, "block_k": 0, "dot": "fma"})

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        """Return the fields of the numerics class: the dense kernel's, whose bits these are."""
        return self.dense.numerics(gemm, TileConfig(self.dense.name, {"dot": "fma"}), environment)

    def work(
        self,
        gemm: ExpertGemm,
        config: TileConfig,
        environment: Environment,
        counts: Sequence[int],
        dead: float = UNKNOWN_SPARSITY,
    ) -> Work:
        """Return what a launch of a valid config does; counts are the rows of each local expert."""
        gates = None
        if config["layout"] == SCREEN:
            gates = screen_work(self.isa, gemm, config, counts, dead)
        elif gemm.name == "up":
            gates = self.dense.work(gate_gemm(gemm), self._gate_config(config), environment, counts)
        return sparse_work(gemm, config, gates, counts, dead)

    def stack_bytes(self, gemm: ExpertGemm, layout: str) -> int:
        """Return the bytes of the stack that `pack` makes for one of the layouts."""
        layer, size, lanes = gemm.layer, DTYPES[gemm.layer.dtype], self.isa.lanes
        if layout == NEURONS:
            return layer.experts * gemm.k * pitch(padded_columns(gemm, lanes), layer.dtype) * size
        gate = gate_gemm(gemm)
        columns, rows = padded_columns(gate, lanes), layer.intermediate * row_pitch(gemm.k, layer.dtype, lanes) * size
        if layout != SCREEN:
            return layer.experts * (columns * padded_k(gate, pairs=layer.dtype == "bf16") * size + rows)
        # Gate rows lie as up rows do; their codes, the scales of those as bf16 and two bounds as float32 come besides.
        screen = columns * (GROUP * groups_of(gemm.k) + 2 * padded_groups(gemm.k, lanes) + 8)
        return layer.experts * (2 * rows + screen)

    def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
        """Return `plain` weights stored in another layout. The plain tensor is left as it was."""
        gemm = weights.gemm
        if layout == PLAIN or weights.layout == layout:
            return weights
        if weights.layout != PLAIN or layout not in ((NEURONS,) if gemm.name == "down" else (*GATES, SCREEN)):
            raise ConfigError(
                f"{NAME}: weights of {gemm.name} in layout {weights.layout} cannot be packed as {layout!r}"
            )
        if gemm.name == "up" and not gemm.layer.gated:
            raise ConfigError(f"{NAME}: layout {layout} holds gate and up rows apart, the layer is not gated")
        from tilecast.kernels.cpu import sparse_launch

        data = sparse_launch.packed(self.isa, weights, layout)
        return GemmWeights(gemm=gemm, layout=layout, data=data, bias=weights.bias)

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        """Return weights in any of this kernel's layouts as `plain` ones, bit for bit."""
        if weights.layout == PLAIN:
            return weights
        from tilecast.kernels.cpu import sparse_launch

        data = sparse_launch.unpacked(self.isa, weights)
        return GemmWeights(gemm=weights.gemm, layout=PLAIN, data=data, bias=weights.bias)

    def plan(self, config: TileConfig, weights: GemmWeights, out_dtype: torch.dtype) -> Plan:
        """Return what launches into `out_dtype` share, made once and kept with the weights. Raises as a launch does."""
        from tilecast.kernels.cpu import sparse_launch

        return sparse_launch.plan_of(self.isa, config, weights, out_dtype)

    def launch(self, config: TileConfig, weights: GemmWeights, route: ExpertLayout, operands: Rows) -> None:
        """Run one of the two GEMMs on a routing with at least one token."""
        from tilecast.kernels.cpu import sparse_launch

        sparse_launch.launch(self.isa, config, weights, route, operands)


def _without_tile(config: TileConfig) -> str | None:
    """Return why a config that computes no panels is not valid: it has parameters of a tile."""
    if all(config[name] == value for name, value in _NO_TILE.items()):
        return None
    said = ", ".join(f"{name}={value}" for name, value in _NO_TILE.items())
    return f"layout {config['layout']} has no tile: {said}"
