"""Activations on float32 vectors, from explicit multiply-adds only, so that every lane's bits are fixed."""

from __future__ import annotations

from llvmlite import ir

from tilecast.kernels.cpu._build import Emit, Value
from tilecast.kernels.reference import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT

# exp(r) on |r| ≤ ln2/2: Cephes expf's polynomial (S. Moshier), relative error below 2e-8.
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
ROUND_MAGIC = 12582912.0  # 1.5 · 2**23: adding it leaves the nearest integer in the low mantissa bits
EXP_LOW, EXP_HIGH = -87.0, 88.0

# erf(x) = x · P(x²) / Q(x²) on |x| ≤ 4, a float32 rational minimax fit (as published with Eigen and XLA).
ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
         -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
         -1.42647390514189e-02)  # fmt: skip


def _float32(value: float) -> float:
    """Round a constant to float32: llvmlite refuses literals that float32 cannot hold."""
    import struct

    return float(struct.unpack("f", struct.pack("f", value))[0])


def const(emit: Emit, value: float) -> Value:
    return ir.Constant(emit.floats, [_float32(value)] * emit.lanes)


def clamp(emit: Emit, x: Value, low: float | None, high: float | None) -> Value:
    """Clamp lanes; NaN stays NaN, because a comparison with it is false."""
    if low is not None:
        x = emit.select_lanes("<", x, const(emit, low), const(emit, low), x)
    if high is not None:
        x = emit.select_lanes(">", x, const(emit, high), const(emit, high), x)
    return x


def polynomial(emit: Emit, x: Value, coefficients: tuple[float, ...]) -> Value:
    total = const(emit, coefficients[0])
    for coefficient in coefficients[1:]:
        total = emit.fma(total, x, const(emit, coefficient))
    return total


def exp(emit: Emit, x: Value) -> Value:
    """exp(x), x clamped to where the result is a normal number; NaN gives NaN."""
    x = clamp(emit, x, EXP_LOW, EXP_HIGH)
    shifted = emit.fma(x, const(emit, LOG2_E), const(emit, ROUND_MAGIC))
    n = emit.fsub(shifted, const(emit, ROUND_MAGIC))
    r = emit.fma(n, const(emit, -LN2_HIGH), x)
    r = emit.fma(n, const(emit, -LN2_LOW), r)
    value = emit.fma(emit.fmul(r, r), polynomial(emit, r, EXP), emit.fadd(r, const(emit, 1.0)))
    # The mantissa's low bits hold n; moved into the exponent field they are a scale of 2**n. Done on bits,
    # because converting a NaN to an integer has no defined result.
    integer = emit.bitcast(shifted, emit.words)
    scale = emit.shl(emit.add(integer, emit.splat(127, emit.words)), emit.splat(23, emit.words))
    return emit.fmul(value, emit.to_float(scale))


def sigmoid_times(emit: Emit, x: Value, scaled: Value) -> Value:
    """x · sigmoid(scaled)."""
    negative = emit.fsub(const(emit, -0.0), scaled)
    return emit.fdiv(x, emit.fadd(const(emit, 1.0), exp(emit, negative)))


def erf(emit: Emit, x: Value) -> Value:
    x = clamp(emit, x, -4.0, 4.0)
    square = emit.fmul(x, x)
    p = emit.fmul(x, polynomial(emit, square, ERF_P))
    return emit.fdiv(p, polynomial(emit, square, ERF_Q))


def activate(emit: Emit, name: str, gate: Value, up: Value | None) -> Value:
    """Apply an activation as `tilecast.kernels.reference.activate` defines it, in float32."""
    if name == "swiglu_oai":
        gate = clamp(emit, gate, None, SWIGLU_OAI_LIMIT)
        value = sigmoid_times(emit, gate, emit.fmul(gate, const(emit, SWIGLU_OAI_ALPHA)))
        if up is not None:
            up = emit.fadd(clamp(emit, up, -SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT), const(emit, 1.0))
    elif name == "silu":
        value = sigmoid_times(emit, gate, gate)
    elif name == "gelu":
        half = emit.fmul(gate, const(emit, 0.5))
        value = emit.fma(half, erf(emit, emit.fmul(gate, const(emit, 0.7071067811865476))), half)
    elif name == "gelu_tanh":
        # 0.5 · (1 + tanh(y)) = sigmoid(2y), y = sqrt(2/π) · (x + 0.044715 x³)
        cube = emit.fmul(emit.fmul(gate, gate), gate)
        inner = emit.fma(cube, const(emit, 0.044715), gate)
        value = sigmoid_times(emit, gate, emit.fmul(inner, const(emit, 2 * 0.7978845608028654)))
    elif name == "identity":
        value = gate
    else:
        value = clamp(emit, gate, 0.0, None)
        if name == "relu2":
            value = emit.fmul(value, value)
        if up is not None:
            if name == "drelu":
                up = clamp(emit, up, 0.0, None)
            # +0 whatever the up value is, even −1 or infinity: what is dead need not be computed to know its bits.
            return emit.select_lanes("<=", gate, const(emit, 0.0), const(emit, 0.0), emit.fmul(value, up))
    return value if up is None else emit.fmul(value, up)
