"""The RMS norm of layers and queries."""

import torch
from torch import Tensor, nn

from hylo.mixers.packing import autocast_dtype
from hylo_ops import rms_norm, rms_norm_of_stream


class RMSNorm(nn.RMSNorm):
    """PyTorch's; where a gradient is wanted or on a GPU by one op, with the sum before it and the cast after it."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, *, stream: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[..., D] -> [..., D]; of `residual` + x if that is given, and then that sum with it, in the residual's dtype.

        Args:
            stream: x comes with it as well, for whoever goes on with that.
            dtype: of the norm. If None, what products take it in: with a gradient autocast's where that is on.
        """
        if (torch.is_grad_enabled() or x.is_cuda) and not torch.compiler.is_compiling():
            return self._by_one_op(x, residual, stream, dtype)
        total = x if residual is None else residual + x
        # autocast leaves the weight wide
        y = super().forward(total) if dtype is None else super().forward(total.to(self.weight.dtype)).to(dtype)
        return (y, total) if stream or residual is not None else y

    def _by_one_op(
        self, x: Tensor, residual: Tensor | None, stream: bool, dtype: torch.dtype | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert self.eps is not None
        read = x if residual is None else residual
        dtype = dtype or autocast_dtype(read) or read.dtype
        if residual is not None:
            return rms_norm(x, self.weight, eps=self.eps, residual=residual, dtype=dtype)
        return (rms_norm_of_stream if stream else rms_norm)(x, self.weight, eps=self.eps, dtype=dtype)
