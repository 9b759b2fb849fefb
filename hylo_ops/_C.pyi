"""The native module: launchers of csrc/, host code only. Pointers and streams are integers."""

class Kernel:
    """One kernel of a cubin, loaded on one device until the process ends."""

    def __init__(self, cubin: bytes, name: str, device: int, shared_bytes: int = 0) -> None: ...
    @property
    def registers(self) -> int: ...
    @property
    def local_bytes(self) -> int: ...

def gated_delta_rule_record_size() -> int: ...
def gated_delta_rule_shared_bytes(width: int, warpgroups: int, /) -> tuple[int, int]: ...
def gated_delta_rule_forward(
    inverse: Kernel,
    output: Kernel,
    q: int,
    k: int,
    v: int,
    g: int,
    beta: int,
    initial_state: int,
    cu_seqlens: int,
    records: int,
    o: int,
    final_state: int,
    shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    warpgroups: int,
    chunks: int,
    segments: int,
    scale: float,
    negligible: float,
    stream: int,
    /,
) -> None: ...
def gated_delta_rule_step(
    kernel: Kernel,
    q: int,
    k: int,
    v: int,
    g: int,
    beta: int,
    state: int,
    indices: int,
    o: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    state_bytes: int,
    wide_indices: bool,
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
