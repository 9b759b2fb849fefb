"""Test helper: the llama2.c checkpoint stories260K as a Hugging Face Llama directory with its tokenizer.

The files are not part of this repository: they are read from ../shared/data beside it, and whoever needs them
skips when they are absent.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHECKPOINT = DATA / "checkpoints" / "stories260K" / "stories260K.bin"
TOKENIZER = DATA / "checkpoints" / "stories260K" / "tok512.bin"
TEXT = DATA / "text" / "tinystories" / "tinystories_v2_10k.txt"
PROMPT_IDS = [1, 403, 407, 261, 378]  # "Once upon a time" after the start token
GREEDY_IDS = [432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337, 410, 408, 419, 292]


def require_data() -> None:
    """Skip the calling test, saying so, where the checkpoint is not beside the repository."""
    missing = [str(path.name) for path in (CHECKPOINT, TOKENIZER, TEXT) if not path.is_file()]
    if missing:
        pytest.skip(f"stories260K data not found beside the repository (missing {', '.join(missing)})")


def load_model(path: Path = CHECKPOINT) -> LlamaForCausalLM:
    """Read a llama2.c v0 checkpoint (seven int32, then fp32 tensors) into a fp32 LlamaForCausalLM."""
    raw = path.read_bytes()
    dim, hidden, n_layers, n_heads, n_kv, vocab, max_len = struct.unpack("<7i", raw[:28])
    head_dim = dim // n_heads
    flat, offset = np.frombuffer(raw, dtype="<f4", offset=28), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        size = int(np.prod(shape))
        part = torch.from_numpy(flat[offset : offset + size].reshape(shape).copy())
        offset += size
        return part

    def half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
        # llama2.c rotates interleaved rows (0, 1), (2, 3), ...; Hugging Face rotates (i, i + head_dim / 2)
        return weight.view(heads, head_dim // 2, 2, dim).transpose(1, 2).reshape(heads * head_dim, dim)

    config = LlamaConfig(
        vocab_size=abs(vocab), hidden_size=dim, intermediate_size=hidden, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=n_kv, max_position_embeddings=max_len,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    state = {"model.embed_tokens.weight": take(abs(vocab), dim)}
    order = {
        "input_layernorm": (dim,), "self_attn.q_proj": (n_heads * head_dim, dim),
        "self_attn.k_proj": (n_kv * head_dim, dim), "self_attn.v_proj": (n_kv * head_dim, dim),
        "self_attn.o_proj": (dim, n_heads * head_dim), "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim), "mlp.down_proj": (dim, hidden), "mlp.up_proj": (hidden, dim),
    }  # fmt: skip
    for name, shape in order.items():
        for i, weight in enumerate(take(n_layers, *shape)):
            heads = {"self_attn.q_proj": n_heads, "self_attn.k_proj": n_kv}.get(name)
            state[f"model.layers.{i}.{name}.weight"] = half_split(weight, heads) if heads else weight
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(state)
    return model.eval()


def read_pieces(path: Path = TOKENIZER) -> list[tuple[bytes, float]]:
    """Read llama2.c's tokenizer file: int32 longest piece, then float32 score, int32 length and bytes of each."""
    raw, offset, pieces = path.read_bytes(), 4, []
    while offset < len(raw):
        score, length = struct.unpack_from("<fi", raw, offset)
        pieces.append((raw[offset + 8 : offset + 8 + length], score))
        offset += 8 + length
    return pieces


def load_tokenizer(path: Path = TOKENIZER) -> PreTrainedTokenizerFast:
    """The same greedy best-score BPE with byte fallback, as a fast Hugging Face tokenizer."""
    pieces = read_pieces(path)
    names = [raw.strip(b"\n").decode("utf-8").replace(" ", "▁") for raw, _ in pieces[:3]]
    names += [raw.decode("utf-8").replace(" ", "▁") for raw, _ in pieces[3:]]
    vocab = {name: i for i, name in enumerate(names)}
    ranked = sorted(range(259, len(pieces)), key=lambda i: (-pieces[i][1], i))
    merges = [
        (names[i][:cut], names[i][cut:])
        for i in ranked
        for cut in range(1, len(names[i]))
        if names[i][:cut] in vocab and names[i][cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def write_base(directory: Path) -> Path:
    """Write the checkpoint and its tokenizer as a Hugging Face directory; returns it."""
    load_model().save_pretrained(directory)
    load_tokenizer().save_pretrained(directory)
    return directory


def stories() -> list[str]:
    """The stories of the held text, newline runs made one, in file order."""
    parts = TEXT.read_text(encoding="utf-8").split("<|endoftext|>")
    return ["\n".join(line for line in part.strip().split("\n") if line) for part in parts if part.strip()]


def encode(texts: list[str], length: int, count: int) -> torch.Tensor:
    """The first `count` of the texts with at least `length` tokens, cut to it: [count, length] int64."""
    tokenizer = load_tokenizer()
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            break
    return torch.tensor(rows)
