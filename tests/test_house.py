"""The house rules that no linter knows: what hylo may import of hylo_ops, and that every operator is complete."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hylo_ops

ROOT = Path(__file__).parents[1]
STEMS = (
    "causal_conv1d",
    "gated_delta_rule",
    "gated_rms_norm",
    "l2_norm",
    "linear_kl",
    "mla_absorb",
    "mla_attention",
    "mla_prefill",
    "rms_norm",
    "skinny_linear",
    "ssd",
    "swiglu",
)


def imports_of_ops(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hylo_ops":
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "hylo").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_hylo_uses_only_public_names(path):
    public = {"hylo_ops": set(hylo_ops.__all__), "hylo_ops.fused": set(hylo_ops.fused.__all__)}
    hidden = [(module, name) for module, name in imports_of_ops(path) if name not in public.get(module, ())]
    assert hidden == []


@pytest.mark.parametrize("stem", STEMS)
def test_an_operator_is_found_by_its_name(stem):
    for part in (
        f"hylo_ops/{stem}/op.py",
        f"hylo_ops/{stem}/reference.py",
        f"tests/ops/test_{stem}.py",
        f"docs/{stem}.md",
    ):
        assert (ROOT / part).is_file(), part


def test_importing_hylo_ops_touches_neither_cuda_nor_triton():
    code = (
        "import sys, torch; before = set(sys.modules); import hylo_ops; "
        "assert not torch.cuda.is_initialized(); "
        "new = [m for m in set(sys.modules) - before if m.split('.')[0] in ('triton', 'cuda', 'hylo')]; "
        "sys.exit(f'imported {new}' if new or 'hylo_ops._C' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_op_says_what_it_takes_and_raises():
    for name in hylo_ops.__all__:
        function = getattr(hylo_ops, name)
        if callable(function):
            for section in ("Dims:", "Args:", "Returns:", "Raises:", "Numerics:", "Source:"):
                assert section in function.__doc__, f"{name} lacks {section}"
