"""The native module: launchers of csrc/, host code only. Pointers and streams are integers where no tensor is named."""

from collections.abc import Callable, Sequence
from types import ModuleType

from torch import Tensor

class Kernel:
    """One kernel of a cubin, loaded on one device until the process ends."""

    def __init__(self, cubin: bytes, name: str, device: int, shared_bytes: int = 0, max_cluster: int = 1) -> None: ...
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
        settled_state: bool,
        direct: bool,
        /,
    ) -> Tensor | str: ...
    def why_not(self, tensors: tuple[Tensor | None, ...], /) -> str | None: ...

class MlaAbsorb:
    """Absorbed latent attention, from tensors to its results. What it does not take it answers with the reason.

    The seven tensors are q_nope, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, key_scale; the last three
    may be None.
    """

    def __init__(
        self,
        torch: ModuleType,
        load: Callable[[int, str, int, int, int, bool, bool, int, int], Kernel | str],
        tickets: Callable[[int, int], Tensor],
        capturing: Callable[[], bool],
        device_type: int = 2,
    ) -> None: ...
    def run(
        self,
        tensors: tuple[Tensor | None, ...],
        scale: float,
        causal: bool,
        fixed_split: bool,
        spread: tuple[int, int] | None,
        /,
    ) -> tuple[Tensor, Tensor] | str: ...
    @property
    def direct(self) -> Callable[..., Tensor | tuple[Tensor, Tensor] | str]:
        """As `run`: of the tensors one by one, scale, causal, fixed_split and return_lse; without that, o alone."""

    def why_not(self, tensors: tuple[Tensor | None, ...], fixed_split: bool, /) -> str | None: ...

class MlaStep:
    """The decode step of a layer of latent attention. What it does not take it answers with the reason.

    The twelve tensors are q_nope, q_rope, kv_new, w_uk, w_uv, kv_cache, cache_seqlens, position, cos, sin,
    cache_starts, block_table; the last two may be None.
    """

    def __init__(
        self,
        torch: ModuleType,
        load: Callable[[int, str, int, int, bool], Kernel | str],
        attention: MlaAbsorb,
        device_type: int = 2,
    ) -> None: ...
    def run(self, tensors: tuple[Tensor | None, ...], scale: float, key_scale: int | None, /) -> Tensor | str: ...
    @property
    def direct(self) -> Callable[..., Tensor | str]:
        """As `run`: of the tensors one by one, scale and key_scale."""

    def why_not(self, tensors: tuple[Tensor | None, ...], key_scale: int | None, /) -> str | None: ...

class SkinnyLinear:
    """Products of few rows with weights, from tensors to y. What it does not take it answers with the reason."""

    def __init__(
        self, torch: ModuleType, load: Callable[[int, str, int, int, int], Kernel | str], device_type: int = 2
    ) -> None: ...
    def run(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        swiglu: bool,
        constant: bool,
        spread: tuple[int, int, int] | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        conv_weight: Tensor | None = None,
        conv_state: Tensor | None = None,
        silu: bool = False,
    ) -> Tensor | str:
        """The residual is updated in place, and given back; so is `conv_state`, but for the latter."""

    def why_not(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        swiglu: bool,
        norm: Tensor | None = None,
        conv_weight: Tensor | None = None,
        conv_state: Tensor | None = None,
    ) -> str | None: ...

class SsdStep:
    """The decode step of the scan, from tensors to its result. What it does not take it answers with the reason.

    The nine tensors are x, dt, a, b, c, state, d, dt_bias, indices; the last three may be None.
    """

    def __init__(
        self, torch: ModuleType, load: Callable[[int, str, str, int, int, int], Kernel | str], device_type: int = 2
    ) -> None: ...
    def run(
        self, tensors: tuple[Tensor | None, ...], softplus: bool, dt_limit: Sequence[float] | None, /
    ) -> Tensor | str: ...
    @property
    def direct(self) -> Callable[..., Tensor | str]:
        """A function of what `run` takes, the tensors too one by one; it refuses what needs torch's dispatcher.

        Made anew each time.
        """

    def why_not(self, tensors: tuple[Tensor | None, ...], /) -> str | None: ...

class Mamba2Step:
    """The decode step of a whole Mamba2 block, likewise.

    The twelve tensors are z, xbc, dt, conv_weight, a, norm_weight, conv_state, state, conv_bias, d, dt_bias, indices;
    the last four may be None. dims: d_state, x_heads, b_heads.
    """

    def __init__(self, torch: ModuleType, load: Callable[..., Kernel | str], device_type: int = 2) -> None: ...
    def run(
        self,
        tensors: tuple[Tensor | None, ...],
        dims: tuple[int, int, int],
        softplus: bool,
        dt_limit: Sequence[float] | None,
        eps: float,
        norm_before_gate: bool,
        settled_state: bool,
        /,
    ) -> Tensor | str: ...
    @property
    def direct(self) -> Callable[..., Tensor | str]:
        """As above, with the dims one by one too."""

    def why_not(self, tensors: tuple[Tensor | None, ...], dims: tuple[int, int, int], /) -> str | None: ...

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

class GatedRmsNormGrid:
    """Blocks of the backward pass, and rows that each takes at once."""

    blocks: int
    rows: int

def gated_rms_norm_backward_grid(
    shape: tuple[int, ...], vector: int, element_bytes: int, weight_bytes: int, multiprocessors: int, /
) -> GatedRmsNormGrid: ...
def gated_rms_norm_backward(
    kernel: Kernel,
    dweight_kernel: Kernel,
    grid: GatedRmsNormGrid,
    dy_x_gate_weight: tuple[int, int, int, int],
    dx_dgate_dweight: tuple[int, int, int],
    partials: int,
    shape: tuple[int, ...],
    dy_x_gate_strides: tuple[tuple[int, ...], ...],
    weight_stride_h: int,
    shared_weight: bool,
    vector: int,
    element_bytes: int,
    eps: float,
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
