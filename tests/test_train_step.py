"""The true-size training step, at a tiny size on a CPU: it trains, and refuses a step that is not finite."""

import pytest
import torch

from bench.train_step import step
from tests.test_model import make_model, tokens


def test_steps_lower_the_loss():
    model = make_model(dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [step(model, tokens(), optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_a_broken_step_is_not_counted():
    model = make_model(dtype=torch.float32).train()
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        step(model, tokens(), torch.optim.AdamW(model.parameters()))
