"""Models with experts on two devices: the tokens of one device, weights where they are to be, and errors of one line.

Without a GPU both devices are the CPU; the tests marked `gpu` run the same on a real one.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import quantized_checkpoints as checkpoints
from tests.engine.tables import decided
from tests.quantized_checkpoints import AWQ_CONFIG, quantized_twins
from tests.tiny_models import save_tiny
from tilecast.engine import recording, runtime
from tilecast.engine.adapted import adapted_of
from tilecast.engine.generate import generate
from tilecast.engine.load import Loaded, load_model
from tilecast.engine.placed_choice import read_choice
from tilecast.engine.placed_model import placed_modules
from tilecast.engine.transformers import experts_modules, prepare_model
from tilecast.errors import DeviceError, InputError, TilecastError, UsageError
from tilecast.evidence import TuningTable

transformers = pytest.importorskip("transformers")

PROMPTS = [[5, 6, 7, 8, 9], [11, 3, 60]]
FAMILIES = ("mixtral", "gpt_oss")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("awq")
    return quantized_twins(folder, "mixtral", checkpoints.awq(), AWQ_CONFIG, intermediate_size=96)


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    yield
    recording.stop()


def greedy(loaded: Loaded) -> list[tuple[int, ...]]:
    return [one.ids for one in generate(loaded, PROMPTS, max_new_tokens=4, batch=2).outputs]


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(torch.tensor(PROMPTS[:1], device=loaded.device)).logits  # type: ignore[no-any-return]


def near_of(loaded: Loaded) -> list[tuple[int, ...]]:
    return [state.place.near_experts for state in placed_modules(loaded.model)]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("mixtral", "float32"),
        ("gpt_oss", "bfloat16"),
        pytest.param("mixtral", "bfloat16", marks=pytest.mark.long),
        pytest.param("gpt_oss", "float32", marks=pytest.mark.long),
    ],
)
def test_placed_experts_give_the_tokens_of_one_device(folders: dict[str, Path], family: str, dtype: str) -> None:
    wanted = load_model(folders[family], dtype=dtype, device="cpu")
    tokens, bits = greedy(wanted), logits(wanted)
    for asked in (3, {0: [1, 4, 6], 1: []}):
        found = load_model(folders[family], dtype=dtype, device="cpu", gpu_experts=asked)
        assert len(placed_modules(found.model)) == 2
        assert greedy(found) == tokens
        assert torch.equal(logits(found), bits)


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (5, "bfloat16"),
        pytest.param(0, "bfloat16", marks=pytest.mark.long),
        pytest.param(0, "float32", marks=pytest.mark.long),
        pytest.param(5, "float32", marks=pytest.mark.long),
    ],
)
def test_quantised_experts_give_the_tokens_of_one_device(awq: tuple[Path, Path], number: int, dtype: str) -> None:
    wanted = load_model(awq[0], dtype=dtype, device="cpu")
    found = load_model(awq[0], dtype=dtype, device="cpu", gpu_experts=number)
    assert near_of(found) == [tuple(range(number))] * 2
    assert greedy(found) == greedy(wanted) and torch.equal(logits(found), logits(wanted))


def test_one_line_says_what_is_where(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tilecast"):
        load_model(folders["mixtral"], device="cpu", gpu_experts=3)
    (line,) = [record.getMessage() for record in caplog.records if "near" in record.getMessage()]
    assert line.startswith(
        "3 of 8 experts of each of 2 layers are near (cpu), the first ones, as no counts were given; the others are "
        "far (cpu); there is no GPU here"
    )
    assert line.endswith("both parts run on the CPU") and "\n" not in line


def test_weights_are_held_once(folders: dict[str, Path], awq: tuple[Path, Path]) -> None:
    for folder in (folders["mixtral"], folders["gpt_oss"], awq[0]):
        model = load_model(folder, device="cpu", gpu_experts=3).model
        for _, module in experts_modules(model):
            for name in adapted_of(module).form.names[:2]:  # type: ignore[union-attr]
                parameter = module.get_parameter(name)
                assert parameter.untyped_storage().nbytes() == parameter.itemsize, "the module keeps its own weights"


def test_the_hottest_of_a_recording_are_near(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "seen.json"
    monkeypatch.setenv("TM_GEMM_RECORD", str(path))
    wanted = greedy(load_model(folders["mixtral"], device="cpu"))
    recording.stop()
    monkeypatch.delenv("TM_GEMM_RECORD")
    loads = [load["slots"] for load in json.loads(path.read_text())["layers"][0]["experts"]]
    found = load_model(folders["mixtral"], device="cpu", gpu_experts=read_choice(2, path))
    for slots, near in zip(loads, near_of(found), strict=True):
        assert sorted(slots[expert] for expert in near) == sorted(slots)[-2:]
    assert near_of(found)[0] != near_of(found)[1], "the layers should differ, or this shows nothing"
    assert greedy(found) == wanted
    # Without a number: as many as fit, which is all of them here.
    assert near_of(load_model(folders["mixtral"], device="cpu", gpu_experts=path)) == [tuple(range(8))] * 2


def test_auto_leaves_a_reserve(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expert = 4 * 3 * 64 * 48
    for more, number in ((2 * 4 * expert, 4), (2 * 4 * expert - 1, 3), (-(1 << 29), 0)):
        monkeypatch.setattr("tilecast.engine.placed_model.free_bytes", lambda device, more=more: (1 << 30) + more)
        assert near_of(load_model(folders["mixtral"], device="cpu", gpu_experts="auto"))[0] == tuple(range(number))


def test_experts_that_run_their_own_code_stay_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save_tiny("mixtral", tmp_path))
    for _, module in experts_modules(model)[:1]:
        module.act_fn = torch.nn.Tanh()
    model.set_experts_implementation("eager")
    ids = torch.tensor(PROMPTS[:1])
    wanted = model(ids).logits
    model.config._experts_implementation = "tilecast"
    adapted = prepare_model(model, gpu_experts=3)
    assert [type(adapted_of(module)).__name__ for _, module in experts_modules(model)] == ["Adapted", "PlacedAdapted"]
    assert "stays whole, as its own code runs between the GEMMs" in caplog.text
    assert len(adapted.modules[0].layers) == 2
    assert torch.allclose(model(ids).logits, wanted, atol=1e-4)


def test_a_model_in_memory_is_placed_and_placed_again(folders: dict[str, Path]) -> None:
    wanted = load_model(folders["mixtral"], device="cpu")
    loaded = load_model(folders["mixtral"], device="cpu")
    for number in (2, 6):
        adapted = prepare_model(loaded.model, gpu_experts=number)
        assert near_of(loaded) == [tuple(range(number))] * 2
        assert sorted(layer.experts for layer in adapted.layers) == [2, 6]
        assert greedy(loaded) == greedy(wanted)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "awq"])
def test_weights_come_back_as_they_were(folders: dict[str, Path], awq: tuple[Path, Path], kind: str) -> None:
    folder, plain = awq if kind == "awq" else (folders[kind], folders[kind])
    loaded = load_model(folder, device="cpu", gpu_experts={0: [7, 2], 1: [0]})
    eager = load_model(plain, device="cpu", experts="eager").model
    found, wanted = loaded.model.state_dict(), eager.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    loaded.model.set_experts_implementation("eager")
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(loaded.model(ids).logits, eager(ids).logits)
    loaded.model.set_experts_implementation("tilecast")
    assert not placed_modules(loaded.model) and torch.allclose(loaded.model(ids).logits, eager(ids).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt_oss", "awq"])
def test_a_copied_or_cast_model_stays_placed(folders: dict[str, Path], awq: tuple[Path, Path], kind: str) -> None:
    folder = awq[0] if kind == "awq" else folders[kind]
    loaded = load_model(folder, dtype="float32", device="cpu", gpu_experts=3)
    other = replace(loaded, model=copy.deepcopy(loaded.model))
    assert torch.equal(logits(other), logits(loaded)) and near_of(other) == near_of(loaded)
    other.model.to(torch.bfloat16)
    assert logits(other).dtype is torch.bfloat16 and near_of(other) == near_of(loaded)
    wanted = load_model(folder, dtype="bfloat16", device="cpu")
    if kind == "gpt_oss":
        assert torch.equal(logits(other), logits(wanted))
    assert torch.equal(logits(loaded), logits(load_model(folder, dtype="float32", device="cpu")))


def test_new_weights_are_placed(folders: dict[str, Path]) -> None:
    loaded, other = (load_model(folders["mixtral"], device="cpu", gpu_experts=given) for given in (3, None))
    halved = {name: tensor * 0.5 for name, tensor in other.model.state_dict().items()}
    loaded.model.load_state_dict(halved)
    other.model.load_state_dict(halved)
    assert torch.equal(logits(loaded), logits(other)) and near_of(loaded) == [(0, 1, 2)] * 2


def test_another_number_of_slots_a_token_runs(folders: dict[str, Path]) -> None:
    loaded, whole = (load_model(folders["mixtral"], device="cpu", gpu_experts=given) for given in (3, None))
    hidden = torch.randn((4, 64), generator=torch.Generator().manual_seed(0))
    ids, weights = torch.tensor([[0, 3, 7], [1, 2, 3], [7, 6, 5], [4, 0, 2]]), torch.full((4, 3), 0.25)
    (_, module), (_, plain) = experts_modules(loaded.model)[0], experts_modules(whole.model)[0]
    assert torch.equal(module(hidden, ids, weights), plain(hidden, ids, weights))


def times(table: TuningTable, near_us: float, far_us: float, far_experts: int) -> TuningTable:
    """Return a table whose far share takes `far_us` for each GEMM, and all else `near_us`."""

    def timed(decision: Any) -> Any:
        us = far_us if decision.layer.experts == far_experts else near_us
        return replace(decision, **{
            name: replace(getattr(decision, name), p50_us=us, default_us=us, runner_up=None, runner_up_us=None)
            for name in ("up", "down")
        })  # fmt: skip

    return TuningTable(table.environments, tuple(timed(d) for d in table.decisions))


def test_the_break_even_of_the_table_is_where_weights_are_sent(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_model(folders["mixtral"], device="cpu", gpu_experts=3)
    assert [state.stream_from for state in placed_modules(plain.model)] == [None, None]
    place = placed_modules(plain.model)[0].place
    layers = [layer for layer in (place.layer, *place.shares[1:]) if layer is not None]
    table = TuningTable()
    for layer in layers:
        table = table.merged(times(decided(layer, tokens=(1, 16, 64)), 1.0, 1e6, 5))
    runtime.use_table(table)
    monkeypatch.setattr("tilecast.engine.streaming.copy_rate", lambda near: 1e12)
    streamed = load_model(folders["mixtral"], device="cpu", gpu_experts=3)
    assert [state.stream_from for state in placed_modules(streamed.model)] == [1, 1]
    assert all(state.placed.stream_from == 1 for state in placed_modules(streamed.model))
    assert greedy(streamed) == greedy(plain)
    monkeypatch.setattr("tilecast.engine.streaming.copy_rate", lambda near: 1.0)
    slow = load_model(folders["mixtral"], device="cpu", gpu_experts=3)
    assert [state.stream_from for state in placed_modules(slow.model)] == [None, None]


@pytest.mark.parametrize(
    ("options", "kind", "pattern"),
    [
        ({"gpu_experts": 9}, InputError, r"gpu_experts is 9, but a layer has 8 experts"),
        ({"gpu_experts": -1}, UsageError, "gpu_experts is -1, expected 0 or above"),
        ({"gpu_experts": {0: [1]}}, InputError, "lacks layer 1 of the model"),
        ({"gpu_experts": {0: [1, 1], 1: []}}, InputError, "near expert 1 is given twice"),
        ({"gpu_experts": "nothing"}, UsageError, "'nothing', expected a number of experts"),
        ({"gpu_experts": 2, "experts": "eager"}, UsageError, "they are to run on 'eager'"),
        ({"gpu_experts": 2, "tp": 2}, UsageError, "gpu_experts is for one process, not for 2 ranks"),
        ({"gpu_experts": 2, "ep": 4}, UsageError, "gpu_experts is for one process, not for 4 ranks"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    folders: dict[str, Path], options: dict[str, Any], kind: type[TilecastError], pattern: str
) -> None:
    with pytest.raises(kind) as caught:
        load_model(folders["mixtral"], device="cpu", **options)
    assert re.search(pattern, str(caught.value)) and "\n" not in str(caught.value)


def test_a_quantised_checkpoint_tells_what_does_not_fit(awq: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="gpu_experts is 9, but a layer has 8 experts"):
        load_model(awq[0], device="cpu", gpu_experts=9)


def test_a_model_without_experts_is_told(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(TilecastError, match="no experts"):
        load_model(tmp_path, device="cpu", gpu_experts=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("number", [0, 3, 8])
def test_on_a_gpu_each_expert_is_where_it_is_to_be(folders: dict[str, Path], number: int) -> None:
    wanted = greedy(load_model(folders["mixtral"], dtype="float32", device="cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = load_model(folders["mixtral"], dtype="float32", device="cuda", gpu_experts=number)
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    # As they are stored and as they come, of one layer at a time.
    assert peak <= held + 2 * number * 3 * 64 * 48 * 4 + (64 << 10)
    for state in placed_modules(found.model):
        assert state.placed.near.type == "cuda" and state.placed.far.type == "cpu"
        for ids, part in state.placed.shares:
            kind = "cuda" if ids == state.placed.near_experts else "cpu"
            assert all(tensor.device.type == kind for tensor in part.plain().tensors)
    assert found.model.get_input_embeddings().weight.is_cuda
    assert greedy(found) == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_too_many_for_a_gpu_are_told(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.engine.placed_model.free_bytes", lambda device: 1000)
    with pytest.raises(DeviceError, match="the near experts need"):
        load_model(folders["mixtral"], device="cuda", gpu_experts=4)
