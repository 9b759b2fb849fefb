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
def gated_delta_rule_can_solve(width: int, /) -> bool: ...
def gated_delta_rule_gradients_parts(width: int, /) -> int: ...

class GatedDeltaRuleShare:
    """What one launch does of a pass: csrc/gated_delta_rule/launch_chunk.h, as all below."""

    solving: bool
    pieces: int
    makers: int
    def __init__(self, solving: bool, takes: str, pieces: int, makers: int, /) -> None: ...

class GatedDeltaRuleChunkCall:
    """One call of the chunked op, launch by launch."""

    def __init__(
        self,
        q: int,
        k: int,
        g: int,
        beta: int,
        cu_seqlens: int,
        records: int,
        ready: int,
        cuts: int,
        shape: tuple[int, ...],
        q_strides: tuple[int, ...],
        k_strides: tuple[int, ...],
        width: int,
        chunks: int,
        segments: int,
        scale: float,
        negligible: float,
        stream: int,
        /,
    ) -> None: ...
    def cuts(self, kernel: Kernel, /) -> None: ...
    def inverse(self, kernel: Kernel, multiprocessors: int, share: GatedDeltaRuleShare, /) -> None: ...
    def outputs(
        self,
        kernel: Kernel,
        share: GatedDeltaRuleShare,
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
        share: GatedDeltaRuleShare,
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
        chains: int,
        d_o: int,
        d_final_state: int,
        dstates: int,
        dx: int,
        d_initial_state: int,
        /,
    ) -> None: ...
    def gradients(
        self,
        kernel: Kernel,
        multiprocessors: int,
        v: int,
        v_strides: tuple[int, ...],
        d_o: int,
        states: int,
        dstates: int,
        written: int,
        dx: int,
        dq: int,
        dk: int,
        dv: int,
        dg: int,
        dbeta: int,
        /,
    ) -> None: ...

def gated_delta_rule_fp32_shared_bytes(kernel: str, width: int, /) -> int: ...

class GatedDeltaRuleFp32Call:
    """One call of the chunked op in fp32, launch by launch: csrc/gated_delta_rule/launch_fp32.h."""

    def __init__(
        self,
        qkv: tuple[int, int, int],
        g: int,
        beta: int,
        cu_seqlens: int,
        records: int,
        shape: tuple[int, ...],
        strides: tuple[tuple[int, ...], ...],
        chunks: int,
        scale: float,
        stream: int,
        /,
    ) -> None: ...
    def inverse(self, kernel: Kernel, /) -> None: ...
    def outputs(self, kernel: Kernel, initial_state: int, o: int, final_state: int, /) -> None: ...
    def share(
        self, d_o: int, states: int, dstates: int, written: int, dx: int, d_scores: int, d_solve: int, /
    ) -> None: ...
    def states(self, kernel: Kernel, initial_state: int, /) -> None: ...
    def dstates(self, kernel: Kernel, d_final_state: int, d_initial_state: int, /) -> None: ...
    def dscores(self, kernel: Kernel, dv: int, dg: int, dbeta: int, /) -> None: ...
    def dqk(self, kernel: Kernel, dq: int, dk: int, dg: int, dbeta: int, /) -> None: ...

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
