"""How an op enters `torch.library`: schema, fake, choice of backend at run time, and autograd through a second op.

The backward is an op of its own, so that a compiled graph holds it whole: `torch.compile` and `opcheck` never look
into a backend.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hylo_ops.backend import Backend, choose

_LIBRARY = torch.library.Library("hylo_ops", "DEF")

# Found once: each lookup through torch's modules takes as long as the call.
_is_compiling = torch.compiler.is_compiling
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_transform = torch._C._functorch.peek_interpreter_stack

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def may_skip_dispatcher() -> bool:
    """Whether a call of an op now would only go to its kernel: nothing compiles, traces, transforms or intercepts it.

    Tensors can ask for the dispatcher too: subclasses, and those that want a gradient.
    """
    return not (_is_compiling() or _count_dispatch_modes() or _is_tracing() or _transform() is not None)


def _are_plain(arguments: Sequence[Any]) -> bool:
    """Whether no tensor among them asks for the dispatcher."""
    gradients = torch.is_grad_enabled()
    for value in arguments:
        if isinstance(value, Tensor) and (type(value) not in _PLAIN_TYPES or (gradients and value.requires_grad)):
            return False
    return True


def define_op(
    name: str,
    schema: str,
    *,
    backends: Sequence[Backend],
    fake: Callable[..., Any],
    differentiable: Sequence[str] = (),
    saved: int = 0,
    skips_dispatcher: bool = False,
) -> Callable[..., Any]:
    """Registers `hylo_ops::<name>`; the schema's last argument is `str? backend`.

    Args:
        differentiable: names of the inputs that get a gradient, through `hylo_ops::<name>_backward`. Empty for
            ops that update a state in place.
        saved: how many of the results, the last ones, are for the backward alone, which gets them behind the gradients
            of the others.
        skips_dispatcher: whether a call goes straight to its backend where nothing can tell, 15 us on the host; for a
            decode step without a gradient.
    Returns:
        The op, to be called with positional arguments.
    """
    arguments = [a.name for a in torch._C.parse_schema(f"hylo_ops::{name}{schema}").arguments]

    def run(*args: Any) -> Any:
        *inputs, requested = args
        backend = choose(name, backends, requested, dict(zip(arguments, inputs, strict=False)))
        return backend.forward(*inputs)

    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hylo_ops::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    if differentiable:
        _define_backward(name, schema, arguments, backends, differentiable, saved)
    op: Callable[..., Any] = getattr(torch.ops.hylo_ops, name)

    def call(*args: Any) -> Any:
        return run(*args) if may_skip_dispatcher() and _are_plain(args) else op(*args)

    return call if skips_dispatcher else op


def _define_backward(
    name: str,
    schema: str,
    arguments: list[str],
    backends: Sequence[Backend],
    differentiable: Sequence[str],
    saved: int,
) -> None:
    positions = [arguments.index(argument) for argument in differentiable]
    able = able_backward(backends)
    of_forward = "Tensor[] grads, Tensor[] saved" if saved else "Tensor[] grads"
    backward_schema = f"({of_forward}, {schema[1 : schema.index(')')]}) -> Tensor[]"

    def wanted(inputs: Sequence[Any]) -> list[Tensor]:
        return [inputs[i] for i in positions if _takes_gradient(inputs[i])]

    def run(*args: Any) -> list[Tensor]:
        given, inputs, requested = args[: -len(arguments)], args[-len(arguments) : -1], args[-1]
        backend = choose(f"{name}_backward", able, requested, dict(zip(arguments, inputs, strict=False)))
        assert backend.backward is not None
        return [gradient.contiguous() for gradient in backend.backward(*given, *inputs)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [isinstance(value, Tensor) for value in inputs]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        left: tuple[Tensor, ...] = ()
        if saved:
            left = output[-saved:]
            ctx.mark_non_differentiable(*left)
            # Autograd would fill gradients of zeros for these, too.
            ctx.set_materialize_grads(False)
            ctx.results = [(result.shape, result.dtype) for result in output[:-saved]]
        ctx.save_for_backward(*left, *(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing hands them out once
        left, kept = tensors[:saved], iter(tensors[saved:])
        inputs = [next(kept) if is_tensor else other for is_tensor, other in zip(ctx.tensors, ctx.others, strict=True)]
        given: list[Any] = [list(grads)]
        if saved:
            like = next(value for value in inputs if isinstance(value, Tensor))
            given = [[_materialized(*pair, like) for pair in zip(grads, ctx.results, strict=False)], list(left)]
        results = iter(backward_op(*given, *inputs))
        found = {i: next(results) for i in positions if _takes_gradient(inputs[i])}
        return tuple(found.get(i) for i in range(len(inputs)))

    _LIBRARY.define(f"{name}_backward{backward_schema}")
    _LIBRARY.impl(f"{name}_backward", run, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"hylo_ops::{name}_backward",
        lambda *args: [
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted(args[-len(arguments) :])
        ],
        lib=_LIBRARY,
    )
    backward_op = getattr(torch.ops.hylo_ops, f"{name}_backward")
    torch.library.register_autograd(f"hylo_ops::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def differentiate(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Autograd for an op of `define_op` that keeps other tensors for its backward than its inputs.

    Args:
        backward: calls an op that `define_op` has defined for it.
    """
    torch.library.register_autograd(f"hylo_ops::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def able_backward(backends: Sequence[Backend]) -> list[Backend]:
    """Those with a backward, each as one that says of which inputs it can run that."""
    return [
        dataclasses.replace(backend, why_not=backend.backward_why_not or backend.why_not)
        for backend in backends
        if backend.backward is not None
    ]


def _takes_gradient(value: Any) -> bool:
    """An input that may have one need not: it may be left out, or be bytes."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _materialized(gradient: Tensor | None, of: tuple[torch.Size, torch.dtype], like: Tensor) -> Tensor:
    """Zeros for a gradient that nothing asked for."""
    shape, dtype = of
    return like.new_zeros(shape, dtype=dtype) if gradient is None else gradient


def reference_backend(forward: Callable[..., Any], differentiable: Sequence[str] = ()) -> Backend:
    """The eager PyTorch form as a backend; its backward runs the forward again and asks autograd.

    Args:
        forward: takes the op's inputs, under the op's names and in its order.
    """
    positions = [list(inspect.signature(forward).parameters).index(name) for name in differentiable]

    def backward(grads: list[Tensor], *inputs: Any) -> list[Tensor]:
        args = list(inputs)
        leaves = []
        with torch.enable_grad():
            for i in positions:
                if _takes_gradient(args[i]):
                    args[i] = args[i].detach().requires_grad_()
                    leaves.append(args[i])
            outputs = forward(*args)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            reached = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in reached], leaves, [g for _, g in reached], allow_unused=True, materialize_grads=True
            )
        return list(found)

    return Backend("reference", _anywhere, forward, backward if differentiable else None)


def _anywhere(**_: Any) -> None:
    """There is no input the reference refuses."""
