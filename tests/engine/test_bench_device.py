"""The benchmark's operands, peers and timing on a device that is not the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.pretend_device import DEVICE, PretendDevice
from tilecast.engine.bench import make_operands, make_weights, work
from tilecast.engine.peers import OneDnnGemms, TorchLoop
from tilecast.problem import ExpertLayer

LAYER = ExpertLayer(hidden=32, intermediate=24, experts=3, top_k=2, bias=True)


def test_weights_and_operands_have_the_same_values_on_every_device() -> None:
    with PretendDevice(), torch.no_grad():
        there, here = make_weights(LAYER, 3, DEVICE), make_weights(LAYER, 3)
        for name in ("w13", "w2", "bias13", "bias2"):
            assert getattr(there, name).device == DEVICE
            assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
        a, b = make_operands(LAYER, 7, 5, DEVICE), make_operands(LAYER, 7, 5)
        for name in ("hidden", "ids", "scale"):
            assert getattr(a, name).device == DEVICE
            assert torch.equal(getattr(a, name).cpu(), getattr(b, name))
        assert work(LAYER, a.ids) == work(LAYER, b.ids)


def test_the_loop_runs_where_its_operands_are() -> None:
    with PretendDevice(), torch.no_grad():
        results = []
        for device in (DEVICE, torch.device("cpu")):
            given = make_operands(LAYER, 7, 5, device)
            call = TorchLoop().prepare(LAYER, make_weights(LAYER, 3, device))(given.hidden, given.ids, given.scale)
            results.append(call())
        assert results[0].device == DEVICE
        torch.testing.assert_close(results[0].cpu(), results[1])


def test_a_library_for_cpus_is_no_peer_on_a_gpu() -> None:
    assert OneDnnGemms().available(LAYER, 4, "cuda") == "oneDNN runs on the CPU"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_loop_runs_on_a_gpu() -> None:
    device = torch.device("cuda")
    given = make_operands(LAYER, 7, 5, device)
    out = TorchLoop().prepare(LAYER, make_weights(LAYER, 3, device))(given.hidden, given.ids, given.scale)()
    assert out.device.type == "cuda" and bool(torch.isfinite(out).all())
