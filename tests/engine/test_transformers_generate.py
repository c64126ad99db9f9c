"""Models under torch.compile, with a static cache, in continuous batching and in CUDA graphs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tiny_models import save_tiny, tiny_model
from tilecast.engine.transformers import experts_modules, prepare_model

transformers = pytest.importorskip("transformers")

IDS = (torch.arange(1, 25).view(2, 12) * 7) % 97
OPERATOR = "tilecast.experts.default"
DOCS = Path(__file__).parents[2] / "docs" / "transformers.md"


@pytest.fixture(autouse=True)
def fresh_graphs(registered: None) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prepared(family: str, **changes: Any) -> Any:
    model = tiny_model(family, num_hidden_layers=1, **changes)
    model.config._experts_implementation = "tilecast"
    prepare_model(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [("mixtral", {}), pytest.param("gpt_oss", {"layer_types": ["full_attention"]}, marks=pytest.mark.long)],
)
def test_a_whole_forward_is_one_graph_with_one_operator(family: str, changes: dict[str, Any]) -> None:
    model = prepared(family, **changes)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (12, 7):
        with torch.no_grad():
            found, wanted = compiled(IDS[:, :tokens]).logits, model(IDS[:, :tokens]).logits
        # Norms are the compiler's within a graph, Tilecast's outside.
        assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max()
    # transformers compiles what prepares its masks apart.
    found_in = [[str(node.target) for node in graph.graph.nodes].count(OPERATOR) for graph in counter.graphs]
    assert max(found_in) == 1 and len(counter.graphs[found_in.index(1)].graph.nodes) > 40


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compiled_experts_give_the_same_bits_at_any_token_count(family: str) -> None:
    _, experts = experts_modules(prepared(family))[0]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (20, 11, 5):
        hidden, ids = torch.randn(tokens, 64), torch.rand(tokens, 8).argsort(dim=1)[:, :2]
        weights = torch.rand(tokens, 2)
        with torch.no_grad():
            assert torch.equal(compiled(hidden, ids, weights), experts(hidden, ids, weights))
    assert counter.frame_count == 1


def test_a_static_cache_generates_the_same_tokens() -> None:
    model = prepared("mixtral")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), wanted)
    eager = tiny_model("mixtral", num_hidden_layers=1)
    assert torch.equal(eager.generate(IDS, **options), wanted)


def test_continuous_batching_generates_eagers_tokens() -> None:
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], [11, 12, 13, 14, 15, 16, 17]]
    options = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    eager, ours = tiny_model("mixtral", num_hidden_layers=1), prepared("mixtral")
    if not hasattr(ours, "generate_batch"):
        pytest.skip("this version has no continuous batching")
    # By default it takes, and fills, nearly all memory that there is.
    sizes = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    found = ours.generate_batch(
        prompts, generation_config=options, continuous_batching_config=sizes, progress_bar=False
    )
    tokens = [request.generated_tokens for request in found.values()]
    for prompt, seen in zip(prompts, tokens, strict=True):
        alone = eager.generate(torch.tensor([prompt]), generation_config=options)
        assert seen == alone[0, len(prompt) :].tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_experts_are_captured_in_a_cuda_graph() -> None:
    model = prepared("mixtral", dtype=torch.bfloat16).cuda()
    _, experts = experts_modules(model)[0]
    hidden = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    ids, weights = torch.rand(4, 8, device="cuda").argsort(dim=1)[:, :2], torch.rand(4, 2, device="cuda")
    with torch.no_grad():
        wanted = experts(hidden, ids, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = experts(hidden, ids, weights)
        graph.replay()
    assert torch.equal(found, wanted)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("place", range(len(blocks())))
def test_the_documented_examples_run(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("mixtral", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks()[place], f"{DOCS.name} example {place}", "exec"), {})
    assert capsys.readouterr().out.strip()
