"""python -m bench.train_step: peak memory and tokens a second of one training step at a published model's true dims.

Random bf16 weights, AdamW, activation checkpointing; whatever backend each op takes by default.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import hylo
from bench.models import on_device


def build(layout: str, device: torch.device) -> hylo.HyloForCausalLM:
    """The published layout with random bf16 weights, made on the device, with activation checkpointing."""
    model = on_device(lambda: hylo.HyloForCausalLM(hylo.published_variants()[layout]), device)
    model.gradient_checkpointing_enable()
    return model.train()


def step(model: hylo.HyloForCausalLM, tokens: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """Forward, backward, update; the loss. Fails on a loss or gradient that is not finite."""
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert torch.isfinite(loss), f"loss {loss} with gradient norm {norm}"
    return float(loss)


def measure(layout: str, batch: int, length: int, steps: int) -> dict[str, object]:
    """The first step warms up; the others are timed."""
    device = torch.device("cuda")
    model = build(layout, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=device)
    losses = [step(model, tokens, optimizer)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    losses += [step(model, tokens, optimizer) for _ in range(steps)]
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / steps
    return {
        "layout": layout,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
        "sequence_length": length,
        "dtype": "bf16",
        "activation_checkpointing": True,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seconds_per_step": seconds,
        "tokens_per_second": batch * length / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": losses,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__)
    parser.add_argument("--layout", default="Llama-4MLA12GDN", choices=sorted(hylo.published_variants()))
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: the training step needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    result = measure(options.layout, options.batch, options.length, options.steps)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
