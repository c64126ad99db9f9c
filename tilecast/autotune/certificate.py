"""What a certificate of numerics classes says, and its JSON form.

A certificate is data: it can be saved, read again after a restart or on another machine of the same kind, and
compared. `certify` makes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from tilecast.canonical import Json, fields_of
from tilecast.environment import Environment
from tilecast.errors import InputError
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig, check_int

CERTIFICATE_INPUTS = 1000
"""The inputs that a certificate rests on at least; fewer are a probe."""

Verdict = Literal["equal", "different", "raised", "control failed"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where a member's bits were not its reference's.

    `row` is the row of the output that the launch wrote, in slot order (up) or by token (down); `batch` the number of
    tokens in the launch. Bits are hexadecimal, of elements of `dtype`.
    """

    input: int
    batch: int
    row: int
    column: int
    dtype: str
    expected: str
    got: str

    def __str__(self) -> str:
        """Return one line without the member's name."""
        return (
            f"input {self.input}, in a batch of {self.batch}, row {self.row}, column {self.column}: "
            f"{self.dtype} bits {self.got}, expected {self.expected}"
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: object) -> Difference:
        """Build from parsed JSON. Raises InputError."""
        kinds: dict[str, type] = {
            "input": int, "batch": int, "row": int, "column": int, "dtype": str, "expected": str, "got": str,
        }  # fmt: skip
        return cls(**cast(Any, fields_of(value, kinds, "difference")))


