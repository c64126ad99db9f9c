"""What a compiled GPU kernel does, read from its assembly text (PTX or amdgcn) and its ELF file.

Nothing here imports a compiler. Sources of the formats: NVIDIA, "PTX ISA" (opcodes, shapes, K per tcgen05 kind);
LLVM, "User Guide for AMDGPU Backend" (code object metadata, MFMA mnemonics); System V ABI (ELF-64).
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from dataclasses import dataclass

_TCGEN05_K = {"tf32": 8, "f16": 16, "i8": 32, "f8f6f4": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}
_FLOAT = r"(?:f16|bf16|f32|f64)(?:x2)?\b"
# Only what rounds: moves, conversions, comparisons, signs, minima and maxima are no arithmetic.
_PTX_ROUNDING = "add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh"
_GCN_ROUNDING = (
    "add|sub|subrev|mul|fma|fmac|fmaak|fmamk|fma_mix|mac|mad|dot2|dot2c|"
    "div_scale|div_fmas|div_fixup|rcp|rcp_iflag|sqrt|rsq|exp|log|sin|cos"
)
_PTX_FLOAT_OP = re.compile(rf"(?<![\w.%$])(?:{_PTX_ROUNDING})\.(?:[a-z]\w*\.)*?{_FLOAT}")
_GCN_FLOAT_OP = re.compile(rf"^\s*v_(?:pk_)?(?:{_GCN_ROUNDING})(?:_legacy)?_(?:f16|bf16|f32|f64)(?:_|\b)")
_PTX_MMA = re.compile(
    r"(?<![\w.%$])(wgmma|tcgen05|mma)\.(?:mma_async\.|mma\.|sp\.|sync\.|aligned\.|ws\.)+"
    r"(?:(?P<shape>m\d+n\d+k\d+)|cta_group::\d)(?P<rest>(?:\.[\w:]+)*)"
)
_GCN_MMA = re.compile(
    r"^\s*v_(mfma|smfmac)_(?:scale_)?(?P<out>f32|f64|i32)_(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)_?(?P<rest>\w+)"
)
_PTX_COPY = re.compile(r"(?<![\w.%$])(cp\.async(?:\.bulk(?:\.tensor)?)?)\.(?:\dd\.|ca\.|cg\.)?(?:shared|global)\b")
_GCN_COPY = re.compile(r"^\s*(?:buffer_load_\w+ .*\blds\b|global_load_lds_\w+)")
_LABEL = re.compile(r"^\s*([$.\w]+):")
_PTX_BRANCH = re.compile(r"(?<![\w.%$])bra(?:\.uni)?\s+([$.\w]+)")
_GCN_BRANCH = re.compile(r"^\s*s_(?:c?branch)\w*\s+([.\w]+)")


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """What the analysis counts in one kernel.

    mma counts matrix instructions of the whole kernel by kind, shape and types (`wgmma m64n256k16 f32.bf16.bf16`).
    mma_k is their reduction length in elements, 0 without any; where it differs, that of the most frequent one.
    float_ops and copies are counts within the innermost loop that contains matrix instructions: arithmetic that
    rounds, and asynchronous copies into shared memory by kind. Without such a loop they are zero and empty.
    """

    mma: dict[str, int]
    mma_k: int
    float_ops: int
    copies: dict[str, int]


def read_ptx(text: str) -> Instructions:
    """Count the instructions of a kernel's PTX."""
    lines = [line.partition("//")[0] for line in text.splitlines()]
    found = [[_ptx_mma(match) for match in _PTX_MMA.finditer(line)] for line in lines]
    loop = _mma_loop(lines, [bool(each) for each in found], _PTX_BRANCH)
    copies = Counter(match[1] for line in lines[loop] for match in _PTX_COPY.finditer(line))
    return _instructions(found, sum(len(_PTX_FLOAT_OP.findall(line)) for line in lines[loop]), copies)


def read_gcn(text: str) -> Instructions:
    """Count the instructions of a kernel's amdgcn assembly."""
    lines = [line.partition(";")[0] for line in text.splitlines()]
    found = [[_gcn_mma(match) for match in _GCN_MMA.finditer(line)] for line in lines]
    loop = _mma_loop(lines, [bool(each) for each in found], _GCN_BRANCH)
    copies = Counter("load_lds" for line in lines[loop] if _GCN_COPY.match(line))
    return _instructions(found, sum(bool(_GCN_FLOAT_OP.match(line)) for line in lines[loop]), copies)


