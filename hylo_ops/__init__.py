"""Fast primitives for hybrid language models: import it in any model; it needs nothing else of this project."""

from hylo_ops import fused
from hylo_ops.causal_conv1d.op import causal_conv1d, recurrent_causal_conv1d
from hylo_ops.gated_delta_rule.op import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hylo_ops.gated_rms_norm.op import gated_rms_norm
from hylo_ops.l2_norm.op import l2_norm
from hylo_ops.linear_kl.op import linear_cross_entropy, linear_kl
from hylo_ops.mla_absorb.fp8 import dequantize_kv_cache, fp8_row_bytes, fp8_row_parts, quantize_kv_cache
from hylo_ops.mla_absorb.op import mla_absorb
from hylo_ops.mla_attention.op import mla_attention
from hylo_ops.mla_prefill.op import mla_prefill
from hylo_ops.rms_norm.op import rms_norm, rms_norm_of_stream
from hylo_ops.sampling.op import sample_tokens
from hylo_ops.skinny_linear.op import skinny_linear, skinny_linear_add_
from hylo_ops.ssd.op import chunk_ssd, recurrent_ssd
from hylo_ops.swiglu.op import swiglu

__all__ = [
    "causal_conv1d",
    "chunk_gated_delta_rule",
    "chunk_ssd",
    "dequantize_kv_cache",
    "fp8_row_bytes",
    "fp8_row_parts",
    "fused",
    "gated_rms_norm",
    "l2_norm",
    "linear_cross_entropy",
    "linear_kl",
    "mla_absorb",
    "mla_attention",
    "mla_prefill",
    "quantize_kv_cache",
    "recurrent_causal_conv1d",
    "recurrent_gated_delta_rule",
    "recurrent_ssd",
    "rms_norm",
    "rms_norm_of_stream",
    "sample_tokens",
    "skinny_linear",
    "skinny_linear_add_",
    "swiglu",
]
