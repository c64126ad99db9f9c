"""What a config.json's `quantization_config` says of the experts' weights.

Only what decides the weight format is read here; where tensors lie and how they are packed is for who loads them.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tilecast.errors import ModelError
from tilecast.problem import GROUPS

PREFIXES = ("model", "model.language_model", "language_model.model", "transformer", "model.decoder")
CONTAINERS = ("mlp.experts", "block_sparse_moe.experts", "feed_forward.experts", "ffn.experts", "moe.experts")
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"), ("gate_up_proj", "down_proj"))
"""How checkpoints name a decoder layer's experts: what lists of unquantised modules are held against."""

PLAIN = frozenset(string.ascii_letters + string.digits + "._-")
"""What names consist of that are no patterns."""
MAX_IGNORED, MAX_NAME = 100_000, 500
DEFAULT_AWQ_GROUP = 128
METHODS = ("awq", "compressed-tensors", "fp8")
"""The values of `quant_method` that are read."""
E4M3 = ("e4m3", "e4m3fn", "float8_e4m3", "float8_e4m3fn")
"""How configs name the codes that are read; e4m3fnuz, whose codes stand for other numbers, is none of them."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How a checkpoint stores experts: by which method, in what format, and which modules are not quantised.

    `format` is a weight format's name; ending in `_g*` it stands for groups of `group` elements of K (0: all of K),
    which are cut into those of a format where no format has them as they are. `ignored` are names, or patterns
    (`re:…`), of modules that are left dense.
    """

    method: str
    format: str
    group: int = 0
    ignored: tuple[str, ...] = ()
    note: str = ""

    def format_for(self, index: int, hidden: int, intermediate: int) -> str:
        """Return the weight format of decoder layer `index` with these sizes. Raises ModelError."""
        if self.ignored and self._is_ignored(index):
            return "dense"
        if not self.format.endswith("_g*"):
            return self.format
        kind = self.format.removesuffix("_g*")
        if self.group in GROUPS:
            return f"{kind}_g{self.group}"
        common = math.gcd(self.group or hidden, self.group or intermediate)
        found = next((size for size in reversed(GROUPS) if common % size == 0), None)
        if found is None or hidden % (self.group or 1) or intermediate % (self.group or 1):
            raise ModelError(
                f"groups are of {self.group or 'all'} of {hidden} and {intermediate} elements, expected a multiple of "
                f"one of {', '.join(map(str, GROUPS))} that divides both"
            )
        return f"{kind}_g{found}"

    def _is_ignored(self, index: int) -> bool:
        """Whether the experts of decoder layer `index` are left dense. Raises ModelError where only some are."""
        left: set[str] = set()
        for prefix in PREFIXES:
            for container in CONTAINERS:
                name = f"{prefix}.layers.{index}.{container}"
                if self._matches(name) or self._matches(f"{name}.0"):
                    return True
                for names in PROJECTIONS:
                    found = [self._matches(f"{name}.0.{part}") for part in names]
                    if all(found):
                        return True
                    left |= {part for part, is_left in zip(names, found, strict=True) if is_left}
        if left:
            raise ModelError(f"{', '.join(sorted(left))} of layer {index}'s experts are not quantised and others are")
        return False

    def _matches(self, name: str) -> bool:
        names, patterns = _sorted(self.ignored)
        parts = name.split(".")
        # As transformers does: a module, one that it is in, or the end of its name; the same for patterns.
        parents = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        ends = {".".join(parts[count:]) for count in range(len(parts))}
        return not names.isdisjoint(parents | ends) or any(pattern.match(name) for pattern in patterns)


@lru_cache(maxsize=8)
def _sorted(ignored: tuple[str, ...]) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    """Return plain names and patterns apart: lists of hundreds of names are usual. Raises ModelError."""
    ignored = tuple(key if key.startswith("re:") else key.rstrip(".") for key in ignored)
    names = frozenset(key for key in ignored if set(key) <= PLAIN)
    patterns = []
    for key in ignored:
        if key in names:
            continue
        text = key[3:] if key.startswith("re:") else rf"(?:{key})(?=\.|$)"
        try:
            patterns.append(re.compile(text))
        except re.error as error:
            raise ModelError(f"quantization_config leaves out {key!r:.80}, which is no pattern ({error})") from error
    return names, tuple(patterns)


