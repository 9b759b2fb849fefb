"""The choice of a backend, where one is listed twice: ahead of others for some inputs and behind them for the rest."""

import pytest

from hylo_ops.backend import Backend, choose


def listed(reason, *names):
    """Backends that cannot run odd x; the first one does not want x above 2 either."""
    odd = [lambda x, limit=limit: reason if x % 2 or x > limit else None for limit in (2, 8, 8)]
    return [Backend(name, why_not, forward=None) for name, why_not in zip(names, odd, strict=True)]


@pytest.mark.parametrize(
    ("requested", "x", "index"), [(None, 2, 0), (None, 4, 1), ("cuda", 2, 0), ("cuda", 4, 2), ("triton", 2, 1)]
)
def test_the_first_that_takes_the_inputs(requested, x, index):
    backends = listed("x is odd", "cuda", "triton", "cuda")
    assert choose("op", backends, requested, {"x": x}) is backends[index]


def test_each_reason_and_name_once():
    backends = listed("x is odd", "cuda", "triton", "cuda")
    with pytest.raises(NotImplementedError, match=r"^op cannot run these inputs on cuda: x is odd; triton: x is odd$"):
        choose("op", backends, None, {"x": 3})
    with pytest.raises(NotImplementedError, match=r"^op has no backend 'rocm'; it has \['cuda', 'triton'\]$"):
        choose("op", backends, "rocm", {"x": 2})
