"""Gates as the projections of a layer give them, for steps that activate them inside."""

from typing import NamedTuple

from torch import Tensor


class Activation(NamedTuple):
    """With it g and beta are raw a and b: g = -exp(A_log) softplus(a + dt_bias), beta = most_strength sigmoid(b).

    Args:
        a_log, dt_bias: [H].
        qk_l2norm: q and k are divided by sqrt(sum of squares + 1e-6) first.
    """

    a_log: Tensor
    dt_bias: Tensor
    qk_l2norm: bool
    most_strength: float
