"""Layers under torch.compile and CUDA graphs: one graph, any token count, the eager call's bits."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.engine.tables import LAYER, decided, default_config, inputs, weights
from tests.torch_kernel import TorchKernel
from tilecast.engine import op
from tilecast.engine.experts import MoeBlock, PreparedExperts, prepare_experts
from tilecast.engine.functional import fused_experts
from tilecast.engine.runtime import misses, use_table
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment
from tilecast.errors import InputError, UsageError
from tilecast.evidence import TuningTable
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertLayer

TOKENS = (5, 7, 30, 2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Call = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_runtime(kernel: TorchKernel | None = None) -> Runtime:
    """Return a runtime whose only kernel reads plain weights, as those on GPUs do."""
    return Runtime(TuningTable(), environment=cpu_environment(), registry=Registry((kernel or TorchKernel(),)))


def prepared(layer: ExpertLayer, seed: int = 0, runtime: Runtime | None = None) -> PreparedExperts:
    w = weights(layer, seed)
    return prepare_experts(
        w.w13, w.w2, top_k=layer.top_k, activation=layer.activation, gated=layer.gated, bias13=w.bias13,
        bias2=w.bias2, runtime=runtime,
    )  # fmt: skip


def functional(layer: ExpertLayer) -> Call:
    w = weights(layer)

    def call(hidden: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return fused_experts(
            hidden, w.w13, w.w2, ids, scales, activation=layer.activation, gated=layer.gated, bias13=w.bias13,
            bias2=w.bias2,
        )  # fmt: skip

    return call


def check_any_tokens(call: Call, layer: ExpertLayer, backend: str) -> None:
    """Hold the compiled call to the eager one's bits at several token counts, compiled once."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for tokens in TOKENS:
        operands = inputs(layer, tokens, seed=tokens)
        for tensor in operands:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert torch.equal(compiled(*operands), call(*operands)), tokens
    assert counter.frame_count == 1


BIASED = replace(LAYER, dtype="bf16", bias=True, gated=False, activation="relu2")


@pytest.mark.parametrize(("layer", "backend"), [(LAYER, "eager"), (LAYER, "aot_eager"), (BIASED, "aot_eager")], ids=str)
def test_one_graph_serves_any_token_count_with_the_eager_bits(layer: ExpertLayer, backend: str) -> None:
    use_table(None)
    check_any_tokens(prepared(layer), layer, backend)
    check_any_tokens(functional(layer), layer, backend)
    check_any_tokens(prepared(layer, runtime=plain_runtime()), layer, backend)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_inductor_keeps_the_bits() -> None:
    use_table(None)
    call = prepared(LAYER)
    check_any_tokens(lambda h, i, s: call(h.relu(), i, s * 2) * 3, LAYER, "inductor")


def test_no_and_one_token_compile_too() -> None:
    use_table(None)
    call = prepared(LAYER)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for tokens in (0, 1, 3):
        operands = inputs(LAYER, tokens)
        assert torch.equal(compiled(*operands), call(*operands))
    hidden, ids, scales = inputs(LAYER, 6)
    shaped = compiled(hidden.view(2, 3, 64), ids, scales)
    assert torch.equal(shaped, call(hidden, ids, scales).view(2, 3, 64))


def test_a_partial_sum_stays_float32_and_outputs_are_fresh() -> None:
    use_table(None)
    layer = replace(LAYER, dtype="bf16")
    call, operands = prepared(layer), inputs(layer, 4)
    compiled = torch.compile(
        lambda *given: call(*given, out_dtype=torch.float32), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    first = compiled(*operands)
    assert first.dtype == torch.float32 and torch.equal(first, call(*operands, out_dtype=torch.float32))
    kept = first.clone()
    compiled(*operands).zero_()
    assert torch.equal(first, kept)


@pytest.mark.parametrize(("scoring", "backend"), [("softmax", "eager"), ("sigmoid", "aot_eager")])
def test_a_whole_block_is_one_graph(backend: str, scoring: str) -> None:
    use_table(None)
    w = weights(LAYER)
    router = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    block = MoeBlock(router, w.w13, w.w2, top_k=2, scoring=scoring)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for tokens in TOKENS:
        hidden = inputs(LAYER, tokens)[0]
        torch._dynamo.mark_dynamic(hidden, 0)
        assert torch.equal(compiled(hidden), block(hidden))
    assert counter.frame_count == 1


def test_layers_on_plain_weights_share_one_graph() -> None:
    """Compiled layer by layer, a model must not run into the limit on compilations."""
    runtime = plain_runtime()
    layers = [prepared(LAYER, seed, runtime) for seed in range(2 * torch._dynamo.config.recompile_limit)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda experts, *given: experts(*given), fullgraph=True, backend=counter)
    operands = inputs(LAYER, 3)
    for experts in layers:
        assert torch.equal(compiled(experts, *operands), experts(*operands))
    assert counter.frame_count == 1


def test_compiled_code_launches_on_the_prepared_weights_themselves() -> None:
    """What kernels keep with a stack of weights must be found again, not made anew in every call."""

    class Keeping(TorchKernel):
        def up(self, config, hidden, weights, route, out):
            weights.plans["calls"] = weights.plans.get("calls", 0) + 1
            super().up(config, hidden, weights, route, out)

    call = prepared(replace(LAYER, bias=True), runtime=plain_runtime(Keeping()))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        compiled(*inputs(LAYER, 4, seed))
    assert call._up.plans["calls"] == 3


def test_the_table_is_looked_up_when_the_graph_runs() -> None:
    use_table(None)
    compiled, operands = torch.compile(functional(LAYER), fullgraph=True, backend="aot_eager"), inputs(LAYER, 3)
    wanted = compiled(*operands)
    assert [(m.tokens, m.count) for m in misses()] == [(3, 1)]
    use_table(decided(LAYER, choose=lambda g, t: default_config(g, t).with_params(layout="panel32")), miss="error")
    assert torch.equal(compiled(*operands), wanted)
    assert misses() == ()
    # Prepared experts keep their own.
    call = prepared(LAYER)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    use_table(None)
    assert torch.equal(compiled(*operands), wanted)
    assert misses() == ()


def test_a_graph_that_outlives_its_packed_experts_says_so() -> None:
    use_table(None)
    call, operands = prepared(LAYER), inputs(LAYER, 3)
    kept: list[Callable[[], Any]] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Call:
        def run(*given: torch.Tensor) -> Any:
            kept.append(lambda: graph(*given))
            return graph(*given)

        return run

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*operands), kept[0]()[0])
    handle = call._handle
    del call, compiled
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(UsageError, match=rf"handle {handle}\) were deleted; keep them"):
        kept[0]()
    assert prepared(LAYER)._handle > handle