def read_quantization(found: object) -> Stored:
    """Return how the weights are stored that a config's `quantization_config` describes. Raises ModelError."""
    if not isinstance(found, Mapping):
        raise ModelError(f"field quantization_config is {found!r:.40}, expected an object")
    method = str(found.get("quant_method", "unnamed"))
    if method not in METHODS:
        raise ModelError(f"weights are quantised ({method:.40}), which no kernel reads; {', '.join(METHODS)} are read")
    return {"awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8}[method](found)


def _awq(found: Mapping[str, Any]) -> Stored:
    version = str(found.get("version") or found.get("format") or "gemm").lower()
    bits, group = found.get("bits", found.get("w_bit", 4)), found.get("group_size", found.get("q_group_size"))
    group = DEFAULT_AWQ_GROUP if group is None else group
    if version != "gemm":
        raise ModelError(
            f"weights are quantised (awq {version:.20}), expected version gemm: others order words otherwise"
        )
    fits = isinstance(group, int) and group in GROUPS
    if bits != 4 or found.get("zero_point", True) is not True or not fits:
        raise ModelError(
            f"weights are quantised (awq) with bits {bits!r:.20}, group_size {group!r:.20}, zero_point "
            f"{found.get('zero_point', True)!r:.20}; expected bits 4, group_size {', '.join(map(str, GROUPS[:-1]))} or "
            f"{GROUPS[-1]}, zero_point true"
        )
    return Stored(method="awq", format=f"awq_g{group}", ignored=_names(found.get("modules_to_not_convert")))


def _fp8(found: Mapping[str, Any]) -> Stored:
    block, code = found.get("weight_block_size"), str(found.get("fmt", "e4m3"))
    if block not in (None, [128, 128], (128, 128)) or code not in E4M3:
        raise ModelError(
            f"weights are quantised (fp8) with fmt {code!r:.20} and weight_block_size {block!r:.40}; expected e4m3 and "
            "[128, 128] or none"
        )
    name = "fp8_tensor" if block is None else "fp8_block128"
    return Stored(method="fp8", format=name, ignored=_names(found.get("modules_to_not_convert")))


def _compressed(found: Mapping[str, Any]) -> Stored:
    groups = found.get("config_groups")
    entries = list(groups.values()) if isinstance(groups, Mapping) else []
    schemes = [entry.get("weights") if isinstance(entry, Mapping) else None for entry in entries]
    first = schemes[0] if schemes else None
    if not isinstance(first, Mapping) or any(scheme != first for scheme in schemes):
        raise ModelError(f"compressed-tensors has {len(schemes)} schemes for weights, expected one for all modules")
    if first.get("actorder") not in (None, "weight", "static"):
        raise ModelError(f"compressed-tensors orders groups by activation (actorder {first['actorder']!r:.20})")
    name, group = _scheme(first)
    rounded = [entry.get("input_activations") for entry in entries]
    note = (
        "" if not any(rounded) or name.startswith("fp8") else "activations are not quantised, as the kernels read them"
    )
    return Stored(
        method="compressed-tensors", format=name, group=group, ignored=_names(found.get("ignore")), note=note
    )  # fmt: skip


def _scheme(scheme: Mapping[str, Any]) -> tuple[str, int]:
    """Return the format's name, as `Stored` has it, and the group of one scheme of weights. Raises ModelError."""
    kind, bits, strategy = scheme.get("type", "int"), scheme.get("num_bits", 8), scheme.get("strategy") or "tensor"
    symmetric, group, block = scheme.get("symmetric", True), scheme.get("group_size"), scheme.get("block_structure")
    if strategy == "group" and (isinstance(group, bool) or not isinstance(group, int) or not 1 <= group <= 1 << 20):
        raise ModelError(f"compressed-tensors has group_size {group!r:.20}, expected a positive integer")
    if kind == "float" and bits == 8:
        names = {"tensor": "fp8_tensor", "channel": "fp8_channel"}
        if block in ([128, 128], (128, 128)):
            names["block"] = "fp8_block128"
        if str(strategy) in names:
            return names[str(strategy)], 0
    if kind == "int" and strategy in ("group", "channel"):
        grouped = int(group or 0) if strategy == "group" else 0
        if bits == 4:
            return ("int4_g*" if symmetric else "awq_g*"), grouped
        if bits == 8 and symmetric:
            return ("int8_g*", grouped) if grouped else ("int8_channel", 0)
    raise ModelError(
        f"compressed-tensors has {kind!r:.10} weights of {bits!r:.10} bits by {strategy!r:.20} (symmetric "
        f"{symmetric!r:.10}), expected int4 or symmetric int8 by group or channel, or fp8 by tensor, channel or block "
        "of [128, 128]"
    )


def _names(found: Any) -> tuple[str, ...]:
    if found is None:
        return ()
    good = isinstance(found, list) and len(found) <= MAX_IGNORED
    if not good or not all(isinstance(name, str) and len(name) <= MAX_NAME for name in found):
        raise ModelError(f"quantization_config names unquantised modules by {found!r:.60}, expected a list of names")
    return tuple(found)
