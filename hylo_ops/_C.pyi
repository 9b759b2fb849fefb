"""The native module: launchers of csrc/, host code only. Pointers and streams are integers."""

class Kernel:
    """One kernel of a cubin, loaded on one device until the process ends."""

    def __init__(self, cubin: bytes, name: str, device: int) -> None: ...
    @property
    def registers(self) -> int: ...
    @property
    def local_bytes(self) -> int: ...

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