@dataclass(frozen=True, kw_only=True)
class Member:
    """One config of a class: on how many inputs its bits were the reference's, in every batch that was run.

    `error` is what the kernel raised, empty if nothing; inputs that did not run then count as neither.
    """

    config: TileConfig
    equal: int
    different: int
    first: Difference | None = None
    error: str = ""

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        first = None if self.first is None else self.first.to_json()
        return {**vars(self), "config": self.config.to_json(), "first": first}

    @classmethod
    def from_json(cls, value: object) -> Member:
        """Build from parsed JSON. Raises InputError."""
        kinds: dict[str, type | tuple[type, ...]] = {
            "config": dict, "equal": int, "different": int, "first": (dict, type(None)), "error": str,
        }  # fmt: skip
        parsed: Any = dict(fields_of(value, kinds, "member"))
        first = None if parsed["first"] is None else Difference.from_json(parsed["first"])
        return cls(**{**parsed, "config": TileConfig.from_json(parsed["config"]), "first": first})


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """The control of a class whose sums over K are exact: on how many inputs another class had other bits.

    `config` is of that other class of the same kernel, None where the kernel has no other for the GEMM.
    """

    config: TileConfig | None
    different: int

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {"config": None if self.config is None else self.config.to_json(), "different": self.different}

    @classmethod
    def from_json(cls, value: object) -> Foreign:
        """Build from parsed JSON. Raises InputError."""
        kinds: dict[str, type | tuple[type, ...]] = {"config": (dict, type(None)), "different": int}
        parsed: Any = fields_of(value, kinds, "foreign class")
        config = None if parsed["config"] is None else TileConfig.from_json(parsed["config"])
        return cls(config=config, different=parsed["different"])


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """What was seen of one numerics class.

    `numerics` is the class's digest, `fields` what it is the digest of besides the device. `control` counts the inputs
    on which the reversed sum had other bits; `foreign` is what another class had, asked only of a class whose sums over
    K are exact (`controls`); `control_error` is what either raised. `outputs` is the SHA-256 of the reference's
    outputs, each input alone, empty if the reference raised (`error`).
    """

    numerics: str
    fields: dict[str, Json]
    reference: TileConfig
    members: tuple[Member, ...]
    inputs: int
    control: int
    outputs: str
    error: str = ""
    control_error: str = ""
    seconds: float = 0.0
    foreign: Foreign | None = None

    @property
    def verdict(self) -> Verdict:
        """`equal` only if every member had the reference's bits and the control shows that others would not."""
        if any(member.different for member in self.members):
            return "different"
        if self.error or not self.members or any(member.error for member in self.members):
            return "raised"
        return "equal" if self.unproven is None else "control failed"

    @property
    def unproven(self) -> str | None:
        """Why the control does not show that other bits would have been seen, in one line; None if it does."""
        if self.control_error:
            return f"the control raised {self.control_error}"
        if self.foreign is None:
            seen = f"only {self.control} of {self.inputs} inputs had other bits"
            return f"with K reversed {seen}, so equal bits prove nothing" if self._few(self.control) else None
        if self.control:
            return f"claims exact sums, but with K reversed {self.control} of {self.inputs} inputs had other bits"
        if self.foreign.config is None:
            lacking = f"{self.reference.kernel} has no other class to tell it from"
            return f"sums over K are exact and {lacking}, so equal bits prove nothing"
        if self._few(self.foreign.different):
            seen = f"other bits on only {self.foreign.different} of {self.inputs} inputs"
            return f"{self.foreign.config.label} of another class had {seen}, so equal bits prove nothing"
        return None

    def _few(self, different: int) -> bool:
        return 2 * different < max(1, self.inputs)

    @property
    def certified(self) -> bool:
        """Whether this is a certificate of the class: all equal, on enough inputs."""
        return self.verdict == "equal" and self.inputs >= CERTIFICATE_INPUTS

    @property
    def reason(self) -> str | None:
        """Why the verdict is not `equal`, in one line."""
        for member in self.members:
            if member.first is not None:
                return f"{member.config.label} differs on {member.different} of {self.inputs} inputs: {member.first}"
        if self.error:
            return f"the reference {self.reference.label} raised {self.error}"
        for member in self.members:
            if member.error:
                return f"{member.config.label} raised {member.error}"
        return self.unproven if self.verdict == "control failed" else None

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form, the verdict with it for readers; `foreign` only where it was asked."""
        own = {name: value for name, value in vars(self).items() if name != "foreign"}
        if self.foreign is not None:
            own["foreign"] = self.foreign.to_json()
        return {
            **own,
            "reference": self.reference.to_json(),
            "members": [member.to_json() for member in self.members],
            "verdict": self.verdict,
            "certified": self.certified,
        }

    @classmethod
    def from_json(cls, value: object) -> ClassResult:
        """Build from parsed JSON; verdicts follow from the counts. Raises InputError."""
        kinds: dict[str, type | tuple[type, ...]] = {
            "numerics": str, "fields": dict, "reference": dict, "members": list, "inputs": int, "control": int,
            "outputs": str, "error": str, "control_error": str, "seconds": (float, int), "verdict": str,
            "certified": bool,
        }  # fmt: skip
        if isinstance(value, dict) and "foreign" in value:
            kinds["foreign"] = dict
        parsed: Any = dict(fields_of(value, kinds, "class"))
        del parsed["verdict"], parsed["certified"]
        if "foreign" in parsed:
            parsed["foreign"] = Foreign.from_json(parsed["foreign"])
        parsed["reference"] = TileConfig.from_json(parsed["reference"])
        parsed["members"] = tuple(Member.from_json(member) for member in parsed["members"])
        return cls(**parsed)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two classes' references side by side: on how many of the inputs their bits differ, each input alone."""

    first: str
    second: str
    different: int

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: object) -> Comparison:
        """Build from parsed JSON. Raises InputError."""
        kinds: dict[str, type] = {"first": str, "second": str, "different": int}
        return cls(**cast(Any, fields_of(value, kinds, "comparison")))


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was seen of one GEMM's numerics classes on one device, on inputs that follow from `seed` alone.

    `unpromised` counts the configs left out because their kernel does not claim to be free of the batch.
    """

    environment: Environment
    gemm: ExpertGemm
    inputs: int
    seed: int
    classes: tuple[ClassResult, ...]
    comparisons: tuple[Comparison, ...] = ()
    unpromised: int = 0

    def __post_init__(self) -> None:
        """Validate; raises InputError."""
        check_int("inputs", self.inputs, 1)
        check_int("seed", self.seed, 0, 1 << 31)

    @property
    def certified(self) -> frozenset[str]:
        """The digests of the classes that are certified."""
        return frozenset(result.numerics for result in self.classes if result.certified)

    @property
    def alike(self) -> tuple[Comparison, ...]:
        """Pairs of classes that are claimed to differ and had equal bits on all inputs. Nothing is merged for it."""
        return tuple(pair for pair in self.comparisons if pair.different == 0)

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "environment": {"digest": self.environment.digest, **self.environment.to_json()},
            "layer": self.gemm.layer.to_json(),
            "label": self.gemm.layer.label,
            "gemm": self.gemm.name,
            "inputs": self.inputs,
            "seed": self.seed,
            "classes": [result.to_json() for result in self.classes],
            "comparisons": [pair.to_json() for pair in self.comparisons],
            "unpromised": self.unpromised,
        }

    @classmethod
    def from_json(cls, value: object) -> Certificate:
        """Build from parsed JSON. Raises InputError."""
        kinds: dict[str, type | tuple[type, ...]] = {
            "environment": dict, "layer": dict, "label": str, "gemm": str, "inputs": int, "seed": int,
            "classes": list, "comparisons": list, "unpromised": int,
        }  # fmt: skip
        parsed: Any = dict(fields_of(value, kinds, "certificate"))
        known = dict(parsed.pop("environment"))
        stated = known.pop("digest", None)
        environment = Environment.from_json(known)
        if stated != environment.digest:
            raise InputError(
                f"certificate: its environment's digest is {stated!r}, its fields give {environment.digest[:12]}"
            )
        del parsed["label"]
        layer = ExpertLayer.from_json(parsed.pop("layer"))
        return cls(
            environment=environment,
            gemm=ExpertGemm(layer=layer, name=parsed.pop("gemm")),
            classes=tuple(ClassResult.from_json(result) for result in parsed.pop("classes")),
            comparisons=tuple(Comparison.from_json(pair) for pair in parsed.pop("comparisons")),
            **parsed,
        )


@dataclass(frozen=True, kw_only=True)
class Change:
    """A class of a GEMM whose reference gave other bits in an earlier run."""

    gemm: ExpertGemm
    numerics: str
    before: str
    now: str

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "layer": self.gemm.layer.label,
            "gemm": self.gemm.name,
            "numerics": self.numerics,
            "before": self.before,
            "now": self.now,
        }


def changes(now: Iterable[Certificate], before: Iterable[Certificate]) -> tuple[tuple[Change, ...], int]:
    """Return the classes whose outputs differ from an earlier run's, and how many classes both runs have.

    Only runs on the same inputs compare: others, and classes that one of them lacks, are left out.
    """
    earlier = {
        (certificate.gemm, certificate.inputs, certificate.seed, result.numerics): result.outputs
        for certificate in before
        for result in certificate.classes
    }
    found, compared = [], 0
    for certificate in now:
        for result in certificate.classes:
            outputs = earlier.get((certificate.gemm, certificate.inputs, certificate.seed, result.numerics))
            if outputs is None:
                continue
            compared += 1
            if outputs != result.outputs:
                found.append(
                    Change(gemm=certificate.gemm, numerics=result.numerics, before=outputs, now=result.outputs)
                )
    return tuple(found), compared