def _instructions(found: list[list[tuple[str, int]]], float_ops: int, copies: Counter[str]) -> Instructions:
    every = Counter(mma for line in found for mma in line)
    return Instructions(
        mma=dict(sorted(Counter(name for line in found for name, _ in line).items())),
        mma_k=every.most_common(1)[0][0][1] if every else 0,
        float_ops=float_ops,
        copies=dict(sorted(copies.items())),
    )


def _ptx_mma(match: re.Match[str]) -> tuple[str, int]:
    """Return the instruction's name and its K."""
    kind = {"wgmma": "wgmma", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}[match[1]]
    rest = match["rest"].strip(".")
    if match["shape"] is None:
        # The shape is in a register here; the kind of the operands fixes K.
        types = rest.partition("kind::")[2].partition(".")[0]
        return f"{kind} {types}", _TCGEN05_K.get(types, 0)
    types = ".".join(part for part in rest.split(".") if re.fullmatch(r"[a-z]*[fsu]\d+|e\dm\d|b1|tf32", part))
    return f"{kind} {match['shape']} {types}", int(match["shape"].partition("k")[2])


def _gcn_mma(match: re.Match[str]) -> tuple[str, int]:
    shape = f"m{match['m']}n{match['n']}k{match['k']}"
    return f"{match[1]} {shape} {match['out']}.{match['rest']}", int(match["k"])


def _mma_loop(lines: list[str], has_mma: list[bool], branch: re.Pattern[str]) -> slice:
    """Return the lines of the shortest loop with a matrix instruction in it; of equally long ones the first.

    A loop reaches from a label to the last branch back to it: compilers lay its blocks out together.
    """
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = at
        for target in branch.findall(line):
            if target in labels:
                ends[labels[target]] = at
    loops = [(end - start, start, end) for start, end in ends.items() if any(has_mma[start : end + 1])]
    if not loops:
        return slice(0, 0)
    _, start, end = min(loops)
    return slice(start, end + 1)


def ptxas_usage(log: str) -> dict[str, int]:
    """Return registers, stack, and spill bytes of `ptxas -v`'s report. Raises ValueError where it has none."""
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if stack is None or registers is None:
        raise ValueError("ptxas did not report registers and spills")
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(stack[1]),
        "spill_bytes": int(stack[2]) + int(stack[3]),
    }


def ptx_threads(text: str) -> int:
    """Return the threads of a program as the kernel's PTX demands them, 0 where it does not."""
    found = re.search(r"\.reqntid\s+(\d+)", text)
    return int(found[1]) if found else 0


def gcn_usage(text: str) -> dict[str, int]:
    """Return registers, stack, spills, shared memory and threads of the code object's metadata."""

    def field(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"the code object's metadata has no {name}")
        return int(found[1])

    stack = field("private_segment_fixed_size")
    return {
        "registers": field("vgpr_count"),
        "stack_bytes": stack,
        # Without private memory a spilled register went to an accumulation register, not to memory.
        "spill_bytes": 4 * field("vgpr_spill_count") if stack else 0,
        "shared_bytes": field("group_segment_fixed_size"),
        "threads": field("max_flat_workgroup_size"),
    }


def machine_code(elf: bytes) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of an ELF file's code sections; names and debug data do not count.

    Raises ValueError for what is no ELF file with code.
    """
    code = _code_sections(elf)
    if not code:
        raise ValueError("the compiled file has no code section")
    total = hashlib.sha256()
    for section in code:
        total.update(len(section).to_bytes(8, "little") + section)
    return sum(map(len, code)), total.hexdigest()


def _code_sections(elf: bytes) -> list[bytes]:
    """Return the contents of `.text` and `.text.<function>`, in the file's order."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("the compiled file is no little-endian 64-bit ELF file")
    try:
        (offset,) = struct.unpack_from("<Q", elf, 0x28)
        size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
        headers = [struct.unpack_from("<IIQQQQ", elf, offset + size * i) for i in range(count)]
        name_table = headers[names][4]
    except (struct.error, IndexError):
        raise ValueError("the compiled file's section table is broken") from None
    found = []
    for name, _, _, _, start, length in headers:
        text = elf[name_table + name : elf.index(b"\0", name_table + name)]
        if text == b".text" or text.startswith(b".text."):
            found.append(elf[start : start + length])
    return found
