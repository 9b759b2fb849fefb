"""The CUDA gated RMS norm on a GPU: packaged and NVRTC code against float64, streams, graphs, large offsets."""

import threading

import pytest
import torch

import hylo_ops
from hylo_ops import cubin
from hylo_ops.gated_rms_norm import cuda
from tests.csrc.gated_rms_norm_cases import (
    BACKWARD_CASES,
    CASES,
    Case,
    exact,
    gradients_of,
    run_and_check,
    run_and_check_backward,
    slice_of_projection,
)

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LISTED_WIDTHS = (64, 128, 512, 2048)
LARGE = [
    Case((2, 1001, 6, 512), torch.bfloat16, 8, gate_layout=slice_of_projection, label="gdn"),
    Case((2, 1001, 32, 64), torch.bfloat16, 8, False, True, gate_layout=slice_of_projection, label="mamba2"),
    Case((1, 1001, 16, 128), torch.float16, 8, False, True, label="mamba2"),
    Case((1, 1001, 16, 128), torch.float32, 4, label="fp32"),
    Case((1, 1001, 6, 512), torch.float32, 4, False, True, label="fp32"),
    Case((2, 1001, 1, 2048), torch.bfloat16, 8, False, gate_layout=slice_of_projection, label="mamba2_group"),
    Case((2, 333, 1, 8192), torch.bfloat16, 8, False, label="mamba2_whole"),
]
ALL = [*CASES, *LARGE]


def is_packaged(case: Case) -> bool:
    same_type = case.weight_dtype in (None, case.dtype)
    return case.shape[3] in LISTED_WIDTHS and same_type and case.vector * case.dtype.itemsize == 16


def forward_from(source):
    def forward(*args):
        return cuda.forward(*args, cubin_source=source)

    return forward


def backward_from(source):
    def backward(*args):
        return cuda.backward(*args, cubin_source=source)

    return backward


