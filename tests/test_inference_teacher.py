"""The engine on hybrids of the bundled teacher: real weights, real text, a prompt that takes many chunks."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hylo.inference import Engine
from hylo.quickstart.run import HYBRID, TEACHER
from hylo.upcycle import upcycle


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_tokens_are_those_of_generate(tmp_path, mixer):
    settings = {name: value for name, value in HYBRID.items() if name not in ("mixer", "init")}
    upcycle(TEACHER, mixer=mixer, out=tmp_path / "hybrid", **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hybrid")
    texts = ("def read(path):\n    with open(path) as file:\n" * 12, "import os\n")
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    found = Engine(model, batch=2, capacity=400, chunk=32).generate([ids[0] for ids in prompts], max_new_tokens=24)
    for ids, tokens in zip(prompts, found, strict=True):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert tokens == expected[0, ids.shape[1] :].tolist()
    assert prompts[0].shape[1] > 3 * 32
