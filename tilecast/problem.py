"""The problem and the config that solves it: layers, their GEMMs, tile configs and token buckets.

All types here are frozen, validated when they are built, and have one canonical JSON form and digest.
Nothing in this module touches a device, a file or an environment variable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, cast

from tilecast.canonical import Json, canonical_json, digest_of_text, fields_of, quoted
from tilecast.errors import ConfigError, InputError

DTYPES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one element, by dtype name."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "drelu", "swiglu_oai", "identity")
"""Names of the activations between the two GEMMs; `swiglu_oai` is gpt-oss's clamped form, `drelu` is relu on both gate
and up (TurboSparse), `identity` none at all."""

EXACT_ZEROS = ("relu", "relu2", "drelu")
"""Activations that make exact zeros, which need not be multiplied with anything."""

GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What a weight format's name says; `kernels/formats.py` holds weights in it.

    kind: `dense`, `awq` (4 bits with zero points), `int4`, `int8` (symmetric) or `fp8` (e4m3). group: elements of K
    that share a scale, 0 for all. rows: weight rows that share one, 0 for all. bits: of one code, 0 if dense.
    """

    kind: str
    group: int = 0
    rows: int = 1
    bits: int = 0

    @property
    def codes_per_byte(self) -> int:
        """How many codes a byte holds."""
        return 2 if self.bits == 4 else 1


_FORMATS: dict[str, WeightFormat] = {
    "dense": WeightFormat("dense"),
    **{f"{kind}_g{group}": WeightFormat(kind, group, 1, 4) for kind in ("awq", "int4") for group in GROUPS},
    **{f"int8_g{group}": WeightFormat("int8", group, 1, 8) for group in GROUPS},
    "int8_channel": WeightFormat("int8", 0, 1, 8),
    "fp8_block128": WeightFormat("fp8", 128, 128, 8),
    "fp8_channel": WeightFormat("fp8", 0, 1, 8),
    "fp8_tensor": WeightFormat("fp8", 0, 0, 8),
}
WEIGHT_FORMATS = tuple(_FORMATS)
"""Names of the formats that expert weights are held in."""


def weight_format(name: str) -> WeightFormat:
    """Return what a format's name says. Raises InputError."""
    check_name("weight format", name, WEIGHT_FORMATS)
    return _FORMATS[name]


MAX_DIMENSION = 1 << 24
"""Upper bound of every size and token count; far above any model, far below int32 overflow."""

MAX_VALUE = 1 << 53
"""Upper bound of a parameter's size; all below have a float of their own."""

GemmName = Literal["up", "down"]
ParamValue = int | str