@pytest.fixture
def nan_filled():
    """New tensors are filled with NaN, so an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_cpu_tensor_is_refused_with_the_reason():
    x, gate, weight = ALL[0].inputs("cpu")
    assert cuda.why_not(x, gate, weight) == "x is on cpu, not on a CUDA device"


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (9, 4)])
def test_another_architecture_is_refused_with_the_reason(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = cubin.why_not_device.__wrapped__(3)
    assert reason == f"cuda:3 has compute capability {capability}, the kernel is compiled for (9, 0)"


def test_a_torch_for_another_vendor_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cubin.why_not_device.__wrapped__(0) == "this torch is not built for CUDA"


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("case", [c for c in ALL if is_packaged(c)], ids=lambda c: c.name)
    def test_packaged_agrees_with_float64(self, case, nan_filled):
        run_and_check(case, "cuda", forward_from("packaged"))

    @pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
    def test_nvrtc_agrees_with_float64(self, case, nan_filled):
        run_and_check(case, "cuda", forward_from("nvrtc"))

    @pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
    def test_public_op_agrees_with_float64(self, case, nan_filled):
        def forward(x, gate, weight, eps, norm_before_gate):
            return hylo_ops.gated_rms_norm(x, gate, weight, eps=eps, norm_before_gate=norm_before_gate, backend="cuda")

        run_and_check(case, "cuda", forward)

    @pytest.mark.parametrize("case", [c for c in [*ALL, *BACKWARD_CASES] if is_packaged(c)], ids=lambda c: c.name)
    def test_packaged_gradients_agree_with_float64(self, case, nan_filled):
        run_and_check_backward(case, "cuda", backward_from("packaged"))

    @pytest.mark.parametrize("case", [*ALL, *BACKWARD_CASES], ids=lambda c: c.name)
    def test_nvrtc_gradients_agree_with_float64(self, case, nan_filled):
        run_and_check_backward(case, "cuda", backward_from("nvrtc"))

    @pytest.mark.parametrize("case", LARGE, ids=lambda c: c.name)
    def test_gradients_of_the_public_op(self, case):
        """Through autograd; None picks this backend both ways."""
        inputs, dy = case.inputs("cuda"), case.dy("cuda")

        def norm_by(backend):
            return lambda x, gate, weight, eps, norm_before_gate: hylo_ops.gated_rms_norm(
                x, gate, weight, eps=eps, norm_before_gate=norm_before_gate, backend=backend
            )

        options = case.eps, case.norm_before_gate
        direct = cuda.backward([dy], *inputs, *options)
        for backend in (None, "cuda"):
            found = gradients_of(norm_by(backend), inputs, options, dy)
            assert all(torch.equal(a, b) for a, b in zip(found, direct, strict=True))

    @pytest.mark.parametrize("case", LARGE, ids=lambda c: c.name)
    def test_gradients_of_a_row_do_not_depend_on_others(self, case):
        (x, gate, weight), dy = case.inputs("cuda"), case.dy("cuda")
        dx, dgate, _ = cuda.backward([dy], x, gate, weight, case.eps, case.norm_before_gate)
        last = [t[-1:, -1:] for t in (dy, x, gate)]
        alone = cuda.backward([last[0]], *last[1:], weight, case.eps, case.norm_before_gate)
        assert torch.equal(dx[-1:, -1:], alone[0])
        assert torch.equal(dgate[-1:, -1:], alone[1])

    def test_the_backward_is_captured_in_a_graph_on_the_callers_stream(self):
        case = LARGE[1]
        (x, gate, weight), dy = case.inputs("cuda"), case.dy("cuda")
        cuda.backward([dy], x, gate, weight, case.eps, False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cuda.backward([dy], x, gate, weight, case.eps, False)
        dy.mul_(-3)
        for gradient in captured:
            gradient.zero_()
        graph.replay()
        for found, wanted in zip(captured, cuda.backward([dy], x, gate, weight, case.eps, False), strict=True):
            assert torch.equal(found, wanted)

    def test_a_gradient_past_2_to_the_31_elements(self):
        """As the forward's test below: only the last tokens are compared; 4.3 GB a tensor, five of them."""
        tokens = 2**31 // (32 * 64) + 100
        shape = (1, tokens, 32, 64)
        x, gate, dy = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        weight = torch.randn(32, 64, dtype=torch.bfloat16, device="cuda")
        dx, dgate, _ = cuda.backward([dy], x, gate, weight, 1e-5, False)
        last = [t[:, -150:] for t in (dy, x, gate)]
        alone = cuda.backward([last[0]], *last[1:], weight, 1e-5, False)
        assert torch.equal(dx[:, -150:], alone[0])
        assert torch.equal(dgate[:, -150:], alone[1])

    def test_unlisted_shape_is_not_packaged(self):
        x, gate, weight = Case((1, 2, 2, 24), torch.bfloat16, 8).inputs("cuda")
        with pytest.raises(NotImplementedError, match="no cubin is packaged for gated_rms_norm-kernel-V24"):
            cuda.forward(x, gate, weight, 1e-5, True, cubin_source="packaged")

    @pytest.mark.parametrize("case", LARGE, ids=lambda c: c.name)
    def test_same_bits_again_and_alone(self, case):
        """Deterministic, and a batch entry does not depend on its neighbours."""
        x, gate, weight = case.inputs("cuda")
        y = cuda.forward(x, gate, weight, case.eps, case.norm_before_gate)
        assert torch.equal(y, cuda.forward(x, gate, weight, case.eps, case.norm_before_gate))
        alone = cuda.forward(x[-1:, -1:], gate[-1:, -1:], weight, case.eps, case.norm_before_gate)
        assert torch.equal(y[-1:, -1:], alone)

    def test_runs_on_the_callers_stream(self):
        case = LARGE[0]
        x, gate, weight = case.inputs("cuda")
        wanted = cuda.forward(x, gate, weight, case.eps, True)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            y = cuda.forward(late, gate, weight, case.eps, True)
        stream.synchronize()
        assert torch.equal(y, wanted)

    def test_is_captured_in_a_graph(self):
        case = LARGE[1]
        x, gate, weight = case.inputs("cuda")
        cuda.forward(x, gate, weight, case.eps, False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cuda.forward(x, gate, weight, case.eps, False)
        x.mul_(-3)
        y.zero_()
        graph.replay()
        assert torch.equal(y, cuda.forward(x, gate, weight, case.eps, False))

    def test_never_synchronises(self):
        x, gate, weight = LARGE[0].inputs("cuda")
        cuda.forward(x, gate, weight, 1e-5, True)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        cuda.forward(x, gate, weight, 1e-5, True)
        assert not torch.cuda.current_stream().query()
        torch.cuda.synchronize()

    def test_runs_in_a_thread_of_its_own(self):
        x, gate, weight = LARGE[0].inputs("cuda")
        wanted = cuda.forward(x, gate, weight, 1e-5, True)
        got = []
        thread = threading.Thread(target=lambda: got.append(cuda.forward(x, gate, weight, 1e-5, True)))
        thread.start()
        thread.join()
        assert torch.equal(got[0], wanted)

    def test_offsets_past_2_to_the_31_elements(self):
        """Row 2^31 / 64 and later; 4.3 GB a tensor. Only the last tokens are compared."""
        tokens = 2**31 // (32 * 64) + 100
        shape = (1, tokens, 32, 64)
        x = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        gate = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(32, 64, dtype=torch.bfloat16, device="cuda")
        y = cuda.forward(x, gate, weight, 1e-5, False)[:, -150:]
        alone = cuda.forward(x[:, -150:], gate[:, -150:], weight, 1e-5, False)
        assert torch.equal(y, alone)
        wanted = exact(x[:, -150:], gate[:, -150:], weight, 1e-5, False)
        assert float((y.double() - wanted).norm() / wanted.norm()) < 4e-3

    def test_nothing_in_local_memory(self):
        case = LARGE[0]
        spec = cubin.Spec("gated_rms_norm", case.defines)
        for source in ("packaged", "nvrtc"):
            kernel = cubin.load(spec, cuda.KERNEL, 0, source=source)
            assert kernel.local_bytes == 0
            assert 0 < kernel.registers <= 64

    def test_a_wrong_kernel_name_is_reported(self):
        spec = cubin.Spec("gated_rms_norm", LARGE[0].defines)
        with pytest.raises(RuntimeError, match="cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND"):
            cubin.load(spec, "no_such_kernel", 0)

    def test_refusals_name_the_reason(self):
        x, gate, weight = (t.cuda() for t in CASES[0].inputs("cpu"))
        assert cuda.why_not(x, gate, weight) is None
        assert "not bfloat16" in cuda.why_not(x.double(), gate.double(), weight.double())
        assert "gate is torch.float32" in cuda.why_not(x, gate.float(), weight)
        assert "weight is torch.float16" in cuda.why_not(x, gate, weight.half())
        transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
        assert "the last dim of x is not contiguous" in cuda.why_not(transposed, gate, weight)
        wide = torch.empty(1, 1, 1, cuda.MAX_WIDTH + 8, dtype=torch.bfloat16, device="cuda")
        assert "V is 16392" in cuda.why_not(wide, wide, wide[0, 0, 0])
