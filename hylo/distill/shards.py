"""Where the parameters lie: whole on the one device, or cut up among the processes (FSDP2) and whole while in use.

Each decoder layer is a unit of its own and so is the final norm. Embedding and head, which may be tied, are the root's;
nobody calls the head as a module, so what uses it runs `inside` the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hylo.distill.layers import decoder_layers, inside
from hylo.distill.processes import process_count, process_number

T = TypeVar("T")


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Put a model where it trains, in place: whole on one process's device, a share of each parameter on several's."""
    if process_count() == 1:
        return model.to(device)
    mesh = init_device_mesh(device.type, (process_count(),))
    for part in [*decoder_layers(model), model.get_submodule("model.norm")]:
        fully_shard(part, mesh=mesh)
    root = fully_shard(model, mesh=mesh)
    model.run_inside = _run  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_inside")
    # FSDP2 takes for the root whatever runs first, and alignment runs single layers.
    inside(model, lambda: None)
    root.reshard()
    return model


def _run(work: Callable[[], T]) -> T:
    return work()


def exchange_gradients(parts: Iterable[nn.Module], wanted: bool) -> None:
    """Whether a backward pass ends with adding up the processes' gradients of these parts or leaves that to a later."""
    for part in parts:
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(wanted)


def own_parts(model: nn.Module) -> dict[str, Tensor]:
    """What is trained or kept of a model, by name: each process's share, tied weights once."""
    found: dict[int, str] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        found.setdefault(id(tensor), name)
    return {name: state[name] for name in found.values()}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as saved, in host memory of the first process and empty in the others."""
    if process_count() == 1:
        return dict(model.state_dict())
    whole: dict[int, Tensor] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for tensor in own_parts(model).values():
        gathered = whole_value(tensor.detach())
        if process_number() == 0:
            whole[id(tensor)] = gathered.cpu()
    return {name: whole[id(tensor)] for name, tensor in state.items() if id(tensor) in whole}


def whole_value(x: Tensor) -> Tensor:
    """A tensor that may be cut up, put together again in every process."""
    value: Any = x
    return value.full_tensor() if isinstance(x, DTensor) else x
