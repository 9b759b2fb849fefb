"""Layers run again in the backward, whole or but for attention: the same numbers, and attention once."""

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.steps import random_steps
from hylo.distill.layers import final_hidden
from hylo.distill.recomputing import recompute_layers
from tests.test_model import make_model, tokens
from tests.test_train_step import CPU, tiny

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Calls(TorchDispatchMode):
    """How often operators run, and which results of attention are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()
        self._results: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[func] += 1
        if func is ATTENTION:
            self._results += [weakref.ref(tensor.untyped_storage()) for tensor in result]
        return result

    @property
    def alive(self) -> int:
        return sum(result() is not None for result in self._results)


def steps(layout: str, **stage: Any) -> tuple[list[Tensor], Counter[Any]]:
    """Losses, gradient norms and at last the weights of two steps of two micro-batches, and what ran."""
    made = random_steps(tiny(layout, batch_size=1, gradient_accumulation=2, **stage), 1, CPU, 2)
    with Calls() as calls:
        found = [value for step in range(2) for value in made.run(step)]
    return [*found, *made.parameters], calls.counts


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("layout", ["4mla12gdn", "4mla12m2"])
def test_attention_that_is_kept_gives_the_same_bits_and_runs_once(layout: str, tile: int | None) -> None:
    """The engine's steps in bf16; one of the three layers has attention, and both of the teacher's."""
    options = {"mlp_tile_tokens": tile}
    whole, selective = (steps(layout, activation_checkpointing=way, **options) for way in (True, "selective"))
    assert all(map(torch.equal, whole[0], selective[0]))
    passes = 2 * 2
    assert whole[1][ATTENTION] == passes * (2 + 2)
    assert selective[1][ATTENTION] == passes * (1 + 2)
    products = torch.ops.aten.mm.default
    assert whole[1][products] == selective[1][products]


@pytest.mark.parametrize("keep", [False, True], ids=["whole", "selective"])
@pytest.mark.parametrize("end", ["backward", "dropped"])
def test_what_attention_returned_goes_with_the_backward(end: str, keep: bool) -> None:
    """Two results of each of two layers, while the graph is still there and without the collector's help."""
    model = make_model("gdn", torch.float32).train()
    recompute_layers(model, keep_attention=keep)
    gc.disable()
    try:
        with Calls() as calls:
            hidden = final_hidden(model, tokens())
            assert calls.alive == 2 * 2 * keep
            if end == "backward":
                hidden.sum().backward()
            else:
                del hidden
        assert calls.alive == 0
    finally:
        gc.enable()


def test_attention_that_is_no_single_operator_runs_again() -> None:
    """Keys wider than values, which PyTorch's attention on a CPU composes."""
    gradients = []
    for keep in (False, True):
        model = make_model("gdn", torch.float32, qk_nope_head_dim=12).train()
        recompute_layers(model, keep_attention=keep)
        with Calls() as calls:
            final_hidden(model, tokens()).sum().backward()
        assert ATTENTION not in calls.counts
        gradients.append([parameter.grad for parameter in model.model.parameters()])
    assert all(map(torch.equal, *gradients))
