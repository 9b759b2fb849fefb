"""Short depthwise causal convolution with an optional SiLU: training, prefill and decode."""
