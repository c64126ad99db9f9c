"""Loading checkpoints: all weights or none, in one line what is wrong."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny_models import save_tiny, save_tokenizer, tiny_model
from tilecast.engine.checkpoint import inspect_checkpoint
from tilecast.engine.load import available_memory, check_experts, check_parallel, load_model
from tilecast.engine.pretrained import check_heads, check_loading
from tilecast.engine.runtime import forget_table
from tilecast.engine.transformers import _options, register_transformers
from tilecast.errors import DeviceError, ModelError, UsageError
from tilecast.models import resolve


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def copied(mixtral: Path, tmp_path: Path) -> Path:
    for path in mixtral.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def changed_weights(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def changed_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def one_line(folder: Path, kind: type[Exception], pattern: str, **options: object) -> None:
    with pytest.raises(kind) as caught:
        load_model(folder, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and re.search(pattern, str(caught.value)), str(caught.value)


def test_a_whole_checkpoint_loads_in_its_own_dtype(tmp_path: Path) -> None:
    loaded = load_model(save_tiny("qwen3_moe", tmp_path, torch.bfloat16))
    assert loaded.dtype is torch.bfloat16 and loaded.model.dtype is torch.bfloat16
    assert loaded.tokenizer is None and loaded.experts == "tilecast" and not loaded.model.training


def test_another_dtype_can_be_asked_for(mixtral: Path) -> None:
    assert load_model(mixtral, dtype="bfloat16", experts="eager").model.dtype is torch.bfloat16
    one_line(mixtral, UsageError, "dtype is 'int4', expected one of float32", dtype="int4")


def test_missing_weights_are_an_error_that_names_them(copied: Path) -> None:
    names = list(load_file(copied / "model.safetensors"))
    router = next(name for name in names if "gate.weight" in name and "layers.0" in name)
    changed_weights(copied, lambda weights: weights.pop(router))
    one_line(copied, ModelError, r"lacks weights that the model needs: model\.layers\.\d.*gate\.weight")


def test_missing_experts_are_never_random(copied: Path) -> None:
    def drop(weights) -> None:  # type: ignore[no-untyped-def]
        for name in [name for name in weights if "layers.1" in name and "expert" in name]:
            del weights[name]

    changed_weights(copied, drop)
    one_line(copied, ModelError, r"lacks weights that the model needs: model\.layers\.1\..*experts")


def test_a_single_missing_expert_is_an_error(copied: Path) -> None:
    def drop(weights) -> None:  # type: ignore[no-untyped-def]
        names = [name for name in weights if "layers.1" in name and "experts.3." in name]
        assert names
        for name in names:
            del weights[name]

    changed_weights(copied, drop)
    one_line(copied, ModelError, r"layers\.1\..*experts")


def test_unexpected_weights_are_an_error(copied: Path) -> None:
    changed_weights(copied, lambda weights: weights.update({f"extra.{n}": torch.ones(2) for n in range(5)}))
    one_line(copied, ModelError, r"has weights that the model does not: extra\.0, extra\.1, extra\.2 and 2 more")


def test_weights_of_another_shape_are_an_error(copied: Path) -> None:
    changed_weights(copied, lambda weights: weights.update({"lm_head.weight": torch.ones(13, 64)}))
    one_line(copied, ModelError, r"other shapes than the model's: lm_head.weight \(13, 64\) instead of \(97, 64\)")


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    folder = save_tiny("qwen2_moe", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_model(folder, experts="eager").model.lm_head.weight.std() > 0


def test_a_file_cut_off_is_an_error(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    one_line(copied, ModelError, r"model\.safetensors has \d+ bytes, its header describes \d+; copy it again")


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("config.json", b"{", "config.json cannot be read as JSON"),
        ("config.json", b"[]", "config.json is not a JSON object"),
        ("config.json", b'{"model_type": "no_such"}', "no_such"),
        ("config.json", b'{"model_type": "mixtral", "dtype": "int3"}', "the config's dtype is 'int3'"),
        ("model.safetensors", b"not this", "is not a safetensors file: its header is longer"),
        ("model.safetensors", b"", "is not a safetensors file: it is empty; copy it again"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS.*git lfs"),
        ("model.safetensors.index.json", b"{}", "has no weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}', "expected files of the folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x-1.safetensors"}}', "lacks 1 of its 1 weight files"),
    ],
)
def test_damaged_files_are_told_in_one_line(copied: Path, name: str, content: bytes, pattern: str) -> None:
    (copied / name).write_bytes(content)
    one_line(copied, ModelError, pattern)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"{", r"generation_config\.json cannot be read as JSON"),
        (b"[1]", r"generation_config\.json is not a JSON object"),
        (b'{"eos_token_id": "2"}', r"generation_config\.json: field eos_token_id is '2', expected token ids"),
        (b'{"eos_token_id": -1}', r"generation_config\.json: field eos_token_id is -1, expected"),
        (b'{"eos_token_id": [2, "3"]}', r"field eos_token_id is \[2, '3'\], expected"),
        (b'{"eos_token_id": true}', "field eos_token_id is True, expected"),
        (b'{"bos_token_id": [1]}', r"field bos_token_id is \[1\], expected a token id"),
        (b'{"pad_token_id": 0.5}', "field pad_token_id is 0.5, expected"),
    ],
)
def test_a_broken_generation_config_is_told_in_one_line(copied: Path, content: bytes, pattern: str) -> None:
    (copied / "generation_config.json").write_bytes(content)
    one_line(copied, ModelError, pattern)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"num_experts_per_tok": 0}, r"config\.json: field num_experts_per_tok is 0, expected at least 1"),
        ({"num_experts_per_tok": 9}, "field num_experts_per_tok is 9, more than the 8 experts"),
        ({"num_experts_per_tok": "2"}, "field num_experts_per_tok is '2', expected at least 1"),
        ({"num_local_experts": -8}, "field num_local_experts is -8, expected a number of experts"),
        ({"eos_token_id": "end"}, r"[^_]config\.json: field eos_token_id is 'end', expected token ids"),
    ],
)
def test_fields_that_load_silently_and_run_wrong_are_told(copied: Path, fields: dict, pattern: str) -> None:  # type: ignore[type-arg]
    changed_config(copied, **fields)
    one_line(copied, ModelError, pattern)


def test_tokens_that_are_fine(copied: Path) -> None:
    (copied / "generation_config.json").write_text('{"eos_token_id": [2, 5], "bos_token_id": null, "pad_token_id": -1}')
    assert load_model(copied).model.generation_config.eos_token_id == [2, 5]


def test_nothing_is_unpickled(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    one_line(copied, ModelError, r"neither model\.safetensors nor .*; pytorch_model\.bin is of another format")


def test_no_folder_is_told(tmp_path: Path) -> None:
    one_line(tmp_path / "absent", ModelError, "is not a folder")
    one_line(tmp_path, ModelError, r"config\.json does not exist")


def test_code_of_a_checkpoint_never_runs(copied: Path) -> None:
    (copied / "evil.py").write_text("raise SystemExit(77)")
    changed_config(
        copied, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model"}
    )
    one_line(copied, ModelError, "transformers cannot load it")


def test_a_damaged_tokenizer_is_an_error(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{}")
    one_line(copied, ModelError, "its tokenizer cannot be loaded")


def test_unknown_experts_are_a_usage_error(mixtral: Path) -> None:
    one_line(mixtral, UsageError, "experts are to run on 'no_such'", experts="no_such")


def test_too_little_memory_is_told_before_loading(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.engine.load.available_memory", lambda: 1000)
    one_line(mixtral, DeviceError, "the weights need 0.0 GiB on each rank, 0.0 GiB are free on cpu", device="cpu")


def test_available_memory_is_read(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    12 kB\n")
    assert available_memory(tmp_path / "meminfo") == 12 * 1024
    assert available_memory(tmp_path / "absent") is None


def test_a_checkpoint_knows_its_size(mixtral: Path) -> None:
    found = inspect_checkpoint(mixtral)
    numbers = sum(tensor.numel() for tensor in load_file(mixtral / "model.safetensors").values())
    assert (found.numbers, found.other_bytes) == (numbers, 0)
    assert found.needed_bytes(2) == 2 * numbers
    assert [name for name, _ in found.files] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("world", "tp", "ep", "pattern"),
    [
        (1, 2, 1, "need 2 ranks, but there are 1; start with torchrun --nproc-per-node 2"),
        (4, 1, 1, "need 1 ranks, but there are 4; leave out torchrun"),
        (4, 2, 2, "splits experts one way or the other"),
        (1, 0, 1, "expected at least 1"),
    ],
)
def test_parallelism_must_fit_the_ranks(world: int, tp: int, ep: int, pattern: str) -> None:
    check_parallel(2, 1, 2)
    with pytest.raises(UsageError, match=pattern):
        check_parallel(world, tp, ep)


@pytest.mark.parametrize(("family", "ranks"), [("mixtral", 3), ("mixtral", 8), ("olmoe", 16)])
def test_ranks_that_would_cut_through_a_head_are_told(family: str, ranks: int) -> None:
    model = tiny_model(family)
    check_heads(model, 4)
    with pytest.raises(ModelError, match=rf"num_\w+_heads is [48], which {ranks} ranks cannot share out"):
        check_heads(model, ranks)


def test_heads_that_differ_from_layer_to_layer_are_all_looked_at() -> None:
    options = {"layer_types": ["sliding_attention", "full_attention"], "vocab_size": 32}
    options |= {"vocab_size_per_layer_input": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 2}
    options |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = AutoConfig.for_model("gemma4_text", **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_heads(model, 2)
    with pytest.raises(ModelError, match="num_key_value_heads is 2, which 4 ranks cannot share out"):
        check_heads(model, 4)


@pytest.mark.parametrize("family", ["jamba", "phimoe"])
def test_heads_that_no_rank_splits_do_not_matter(family: str) -> None:
    check_heads(tiny_model(family), 3)


def test_experts_that_ranks_cannot_share_out_are_told() -> None:
    for counts, ep in (((8,), 4), ((), 3), ((8, 16), 8), ((60,), 1)):
        check_experts(counts, ep)
    with pytest.raises(ModelError, match="ep=3 cannot share out a layer's 8 experts evenly"):
        check_experts((6, 8), 3)


def test_every_kind_of_report_is_an_error() -> None:
    check_loading("x", {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []})
    with pytest.raises(ModelError, match="x cannot be loaded: went wrong"):
        check_loading("x", {"error_msgs": ["went wrong\nsecond line"]})
    for key, words in (("a.experts.0.w1.qweight", "; a.experts.0.w1.qweight is of quantised weights"), ("a.b", "")):
        with pytest.raises(ModelError, match=f"^x lacks weights that the model needs: a.experts{words}") as caught:
            check_loading("x", {"missing_keys": {"a.experts"}, "unexpected_keys": {key, "z"}})
        assert ("quantization_config" in str(caught.value)) == bool(words)


def test_policy_and_table_replace_the_environment(mixtral: Path, tmp_path: Path) -> None:
    one_line(mixtral, Exception, r"absent\.db", table=str(tmp_path / "absent.db"))
    loaded = load_model(mixtral, policy="fastest")
    from tilecast.engine import runtime

    assert runtime.current("cpu").policy == "fastest"
    assert loaded.experts == "tilecast"


def test_tiny_models_are_the_layers_that_their_config_says(mixtral: Path) -> None:
    (group,) = resolve(str(mixtral)).layers
    layer = group.layer
    assert (layer.hidden, layer.intermediate, layer.experts, layer.top_k) == (64, 48, 8, 2)


def test_a_report_names_transformers_tuples() -> None:
    info = SimpleNamespace(mismatched_keys={("w", (1, 2), (3, 4))})
    with pytest.raises(ModelError, match=r"w \(1, 2\) instead of \(3, 4\)"):
        check_loading("x", vars(info))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"hidden_size": "abc"}, "transformers cannot load it: StrictDataclass.*hidden_size"),
        ({"num_attention_heads": 0, "head_dim": None}, "transformers cannot load it: ZeroDivisionError"),
    ],
)
def test_a_config_that_makes_no_model_is_told_in_one_line(
    copied: Path, changes: dict[str, object], pattern: str
) -> None:
    changed_config(copied, **changes)
    one_line(copied, ModelError, pattern)


def changed_header(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(next(value for name, value in header.items() if name != "__metadata__"))
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda tensor: tensor.update(dtype="ZZ"), "transformers cannot load it: SafetensorError"),
        (lambda tensor: tensor.update(shape=[1]), "transformers cannot load it: SafetensorError"),
        (lambda tensor: tensor.update(data_offsets=[str(n) for n in tensor["data_offsets"]]), "is not a safetensors"),
        (lambda tensor: tensor["data_offsets"].append(1), "is not a safetensors file"),
    ],
)
def test_a_header_that_describes_no_tensors_is_told_in_one_line(copied: Path, change, pattern: str) -> None:  # type: ignore[no-untyped-def]
    changed_header(copied, change)
    one_line(copied, ModelError, pattern)


def test_a_config_nested_without_end_is_told_in_one_line(copied: Path) -> None:
    (copied / "config.json").write_text("[" * 100_000)
    one_line(copied, ModelError, "config.json cannot be read as JSON")


def test_a_device_that_does_not_exist_is_told_in_one_line(mixtral: Path) -> None:
    one_line(mixtral, UsageError, "device is 'nonsense', expected cpu or cuda", device="nonsense")
    one_line(mixtral, UsageError, "device is 'meta', expected cpu or cuda", device="meta")
    if not torch.cuda.is_available():
        one_line(mixtral, DeviceError, "cuda.*no GPU", device="cuda")


def test_a_tokenizer_that_cannot_be_read_is_told_in_one_line(copied: Path) -> None:
    save_tokenizer(copied)
    path = copied / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "Nonsense"}}))
    one_line(copied, ModelError, "its tokenizer cannot be loaded")


def test_loading_leaves_a_programs_options_of_the_adapter_as_they_were(mixtral: Path) -> None:
    register_transformers(release=False, float32_router=True)
    try:
        load_model(mixtral, policy="fastest")
        assert (_options.release, _options.float32_router, _options.settings) == (False, True, None)
    finally:
        register_transformers()
        forget_table()
