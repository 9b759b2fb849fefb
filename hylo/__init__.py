"""Hybrid language models out of pretrained Transformers. Importing it makes the Auto classes know them."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hylo.config import HyloConfig, published_variants
from hylo.errors import UserError
from hylo.model import HyloForCausalLM, HyloModel

AutoConfig.register("hylo", HyloConfig, exist_ok=True)
AutoModel.register(HyloConfig, HyloModel, exist_ok=True)
AutoModelForCausalLM.register(HyloConfig, HyloForCausalLM, exist_ok=True)

__all__ = ["HyloConfig", "HyloForCausalLM", "HyloModel", "UserError", "published_variants"]
