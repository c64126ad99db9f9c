"""What the Triton expert kernels do when they run: checking operands, and a plan for each stack of weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from tilecast.errors import DeviceError
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.gpu.checks import TRITON_TYPES, check_call, check_output, check_rows, check_weights
from tilecast.kernels.gpu.moe import TritonExperts, columns_of
from tilecast.kernels.gpu.quantized import code_operands
from tilecast.kernels.gpu.sorting import DeviceLayout, aligned
from tilecast.kernels.gpu.target import Target, parse_target, target_of
from tilecast.kernels.routing import ExpertLayout
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import TileConfig

INTERPRETED = "cuda:90"
"""The target that kernels are built for on CPU tensors, where Triton's interpreter runs them."""


def up(
    kernel: TritonExperts,
    config: TileConfig,
    hidden: torch.Tensor,
    weights: GemmWeights,
    route: ExpertLayout,
    out: torch.Tensor,
) -> None:
    """Check operands and run the up GEMM, as `TritonExperts.up` says. Raises InputError."""
    layer = weights.gemm.layer
    check_call(weights, route, hidden)
    check_rows("input", hidden, (route.tokens, layer.hidden), layer.dtype)
    check_output(out, (route.tokens * route.top_k, layer.intermediate), layer.dtype)
    if route.tokens:
        plan = plan_of(kernel, config, weights, hidden.device)
        kernel.launch_up(plan, aligned(hidden), weights, device_layout(route), out)


def down(
    kernel: TritonExperts,
    config: TileConfig,
    intermediate: torch.Tensor,
    weights: GemmWeights,
    route: ExpertLayout,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Check operands and run the down GEMM, as `TritonExperts.down` says. Raises InputError."""
    layer = weights.gemm.layer
    check_call(weights, route, intermediate)
    check_rows("input", intermediate, (route.tokens * route.top_k, layer.intermediate), layer.dtype)
    check_rows("routing weights", topk_weights, (route.tokens, route.top_k), "fp32")
    check_output(out, (route.tokens, layer.hidden), layer.dtype, "fp32")
    if route.tokens:
        plan = plan_of(kernel, config, weights, intermediate.device, TRITON_TYPES[out.dtype])
        rows, scales = aligned(intermediate), aligned(topk_weights)
        kernel.launch_down(plan, rows, weights, device_layout(route), scales, out)


def plan_of(
    kernel: TritonExperts, config: TileConfig, weights: GemmWeights, device: torch.device, out_dtype: str | None = None
) -> Plan:
    """Return what stays the same between launches of `config` on these weights, made once and kept with them."""
    key = (config, out_dtype)
    known: Plan | None = weights.plans.get(key)
    if known is None:
        known = weights.plans[key] = Plan(kernel, config, weights, device, out_dtype)
    return known


class Plan:
    """What stays the same between launches of one config on one stack of weights."""

    def __init__(
        self,
        kernel: TritonExperts,
        config: TileConfig,
        weights: GemmWeights,
        device: torch.device,
        out_dtype: str | None,
    ) -> None:
        """Check the weights, once for the stack. Raises InputError."""
        check_weights(weights)
        self.config = config
        self.target, self.units = device_facts(device)
        codes = isinstance(weights.data, QuantizedStack)
        self.weights = code_operands(weights.data) if codes else (weights.data,)
        self.bias = self.weights[0] if weights.bias is None else weights.bias
        self.builds = kernel.builds(
            weights.gemm,
            config,
            self.target,
            layout=weights.layout,
            out_dtype=out_dtype,
            bias_dtype=None if weights.bias is None else TRITON_TYPES[weights.bias.dtype],
            scale_dtype=TRITON_TYPES[weights.data.scales.dtype] if codes else None,
        )
        self.columns = columns_of(weights.gemm, config)
        self.descriptors: dict[str, Any] = {}


def device_layout(route: ExpertLayout) -> DeviceLayout:
    """Return the route as one that makes tile maps; one that was sorted elsewhere is sorted again."""
    return route if isinstance(route, DeviceLayout) else DeviceLayout(route.ids, route.experts)


@cache
def device_facts(device: torch.device) -> tuple[Target, int]:
    """Return the target of a device and its SMs; a few for the CPU, where the interpreter runs. DeviceError."""
    if device.type == "cpu":
        return parse_target(INTERPRETED), 4
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    found = target_of_arch(arch)
    if found is None:
        raise DeviceError(f"{device} is {arch}, none of the architectures that the GPU kernels are checked on")
    return found, properties.multi_processor_count


def target_of_arch(arch: str) -> Target | None:
    """Return the target of an architecture as `Environment.arch` writes it."""
    return target_of(replace(parse_target(INTERPRETED).environment(), arch=arch))
