from __future__ import annotations

import copy
import ctypes
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cases import CASES, ODD, SMALL, Case, draw_ids, weights_of
from tests.engine.tables import LAYER, decided, weights
from tilecast.engine import at_once, recording
from tilecast.engine.experts import PreparedExperts, prepare_experts
from tilecast.engine.runtime import current, use_table
from tilecast.errors import InputError
from tilecast.kernels.cpu import launch, whole_layer
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.problem import ExpertLayer

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every call that was made at once returned."""
    found: list[bool] = []
    compiled = whole_layer._compiled()

    def watched(*addresses: int) -> int:
        result = compiled(*addresses)
        found.append(result == whole_layer.DONE)
        return result

    monkeypatch.setattr(whole_layer, "_compiled", lambda: watched)
    return found


def experts_of(layer: ExpertLayer) -> PreparedExperts:
    generator = torch.Generator().manual_seed(3)
    up, down = (weights_of(gemm, generator) for gemm in layer.gemms)
    return prepare_experts(
        up.data, down.data, top_k=layer.top_k, activation=layer.activation, gated=layer.gated, bias13=up.bias,
        bias2=down.bias, global_experts=layer.global_experts, dtype=TORCH_DTYPES[layer.dtype],
    )  # fmt: skip


def drawn(layer: ExpertLayer, tokens: int, routing: str = "uniform") -> Operands:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, layer.hidden, generator=generator).to(TORCH_DTYPES[layer.dtype])
    ids = draw_ids(layer, tokens, routing, generator)
    return hidden, ids, torch.rand(tokens, layer.top_k, generator=generator)


def apart(experts: PreparedExperts, given: Operands, **options: torch.dtype) -> torch.Tensor:
    """Return what launches GEMM by GEMM give."""
    experts._at_once._known.clear()
    return experts(*given, **options)


def fill_scratch() -> None:
    """Leave NaN where intermediates, sums and sorted slots of the next call will be."""
    # By address: a buffer that was first taken in inference mode cannot be written to outside of it.
    ctypes.memset(launch.take_scratch("layer", whole_layer.SCRATCH_BYTES).data_ptr(), 0xFF, whole_layer.SCRATCH_BYTES)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_are_those_of_single_launches(case: Case, dtype: str, runs: list[bool]) -> None:
    layer = replace(case.layer, dtype=dtype)
    experts = experts_of(layer)
    given = drawn(layer, case.tokens, case.routing)
    wanted = apart(experts, given)
    fill_scratch()
    assert torch.equal(experts(*given), wanted)
    assert runs == ([True] if case.tokens else [])


@pytest.mark.parametrize("form", ["awq_g32", "int4_g32", "int8_g32", "int8_channel", "fp8_block128", "fp8_tensor"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_quantised_weights(form: str, tokens: int, runs: list[bool]) -> None:
    layer = replace(SMALL, intermediate=128, hidden=256, dtype="bf16", weight_format=form)
    experts = experts_of(layer)
    given = drawn(layer, tokens)
    wanted = apart(experts, given)
    fill_scratch()
    assert torch.equal(experts(*given), wanted) and runs == [True]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("layout", ["gate16", "screen128"])
def test_sparse_experts(layout: str, tokens: int, runs: list[bool]) -> None:
    from tilecast.environment import cpu_environment
    from tilecast.kernels.cpu.sparse import SparseExperts

    kernel, here = SparseExperts(), cpu_environment()
    layer = replace(SMALL, activation="relu", dtype="bf16", hidden=130)
    configs = {"up": kernel._up(layer.up, tokens, here, layout), "down": kernel.default(layer.down, tokens, here)}
    use_table(decided(layer, tokens=(tokens,), choose=lambda gemm, _: configs[gemm.name]))
    experts = experts_of(layer)
    assert experts._up.layout == layout
    given = drawn(layer, tokens)
    wanted = apart(experts, given)
    fill_scratch()
    assert torch.equal(experts(*given), wanted) and runs == [True]


def test_down_waits_for_all_of_up(runs: list[bool]) -> None:
    # One job for one of two threads: the other has nothing to do in up, and the rows of down at once.
    experts = experts_of(ExpertLayer(hidden=4096, intermediate=32, experts=1, top_k=1, dtype="bf16"))
    given = drawn(experts.layer, 8)
    wanted = apart(experts, given)
    for _ in range(20):
        fill_scratch()
        assert torch.equal(experts(*given), wanted)
    assert len(runs) == 20


def test_every_kind_of_call_is_learnt_by_itself(runs: list[bool]) -> None:
    layer = replace(ODD, dtype="bf16")
    experts = experts_of(layer)
    hidden, ids, scales = drawn(layer, 6)
    kinds: list[tuple[Operands, dict[str, torch.dtype]]] = [
        ((hidden, ids, scales), {}),
        ((hidden, ids.int(), scales), {}),
        ((hidden, ids, scales.bfloat16()), {}),
        ((hidden, ids, scales), {"out_dtype": torch.float32}),
        ((hidden.view(2, 3, -1), ids.view(2, 3, -1), scales.view(2, 3, -1)), {}),
        ((hidden[0], ids[0], scales[0]), {}),
        ((hidden[:0], ids[:0], scales[:0]), {}),
    ]
    wanted = [apart(experts, *kind[:1], **kind[1]) for kind in kinds]
    for _ in range(2):
        for (given, options), result in zip(kinds, wanted, strict=True):
            again = experts(*given, **options)
            assert again.dtype == result.dtype and again.shape == given[0].shape and torch.equal(again, result)
    assert runs == [True] * 6  # Each is learnt in the first turn; for no tokens there is nothing to run.


def test_what_was_learnt_of_one_call_lets_nothing_wrong_through() -> None:
    experts = experts_of(replace(SMALL, dtype="bf16"))
    hidden, ids, scales = drawn(experts.layer, 4)
    for _ in range(2):
        experts(hidden, ids, scales)
    wrong: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {
        "hidden is torch.float32": (hidden.float(), ids, scales),
        "hidden is bfloat16 .4, 63.": (hidden[:, :-1], ids, scales),
        "topk_ids is int64 .3, 2.": (hidden, ids[:3], scales),
        "topk_ids is int16": (hidden, ids.short(), scales),
        "topk_weights is float32 .4, 1.": (hidden, ids, scales[:, :1]),
        "topk_weights is int64": (hidden, ids, ids),
        "one device": (hidden.to("meta"), ids, scales),
        "on meta": (hidden, ids.to("meta"), scales),
        "requires grad": (hidden.clone().requires_grad_(), ids, scales),
    }
    for message, given in wrong.items():
        with pytest.raises(InputError, match=message):
            experts(*given)


def test_operands_with_gaps_between_them() -> None:
    experts = experts_of(SMALL)
    given = drawn(SMALL, 6)
    wanted = experts(*given)
    for position in range(3):
        apart_in_memory = list(given)
        apart_in_memory[position] = torch.stack([given[position], given[position]], -1)[..., 0]
        assert not apart_in_memory[position].is_contiguous()
        for _ in range(2):
            assert torch.equal(experts(*apart_in_memory), wanted)


def test_outputs_are_fresh_and_weights_changed_in_place_are_seen(runs: list[bool]) -> None:
    use_table(None)
    w = weights(LAYER)
    experts = prepare_experts(w.w13, w.w2, top_k=2)
    given = drawn(LAYER, 2)
    first = experts(*given)
    second, third = experts(*given), experts(*given)
    second.zero_()
    assert torch.equal(third, first) and len(runs) == 2
    if not experts.packed:
        w.w2.mul_(2)
        assert torch.equal(experts(*given), 2 * first)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda experts: pickle.loads(pickle.dumps(experts))])
def test_a_copy_has_memory_of_its_own(copied: Callable[[PreparedExperts], PreparedExperts], runs: list[bool]) -> None:
    experts = experts_of(SMALL)
    given = drawn(SMALL, 4)
    wanted = experts(*given)
    experts(*given)
    other = copied(experts)
    experts._up.data.fill_(torch.nan)
    assert experts(*given).isnan().all()
    assert all(torch.equal(other(*given), wanted) for _ in range(2))
    assert len(runs) == 3


def test_another_default_device_is_not_where_results_go(runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = experts_of(SMALL)
    given = drawn(SMALL, 3)
    wanted = experts(*given)
    experts._at_once._known.clear()
    monkeypatch.setattr(launch, "_buffers", launch._Buffers())
    with torch.device("meta"):
        for options in ({}, {}, {"out_dtype": torch.float32}, {"out_dtype": torch.float32}):
            assert torch.equal(experts(*given, **options).to(wanted.dtype), wanted)
    assert runs == [True, True]


def test_outputs_made_before_are_nobody_elses(runs: list[bool]) -> None:
    experts, other = experts_of(SMALL), experts_of(replace(SMALL, intermediate=64))
    given = drawn(SMALL, 3)
    wanted = experts(*given), other(*given)
    assert all(
        torch.equal(one, expected)
        for _ in range(at_once.SPARES)
        for one, expected in zip((experts(*given), other(*given)), wanted, strict=True)
    )
    held = [each(*given) for _ in range(2 * at_once.SPARES) for each in (experts, other)]
    assert len({tensor.data_ptr() for tensor in held}) == len(held)
    assert all(torch.equal(tensor, wanted[place % 2]) for place, tensor in enumerate(held))
    with torch.inference_mode():
        experts(*given)
        assert experts(*given).is_inference()
    assert not experts(*given).is_inference()
    assert not [t for kept in at_once._spares.values() for t in kept if any(t is h for h in held)]
    large = drawn(SMALL, 200)
    assert torch.equal(experts(*large), experts(*large)) and len(runs) > 4 * at_once.SPARES


def test_another_number_of_threads(runs: list[bool]) -> None:
    experts = experts_of(ODD)
    given = drawn(ODD, 9)
    wanted = experts(*given)
    results = []
    for threads in (2, 1, 1, 2, 2):
        torch.set_num_threads(threads)
        results.append(experts(*given))
    assert all(torch.equal(result, wanted) for result in results)
    assert runs == [True, False, True, False, True]


def test_calls_from_several_python_threads() -> None:
    experts = experts_of(replace(ODD, dtype="bf16"))
    given = [drawn(experts.layer, tokens) for tokens in range(1, 9)]
    wanted = [apart(experts, operands) for operands in given]
    wrong: list[int] = []

    def serve(number: int) -> None:
        torch.set_num_threads(2)
        for turn in range(60):
            place = (number + turn) % len(given)
            if not torch.equal(experts(*given[place]), wanted[place]):
                wrong.append(place)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len({kind[-1] for kind in experts._at_once._known}) > 1


def test_many_tokens_are_launched_gemm_by_gemm(runs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = experts_of(SMALL)
    given = drawn(SMALL, at_once.MAX_TOKENS + 1)
    assert torch.equal(experts(*given), experts(*given)) and not runs
    monkeypatch.setattr(whole_layer, "SCRATCH_BYTES", 4096)
    given = drawn(SMALL, 9)
    assert torch.equal(experts(*given), experts(*given)) and not runs


def test_misses_are_counted_and_hits_are_not() -> None:
    use_table(None)
    experts = experts_of(SMALL)
    before = experts.runtime.miss_count
    for _ in range(5):
        experts(*drawn(SMALL, 3))
    assert experts.runtime.miss_count - before == 5
    use_table(decided(SMALL, tokens=(3,)))
    experts = experts_of(SMALL)
    for _ in range(5):
        experts(*drawn(SMALL, 3))
    assert experts.runtime.miss_count == 0


def test_recorded_calls_are_counted(tmp_path: Path, runs: list[bool]) -> None:
    experts = experts_of(SMALL)
    given = drawn(SMALL, 3)
    for _ in range(2):
        experts(*given)
    assert runs == [True]
    recording.start(str(tmp_path / "seen.json"))
    try:
        experts(*given)
        assert runs == [True]
    finally:
        recording.stop()
    assert (tmp_path / "seen.json").exists()


def test_a_kernel_that_launches_otherwise_is_asked_every_time(
    monkeypatch: pytest.MonkeyPatch, runs: list[bool]
) -> None:
    asked: list[str] = []

    class Watched(MoeGemm):
        def launch(self, *given: object) -> None:
            asked.append(self.name)
            super().launch(*given)  # type: ignore[arg-type]  # passed on as given

    use_table(None)
    here = current("cpu")
    monkeypatch.setitem(here.registry._kernels, MoeGemm().name, Watched())
    monkeypatch.setattr(here, "_anchors", {})
    monkeypatch.setattr(here, "_missed", {})
    experts = experts_of(SMALL)
    for _ in range(3):
        experts(*drawn(SMALL, 3))
    assert len(asked) == 6 and not runs
