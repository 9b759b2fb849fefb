"""The native module: launchers of csrc/, host code only. Pointers and streams are integers where no tensor is named."""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

class Kernel:
    """One kernel of a cubin, loaded on one device until the process ends."""

    def __init__(self, cubin: bytes, name: str, device: int, shared_bytes: int = 0) -> None: ...
    @property
    def registers(self) -> int: ...
    @property
    def local_bytes(self) -> int: ...

class GatedDeltaRuleStep:
    """The decode step, from tensors to its result. What it does not take it answers with the reason.

    The nine tensors are q, k, v, g (raw: a), beta (raw: b), state, A_log, dt_bias, indices; the last three may be None.
    """

    def __init__(
        self, torch: ModuleType, load: Callable[[int, str, str, int, bool, int], Kernel | str], device_type: int = 2
    ) -> None: ...
    def run(
        self,
        tensors: tuple[Tensor | None, ...],
        scale: float | None,
        normalise: bool,
        most_strength: float,
        direct: bool,
        /,
    ) -> Tensor | str: ...
    def why_not(self, tensors: tuple[Tensor | None, ...], /) -> str | None: ...

GATED_DELTA_RULE_RECORD_BYTES: int

def gated_delta_rule_chunk_shared_bytes(kernel: str, width: int, chains: int, /) -> int: ...

class GatedDeltaRuleChunkCall:
    """One call of the chunked op, launch by launch: csrc/gated_delta_rule/launch_chunk.h."""

    def __init__(
        self,
        q: int,
        k: int,
        g: int,
        beta: int,
        cu_seqlens: int,
        records: int,
        shape: tuple[int, ...],
        q_strides: tuple[int, ...],
        k_strides: tuple[int, ...],
        width: int,
        chains: int,
        chunks: int,
        scale: float,
        negligible: float,
        stream: int,
        /,
    ) -> None: ...
    def inverse(self, kernel: Kernel, multiprocessors: int, /) -> None: ...
    def outputs(
        self,
        kernel: Kernel,
        segments: int,
        v: int,
        v_strides: tuple[int, ...],
        initial_state: int,
        o: int,
        final_state: int,
        /,
    ) -> None: ...
    def states(
        self,
        kernel: Kernel,
        segments: int,
        v: int,
        v_strides: tuple[int, ...],
        initial_state: int,
        states: int,
        written: int,
        /,
    ) -> None: ...
    def dstates(
        self,
        kernel: Kernel,
        segments: int,
        d_o: int,
        d_final_state: int,
        dstates: int,
        dx: int,
        d_initial_state: int,
        /,
    ) -> None: ...

def gated_delta_rule_gradients_shared_bytes(width: int, /) -> int: ...
def gated_delta_rule_gradients_parts(width: int, /) -> int: ...
def gated_delta_rule_gradients(
    kernel: Kernel,
    q: int,
    k: int,
    v: int,
    d_o: int,
    h: int,
    dh: int,
    v_new: int,
    dx: int,
    records: int,
    cu_seqlens: int,
    dq: int,
    dk: int,
    dv: int,
    dg: int,
    dbeta: int,
    shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    width: int,
    chunks: int,
    multiprocessors: int,
    scale: float,
    stream: int,
    /,
) -> None: ...
def gated_rms_norm_forward(
    kernel: Kernel,
    x: int,
    gate: int,
    weight: int,
    y: int,
    shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    gate_strides: tuple[int, ...],
    weight_stride_h: int,
    vector: int,
    eps: float,
    norm_before_gate: bool,
    stream: int,
    /,
) -> None: ...