def check_int(what: str, value: object, low: int, high: int = MAX_DIMENSION) -> None:
    """Raise InputError unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{what} is {value!r}, expected an integer from {low} to {high}")


def check_name(what: str, value: object, known: tuple[str, ...]) -> None:
    """Raise InputError unless `value` is one of the known names."""
    if value not in known:
        raise InputError(f"{what} is {value!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """One MoE layer as one rank sees it.

    hidden (H), intermediate (I, this rank's share), experts (E, this rank's share) are sizes in elements;
    `global_experts` is what the router chooses among (equal to `experts` without expert parallelism).
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str = "bf16"
    weight_format: str = "dense"
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    global_experts: int = 0

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        check_int("hidden size H", self.hidden, 1)
        check_int("intermediate size I", self.intermediate, 1)
        check_int("number of experts E", self.experts, 1)
        if self.global_experts == 0:
            object.__setattr__(self, "global_experts", self.experts)
        check_int("number of global experts", self.global_experts, self.experts)
        check_int("top-k", self.top_k, 1)
        if self.top_k > self.global_experts:
            raise InputError(f"top-k is {self.top_k}, more than the {self.global_experts} experts to choose among")
        check_name("dtype", self.dtype, tuple(DTYPES))
        check_name("weight format", self.weight_format, WEIGHT_FORMATS)
        check_name("activation", self.activation, ACTIVATIONS)
        for name in ("gated", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if self.activation == "identity" and self.gated:
            raise InputError("activation is 'identity' with gated=true, expected gated=false or another activation")
        if self.activation == "drelu" and not self.gated:
            raise InputError("activation is 'drelu' with gated=false, expected gated=true or relu")

    @property
    def up(self) -> ExpertGemm:
        """The up projection: [rows, H] to [rows, I], activation included."""
        return ExpertGemm(layer=self, name="up")

    @property
    def down(self) -> ExpertGemm:
        """The down projection: [rows, I] to [rows, H], routing weight included."""
        return ExpertGemm(layer=self, name="down")

    @property
    def gemms(self) -> tuple[ExpertGemm, ExpertGemm]:
        """Both grouped GEMMs, up first."""
        return self.up, self.down

    @property
    def label(self) -> str:
        """A short human form, such as `E8 H4096 I1792 top2 bf16`."""
        parts = [f"E{self.experts}", f"H{self.hidden}", f"I{self.intermediate}", f"top{self.top_k}", self.dtype]
        if self.global_experts != self.experts:
            parts[0] += f"/{self.global_experts}"
        if self.weight_format != "dense":
            parts.append(self.weight_format)
        if self.activation != "silu" or not self.gated:
            parts.append(self.activation if self.gated else f"{self.activation}-ungated")
        if self.bias:
            parts.append("bias")
        return " ".join(parts)

    @cached_property
    def canonical(self) -> str:
        """The canonical JSON form."""
        return canonical_json(self.to_json())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return digest_of_text(self.canonical)

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {name: getattr(self, name) for name in _LAYER_KINDS}

    @classmethod
    def from_json(cls, value: object) -> ExpertLayer:
        """Build from parsed JSON. Raises InputError."""
        return cls(**cast(Any, fields_of(value, _LAYER_KINDS, "layer")))


_LAYER_KINDS: dict[str, type] = {
    f.name: {"int": int, "str": str, "bool": bool}[str(f.type)] for f in fields(ExpertLayer)
}


@dataclass(frozen=True, kw_only=True)
class ExpertGemm:
    """One of a layer's two grouped GEMMs."""

    layer: ExpertLayer
    name: GemmName

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        check_name("GEMM", self.name, ("up", "down"))

    @property
    def n(self) -> int:
        """Weight rows per expert: 2I (gated) or I for up, H for down."""
        layer = self.layer
        if self.name == "down":
            return layer.hidden
        return layer.intermediate * (2 if layer.gated else 1)

    @property
    def k(self) -> int:
        """Length of the reduction: H for up, I for down."""
        return self.layer.hidden if self.name == "up" else self.layer.intermediate

    def flops(self, rows: int) -> int:
        """Floating-point operations of `rows` routed rows, a multiply-add counted as two."""
        return 2 * rows * self.n * self.k

    @property
    def misfit(self) -> str | None:
        """Why the length of the reduction does not fit the layer's weight format: a group cut in two; None if it does.

        A word of packed codes is never longer than a group. Blocks of fp8 may end early, as checkpoints have them.
        """
        form = _FORMATS[self.layer.weight_format]
        if form.kind == "fp8" or not form.group or self.k % form.group == 0:
            return None
        what = "hidden size H" if self.name == "up" else "intermediate size I"
        below = self.k // form.group * form.group
        return (
            f"{what} is {self.k}, which cuts a group of {form.group} of {self.layer.weight_format} in two; "
            f"sizes that work are multiples of {form.group}, such as {below or form.group} or {below + form.group}"
        )

    def weight_bytes(self, experts: int | None = None) -> int:
        """Bytes of the weights of `experts` experts (default: all of the layer's)."""
        count = self.layer.experts if experts is None else experts
        form = _FORMATS[self.layer.weight_format]
        if form.kind == "dense":
            return count * self.n * self.k * DTYPES[self.layer.dtype]
        columns = -(-self.k // form.group) if form.group else 1
        # Blocks and tensors of gate and up are apart.
        parts = 2 if self.name == "up" and self.layer.gated else 1
        blocks = -(-self.n // parts // form.rows) if form.rows else 1
        rows = self.n if form.rows == 1 else parts * blocks
        # Scales of 16 bits where they belong to a row's group, of 32 elsewhere; a zero point is a byte.
        scale = (3 if form.kind == "awq" else 2) if form.kind != "fp8" else 4
        return count * (self.n * self.k * form.bits // 8 + rows * columns * scale)


@dataclass(frozen=True, order=False)
class TileConfig:
    """A kernel's name and its parameters: self-describing, hashable, never an index.

    Parameters are integers or strings; `params` accepts a mapping and is kept as sorted pairs.
    """

    kernel: str
    params: tuple[tuple[str, ParamValue], ...] = ()

    def __init__(self, kernel: str, params: Mapping[str, ParamValue] | tuple[tuple[str, ParamValue], ...] = ()) -> None:
        """Validate names and value types; raises ConfigError. Domains are the kernel's to check."""
        pairs = tuple(sorted(params.items() if isinstance(params, Mapping) else params))
        if not isinstance(kernel, str) or not kernel or len(kernel) > 64:
            raise ConfigError(f"kernel name is {kernel!r}, expected 1 to 64 characters")
        if len(pairs) > 64 or len({name for name, _ in pairs}) != len(pairs):
            raise ConfigError(f"config of {kernel}: more than 64 parameters, or one given twice")
        for name, value in pairs:
            if not isinstance(name, str) or not name.isidentifier() or len(name) > 64:
                raise ConfigError(f"config of {kernel}: parameter name {name!r} is not an identifier")
            if type(value) is int and -MAX_VALUE <= value <= MAX_VALUE:
                continue  # Nearly always, and a table has thousands.
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise ConfigError(f"config of {kernel}: {name} is {value!r}, expected an integer or a string")
            too_big = abs(value) > MAX_VALUE if isinstance(value, int) else len(value) > 64
            if too_big:
                raise ConfigError(f"config of {kernel}: {name} is out of range")
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "params", pairs)
        # Configs are keys on the way to every launch.
        object.__setattr__(self, "_hash", hash((kernel, pairs)))

    def __hash__(self) -> int:
        """Return the hash of kernel and parameters, computed once."""
        value: int = self.__dict__["_hash"]
        return value

    def __getitem__(self, name: str) -> ParamValue:
        """Return one parameter; raises ConfigError if the config has none of that name."""
        for key, value in self.params:
            if key == name:
                return value
        raise ConfigError(f"config of {self.kernel} has no parameter {name!r}")

    def integer(self, name: str) -> int:
        """Return one parameter that must be an integer; raises ConfigError."""
        value = self[name]
        if not isinstance(value, int):
            raise ConfigError(f"config of {self.kernel}: {name} is {value!r}, expected an integer")
        return value

    def with_params(self, **changes: ParamValue) -> TileConfig:
        """Return a copy with some parameters changed."""
        return TileConfig(self.kernel, {**dict(self.params), **changes})

    @property
    def sort_key(self) -> tuple[str, str]:
        """The total order on configs that breaks ties."""
        return self.kernel, self.canonical[len(quoted(self.kernel)) + len('{"kernel":,"params":') : -1]

    @property
    def label(self) -> str:
        """A short human form: `llvm.moe_gemm mr=6 nr=16 …`."""
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.params)])

    @cached_property
    def canonical(self) -> str:
        """The canonical JSON form, put together here: stores hold thousands."""
        pairs = [f"{quoted(name)}:{_value_text(value)}" for name, value in self.params]
        return f'{{"kernel":{quoted(self.kernel)},"params":{{{",".join(pairs)}}}}}'

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return digest_of_text(self.canonical)

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {"kernel": self.kernel, "params": dict(self.params)}

    @classmethod
    def from_json(cls, value: object) -> TileConfig:
        """Build from parsed JSON. Raises InputError (ConfigError for bad parameters)."""
        parsed = fields_of(value, {"kernel": str, "params": dict}, "config")
        return cls(cast(str, parsed["kernel"]), cast(dict[str, ParamValue], parsed["params"]))


def _value_text(value: ParamValue) -> str:
    return int.__repr__(value) if isinstance(value, int) else quoted(value)


@dataclass(frozen=True, order=True, kw_only=True)
class Bucket:
    """The token counts one decision covers: (previous bucket's tokens, `tokens`]."""

    above: int
    tokens: int

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        check_int("bucket's lower bound", self.above, 0)
        check_int("bucket's tokens", self.tokens, self.above + 1)

    def __contains__(self, tokens: int) -> bool:
        """Whether a token count falls into this bucket."""
        return self.above < tokens <= self.tokens


def tokens_text(tokens: int) -> str:
    """Write a token count: `1 token`, `16 tokens`."""
    return f"{tokens} token" if tokens == 1 else f"{tokens} tokens"


def buckets(tokens: tuple[int, ...] | list[int]) -> tuple[Bucket, ...]:
    """Return the buckets that the given token counts bound, ascending, duplicates dropped."""
    edges = sorted(set(tokens))
    return tuple(Bucket(above=low, tokens=high) for low, high in zip([0, *edges], edges, strict=False))
