"""Rows of one sequence out of a contiguous or paged cache."""

from torch import Tensor


def rows(cache: Tensor, block_table: Tensor | None, sequence: int, begin: int, end: int) -> Tensor:
    """[end - begin, row]: the tokens at these positions. Only the pages that hold them are read, and copied."""
    if block_table is None:
        return cache[sequence, begin:end]
    page = cache.shape[1]
    first, last = begin // page, -(-end // page)
    pages = cache.index_select(0, block_table[sequence, first:last])
    return pages.flatten(0, 1)[begin - first * page : end - first * page]