def test_operands_that_do_not_fit_are_still_input_errors() -> None:
    use_table(None)
    call, (hidden, ids, scales) = prepared(LAYER), inputs(LAYER, 6)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    with pytest.raises(InputError, match=r"hidden is float32 \(6, 63\)"):
        compiled(hidden[:, 1:], ids, scales)
    with pytest.raises(Exception, match="forward only"):
        compiled(hidden.clone().requires_grad_(), ids, scales)
    with torch.no_grad():
        out = compiled(hidden.clone().requires_grad_(), ids, scales.clone().requires_grad_())
    assert torch.equal(out, call(hidden, ids, scales)) and not out.requires_grad


def test_parameters_compile_without_becoming_part_of_a_graph() -> None:
    use_table(None)
    w, operands = weights(LAYER), inputs(LAYER, 6)
    w13, w2 = torch.nn.Parameter(w.w13), torch.nn.Parameter(w.w2)
    compiled = torch.compile(
        lambda h, i, s: fused_experts(h, w13, w2, i, s), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    out = compiled(*operands)
    assert not out.requires_grad and torch.equal(out, functional(LAYER)(*operands))


def test_the_operators_keep_torchs_rules() -> None:
    use_table(None)
    w, operands = weights(LAYER), inputs(LAYER, 6)
    packed, plain = prepared(LAYER), prepared(LAYER, runtime=plain_runtime())
    none = (None, None, None, None)
    attributes = ("silu", True, 4, torch.float32)
    kept = (plain._up.data, plain._down.data, None, None)
    for given in (
        (*operands, *none, packed._handle, *attributes),
        (*operands, *kept, plain._handle, *attributes),
        (*operands, w.w13, w.w2, None, None, op.IN_USE, *attributes),
    ):
        torch.library.opcheck(op.experts, given)
    for scoring in ("softmax", "sigmoid"):
        torch.library.opcheck(op.route, (operands[0], torch.randn(4, 64), 2, scoring, True))


# On GPUs -----------------------------------------------------------------------------------------------------


def on_gpu(device: str = "cuda", tokens: int = 8) -> tuple[PreparedExperts, PreparedExperts, list[torch.Tensor]]:
    """Return a bfloat16 layer on the CPU and on a GPU, and operands on the GPU."""
    layer = replace(LAYER, hidden=128, intermediate=128, dtype="bf16")
    w = weights(layer)
    experts = prepare_experts(w.w13.to(device), w.w2.to(device), top_k=2)
    return prepared(layer), experts, [tensor.to(device) for tensor in inputs(layer, tokens)]


def assert_like_the_cpu(cpu: PreparedExperts, out: torch.Tensor, operands: list[torch.Tensor]) -> None:
    torch.testing.assert_close(out.cpu(), cpu(*(tensor.cpu() for tensor in operands)), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 8, 200])
def test_a_captured_call_replays_with_other_inputs(tokens: int) -> None:
    use_table(None)
    cpu, experts, operands = on_gpu(tokens=tokens)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        experts(*operands)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(*operands)
    for seed in (1, 2):
        for tensor, new in zip(operands, inputs(experts.layer, tokens, seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_like_the_cpu(cpu, out, operands)
        assert torch.equal(out, experts(*operands))


@pytest.mark.gpu
@needs_gpu
def test_a_call_runs_on_the_current_stream() -> None:
    use_table(None)
    cpu, experts, operands = on_gpu()
    wanted = experts(*operands)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    hidden = torch.zeros_like(operands[0])
    with torch.cuda.stream(stream):
        # The inputs are ready long after the call is queued: on another stream it would read zeros.
        torch.cuda._sleep(50_000_000)
        hidden.copy_(operands[0])
        out = experts(hidden, *operands[1:])
    stream.synchronize()
    assert torch.equal(out, wanted)
    assert_like_the_cpu(cpu, out, operands)


@pytest.mark.gpu
@needs_gpu
def test_a_compiled_call_on_a_gpu() -> None:
    use_table(None)
    _, experts, _ = on_gpu()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    for tokens in TOKENS:
        operands = [tensor.cuda() for tensor in inputs(experts.layer, tokens)]
        for tensor in operands:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert torch.equal(compiled(*operands), experts(*operands))
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_runs_on_its_own_gpu_not_the_current_one() -> None:
    use_table(None)
    cpu, experts, operands = on_gpu("cuda:1")
    with torch.cuda.device(0):
        out = experts(*operands)
    assert out.device == torch.device("cuda", 1)
    assert_like_the_cpu(cpu, out, operands)
