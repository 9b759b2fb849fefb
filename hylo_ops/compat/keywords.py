"""Keywords that transformers' models hand down to an op along with those that it has."""

from collections.abc import Collection

# A model's forward hands all of its keyword arguments down. None of these changes the result of an op that does not
# have it as an argument; any other name is a mistake or an option that we lack, and is refused.
_OF_THE_MODEL = {
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("position_ids", "position_embeddings", "seq_idx", "is_causal", "num_items_in_batch"),
    *("cu_seq_lens_k", "max_length_q", "max_length_k"),
}


def refuse_unknown(function: str, given: Collection[str], *, packed: bool = False) -> None:
    """Raises TypeError for what is not a model's.

    Args:
        packed: the op knows where sequences begin, so attention's bounds of them may come too.
    """
    unknown = sorted(set(given) - _OF_THE_MODEL - ({"cu_seq_lens_q"} if packed else set()))
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
