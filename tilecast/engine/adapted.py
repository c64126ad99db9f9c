"""An experts module of somebody else's model, run by tuned kernels: its packed weights, and the way back.

Weights that a table wants stored in another way are held once: the module keeps parameters of the same shape, dtype
and device without memory of their own (they read as NaN), and `state_dict`, `load_state_dict` and `restore` work as if
they were there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch

from tilecast.engine.expert_module import Form, Plain, form_of, local, mesh_of, plain_weights, stored_again
from tilecast.engine.experts import PreparedExperts, prepare_experts
from tilecast.engine.parallel import ordered_sum
from tilecast.engine.placement import PlacedExperts
from tilecast.engine.quantized_module import Stacks, dense_weights, detach, hand_back, make_dense
from tilecast.engine.split_experts import SplitExperts, prepare_split
from tilecast.engine.table_runtime import Runtime
from tilecast.errors import UsageError
from tilecast.kernels.formats import QuantizedStack

logger = logging.getLogger(__name__)

STATE = "_tilecast"
"""The attribute of a module that holds its `Adapted`."""
HOOKED = "_tilecast_hooked"
Experts = PreparedExperts | SplitExperts | PlacedExperts


class Adapted:
    """What runs one module: prepared experts, or the reason why the model's own code does."""

    def __init__(self, module: torch.nn.Module, form: Form | None, reason: str | None) -> None:
        """Start without weights: `prepare` packs them."""
        self.form = form
        self.reason = reason
        self.runtime: Runtime | None = None
        self.released = False
        self._by_top_k: dict[int, Experts] = {}
        self._dtype = torch.float32
        self._seen: tuple[object, ...] = ()
        self._sum: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._is_first = True

    @property
    def experts(self) -> PreparedExperts | SplitExperts:
        """The experts as they were prepared first."""
        first = next(iter(self._by_top_k.values()))
        assert not isinstance(first, PlacedExperts), "those are of PlacedAdapted"
        return first

    def prepare(
        self, module: torch.nn.Module, runtime: Runtime, top_k: int, *, release: bool = True, summed: bool = True
    ) -> None:
        """Store a module's weights as `runtime` wants them; with `release`, instead of as the module has them.

        `summed` says that what calls the module adds the outputs of the ranks that its weights are split over.

        Raises InputError for weights that make no layer, DeviceError where no kernel runs it.
        """
        assert self.form is not None, "a module that falls back has nothing to prepare"
        mesh = mesh_of(module, self.form)
        self._is_first = mesh is None or mesh.get_local_rank() == 0
        plain = plain_weights(module, self.form, first_rank=self._is_first)
        self.runtime = runtime
        self._dtype = plain.dtype
        self._by_top_k = {top_k: self._prepared(plain, top_k, module)}
        ordered = mesh is not None and runtime.policy == "reproducible" and summed
        self._sum = _ordered_over(mesh) if ordered else None
        if isinstance(plain.w13, QuantizedStack):
            # Its parameters never had memory; the stacks live on as these experts have them.
            detach(module)
            self._mark_released(module)
        elif release and (self.experts.packed or not plain.shared):
            self._release(module)
        self._seen = fingerprint(module, self.form)

    def fits(self, module: torch.nn.Module) -> bool:
        """Whether the module still has the weights that were prepared, where and as they were."""
        if self.form is None:
            return True
        experts = self.experts
        # A copied module has code and norms of its own.
        theirs = isinstance(experts, SplitExperts) and experts.module is not module
        return not theirs and fingerprint(module, self.form) == self._seen

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run the experts: hidden [T, H], ids [T, k], weights [T, k] to a fresh [T, H] of hidden's dtype."""
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            out: torch.Tensor = _ForwardOnly.apply(hidden, ids, weights, self)  # type: ignore[no-untyped-call]  # torch's, untyped
            return out
        return self.run(hidden, ids, weights)

    def run(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Do what a call does, without gradients."""
        dtype = hidden.dtype
        if dtype is not self._dtype:
            # Under autocast the norm before the experts may have given float32.
            hidden = hidden.to(self._dtype)
        if ids.dtype not in (torch.int32, torch.int64):
            ids = ids.to(torch.int64)
        experts = self._by_top_k.get(ids.shape[-1])
        if experts is None:
            experts = self._for_top_k(ids.shape[-1])
        if self._sum is None:
            return experts(hidden, ids, weights).to(dtype)
        total = self._sum(experts(hidden, ids, weights, out_dtype=torch.float32)).to(dtype)
        # What follows adds the ranks' outputs in an order of its own. Adding -0 changes no bit of any number, so the
        # first rank gives the sum, and the others give that.
        return total if self._is_first else torch.full_like(total, -0.0)

    def plain(self) -> Plain:
        """Return the weights, gate rows before up rows, bit for bit as they were given."""
        assert self.form is not None
        up, down = self.experts.unpacked()
        return Plain(w13=up.data, w2=down.data, bias13=up.bias, bias2=down.bias, dtype=self._dtype, shared=False)

    def restore(self, module: torch.nn.Module, *, quantized: bool = False) -> None:
        """Give a module its own weights back, on the device and in the dtype that its parameters now have.

        Quantised ones are dequantised, unless they are to stay so (`quantized`).
        """
        if not self.released or self.form is None:
            return
        plain = self.plain()
        if isinstance(plain.w13, QuantizedStack) and isinstance(plain.w2, QuantizedStack):
            hand_back(module, Stacks(plain.w13, plain.w2), self.form.names[:2])
            if not quantized:
                logger.info("experts of %s are dequantised, as something else is to run them", plain.w13.format)
                make_dense(module)
        else:
            for name, tensor in self._stored().items():
                now = local(module.get_parameter(name))
                replace_parameter(module, name, tensor.to(device=now.device, dtype=now.dtype))
        self.released = False

    def _stored(self) -> dict[str, torch.Tensor]:
        """Return w13 and w2 as the module had them, by parameter name."""
        assert self.form is not None
        plain = self.plain()
        w13, w2 = plain.w13, plain.w2
        if isinstance(w13, QuantizedStack) and isinstance(w2, QuantizedStack):
            w13, w2 = dense_weights(Stacks(w13, w2), gated=self.form.gated, dtype=self._dtype)
        assert isinstance(w13, torch.Tensor) and isinstance(w2, torch.Tensor), "one weight format for both"
        w13, w2 = stored_again(w13, w2, self.form)
        return {self.form.names[0]: w13, self.form.names[1]: w2}

    def _prepared(self, plain: Plain, top_k: int, module: torch.nn.Module | None) -> Experts:
        assert self.form is not None and self.runtime is not None
        layers = plain.layers(self.form, top_k)
        if len(layers) == 2:
            assert module is not None, "its own code runs between the GEMMs"
            assert isinstance(plain.w13, torch.Tensor) and isinstance(plain.w2, torch.Tensor), "refused above"
            return prepare_split(
                layers, plain.w13, plain.w2, plain.bias13, plain.bias2, module, runtime=self.runtime,
                gated=self.form.gated, normed=self.form.normed,
            )  # fmt: skip
        (layer,) = layers
        return prepare_experts(
            plain.w13, plain.w2, top_k=top_k, activation=layer.activation, gated=layer.gated, bias13=plain.bias13,
            bias2=plain.bias2, global_experts=layer.global_experts, dtype=plain.dtype, runtime=self.runtime,
        )  # fmt: skip

    def _for_top_k(self, top_k: int) -> Experts:
        """Return the experts for another number of slots a token, on the same memory where the table allows it."""
        known = self.experts
        found: Experts | None = known.with_top_k(top_k)
        if found is None:
            logger.warning("%s for top-%d is stored once more, as the table wants it", known.layer.label, top_k)
            found = self._prepared(self.plain(), top_k, known.module if isinstance(known, SplitExperts) else None)
        self._by_top_k[top_k] = found
        return found

    def _release(self, module: torch.nn.Module, device: torch.device | None = None) -> None:
        """Leave a module parameters without memory, on the device where they were unless another is given."""
        assert self.form is not None
        for name in self.form.names[:2]:
            held = local(getattr(module, name))
            empty = torch.full((1,), float("nan"), dtype=held.dtype, device=device or held.device).expand(held.shape)
            replace_parameter(module, name, empty)
        self._mark_released(module)

    def _mark_released(self, module: torch.nn.Module) -> None:
        self.released = True
        if HOOKED not in module.__dict__:
            # They do nothing while the module has its weights.
            module.__dict__[HOOKED] = True
            module.register_state_dict_post_hook(_fill_state_dict)
            module.register_load_state_dict_pre_hook(_restore_before_load)

    def __deepcopy__(self, memo: dict[int, object]) -> Adapted:
        """Return a state that a copied module starts from; the packed weights never change, so they are shared."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce__(self) -> str:
        """Refuse: the packed weights of a pickled module would be lost."""
        raise UsageError("a model on Tilecast's experts cannot be pickled; use save_pretrained, or restore_model first")


class _ForwardOnly(torch.autograd.Function):
    """Experts whose outputs may be computed with gradients recorded, and not differentiated."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, run: Adapted) -> torch.Tensor:
        """Run without gradients."""
        return run.run(hidden.detach(), ids, weights.detach())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Refuse."""
        raise UsageError("Tilecast's experts are forward only; train with another experts_implementation")


def adapted_of(module: torch.nn.Module) -> Adapted | None:
    """Return what runs a module, None if it was never prepared."""
    return cast("Adapted | None", module.__dict__.get(STATE))


def adapt(module: torch.nn.Module, reason: str | None = None, form: Form | None = None) -> Adapted:
    """Give a module a state, and return it. `form` is looked up where neither it nor a reason is given.

    With a reason the model's own code runs it, which needs dense weights.
    """
    if form is None and reason is None:
        form = form_of(module)
    if reason is not None:
        make_dense(module)
    found = Adapted(module, form, reason)
    module.__dict__[STATE] = found
    return found


def _ordered_over(mesh: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    group = mesh.get_group()

    def total(partial: torch.Tensor) -> torch.Tensor:
        return ordered_sum(partial, group)

    return total


def fingerprint(module: torch.nn.Module, form: Form) -> tuple[object, ...]:
    """Return what tells whether a module's weights are still those that were prepared."""
    found = []
    for name in form.names:
        tensor = local(getattr(module, name))
        # A parameter that was released says nothing by its address: that of a copied module is another.
        released = not any(tensor.stride())
        # What was stored in another way does not follow when the module's own memory is written to.
        version = 0 if released or tensor.is_inference() else tensor._version
        found.append((released or tensor.data_ptr(), tensor.dtype, tensor.device, tensor.stride(), version))
    return tuple(found)


def replace_parameter(module: torch.nn.Module, name: str, part: torch.Tensor) -> None:
    """Put `part` where a parameter, or this rank's part of one, was."""
    known = module._parameters[name]
    assert known is not None
    placements = getattr(known, "placements", None)
    data = part
    if placements is not None:
        from torch.distributed.tensor import DTensor

        whole: Any = known
        data = DTensor.from_local(
            part, whole.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    module._parameters[name] = torch.nn.Parameter(data, requires_grad=known.requires_grad)


def _fill_state_dict(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Put the weights into a state dict that was made without them."""
    found = adapted_of(module)
    if found is None or not found.released:
        return
    for name, tensor in found._stored().items():
        known = state.get(prefix + name)
        if known is None:
            continue
        placements = getattr(known, "placements", None)
        if placements is not None:
            from torch.distributed.tensor import DTensor

            tensor = DTensor.from_local(
                tensor, known.device_mesh, placements, run_check=False, shape=known.shape, stride=known.stride()
            )
        state[prefix + name] = tensor


def _restore_before_load(module: torch.nn.Module, *_: object) -> None:
    """Give the module memory to load into; its new weights are prepared at the next call."""
    found = adapted_of(module)
    if found is not None:
        found.restore(module)
        found._seen = ()
