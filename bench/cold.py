"""python -m bench.cold STEM [--out FILE]: how long a user waits for the first forward, and backward where there is one.

Each start runs in a process of its own with empty disk caches, over short sequences, so that kernels are looked up,
compiled and loaded and little else. `import torch`, `import hylo_ops` and the CUDA context come before the clock.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.shapes import ConvCase, DeltaCase, LatentCase, ScanCase
from hylo_ops import cubin
from hylo_ops.testing import DTYPE_NAMES

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Start:
    """A backend's first call on a shape.

    Args:
        packaged: whether the cubins of the installation may be taken; else the kernels are compiled, as in an
            installation that was made without nvcc.
        limit: seconds of forward and backward together that are thought bearable.
    """

    case: ConvCase | DeltaCase | LatentCase | ScanCase
    backend: str
    packaged: bool
    limit: float


_DELTA = DeltaCase("d128-1k", 1, 1024, 16, 16, 128, 128)
_DELTA_UNLISTED = DeltaCase("d80-208-1k", 1, 1024, 6, 6, 80, 208)
_HYLO = ScanCase("hylo-1b-1k", 1, 1024, 32, 32, 64, 64, 8, 8)
_MAMBA2 = ScanCase("mamba2-1k", 1, 1024, 1, 32, 128, 64, 32, 1)
_SSD_UNLISTED = ScanCase("k112-v80-1k", 1, 1024, 2, 6, 112, 80, 6, 2)
_CONV = ConvCase("d2304-1k", 1, 1024, 2304)
_CONV_UNLISTED = ConvCase("d1000-w3-1k", 1, 1024, 1000, 3)
_LATENT = LatentCase("hylo-1b-1k", 1, 1024, 32, 128, 32, 32, 64)
_LATENT_UNLISTED = LatentCase("h12-r160-e64-1k", 1, 1024, 12, 160, 64, 64, 128)
STARTS = {
    "gated_delta_rule": {
        "packaged": Start(_DELTA, "cuda", packaged=True, limit=0.3),
        "unlisted": Start(_DELTA_UNLISTED, "cuda", packaged=True, limit=5.0),
        "nvrtc": Start(_DELTA, "cuda", packaged=False, limit=5.0),
        "unlisted-nvrtc": Start(_DELTA_UNLISTED, "cuda", packaged=False, limit=5.0),
        "triton": Start(_DELTA, "triton", packaged=True, limit=30.0),
    },
    "ssd": {
        "packaged": Start(_HYLO, "cuda", packaged=True, limit=0.3),
        "packaged-mamba2": Start(_MAMBA2, "cuda", packaged=True, limit=0.3),
        "unlisted": Start(_SSD_UNLISTED, "cuda", packaged=True, limit=5.0),
        "nvrtc": Start(_HYLO, "cuda", packaged=False, limit=5.0),
        "unlisted-nvrtc": Start(_SSD_UNLISTED, "cuda", packaged=False, limit=5.0),
        "triton": Start(_HYLO, "triton", packaged=True, limit=30.0),
        "triton-mamba2": Start(_MAMBA2, "triton", packaged=True, limit=30.0),
    },
    "mla_absorb": {
        "packaged": Start(_LATENT, "cuda", packaged=True, limit=0.3),
        "unlisted": Start(_LATENT_UNLISTED, "cuda", packaged=True, limit=5.0),
        "nvrtc": Start(_LATENT, "cuda", packaged=False, limit=5.0),
        "triton": Start(_LATENT, "triton", packaged=True, limit=30.0),
    },
    "causal_conv1d": {
        "triton": Start(_CONV, "triton", packaged=True, limit=30.0),
        "triton-unlisted": Start(_CONV_UNLISTED, "triton", packaged=True, limit=30.0),
    },
}


def measure(stem: str, start: Start, device: str = "cuda") -> dict[str, Any]:
    """Seconds of the first call in this process, or the reason why there is none."""
    if not start.packaged:
        cubin.packaged_path = lambda spec: Path(os.devnull, spec.stem)
    forward = importlib.import_module(f"bench.{stem}").first_call(start.case, start.backend, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    try:
        backward = forward()
        wait()
        middle = time.perf_counter()
        backward()
        wait()
    except NotImplementedError as reason:
        return {"missing": str(reason)}
    end = time.perf_counter()
    return {"seconds": end - begin, "forward_seconds": middle - begin, "backward_seconds": end - middle}


def in_fresh_process(stem: str, name: str) -> dict[str, Any]:
    """What `measure` gives where nothing is cached on disk."""
    with tempfile.TemporaryDirectory() as empty:
        caches = {variable: str(Path(empty, variable)) for variable in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR")}
        command = [sys.executable, "-m", "bench.cold", stem, "--only", name]
        answer = subprocess.run(
            command, env={**os.environ, **caches}, cwd=HERE.parent, capture_output=True, text=True, check=False
        )
    if answer.returncode:
        return {"missing": f"failed: {(answer.stderr.strip().splitlines() or ['nothing was printed'])[-1]}"}
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def row(stem: str, name: str, found: dict[str, Any]) -> dict[str, Any]:
    start = STARTS[stem][name]
    return {
        "case": start.case.name,
        "shape": start.case.shape,
        "dtype": DTYPE_NAMES[start.case.dtype],
        "pass": "forward_backward",
        "backend": start.backend,
        "start": name,
        **found,
        "limit_seconds": start.limit,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=__doc__.split("\n")[0])
    parser.add_argument("stem", choices=list(STARTS))
    parser.add_argument("--only", metavar="START", help="measure in this process, with the caches as they are")
    parser.add_argument("--out", type=Path, help="JSON file; bench/results/<gpu>/cold_<stem>.json by default")
    parser.add_argument("--commit", help="what the result is of, where there is no git to ask")
    options = parser.parse_args(arguments)
    starts = STARTS[options.stem]
    if options.only not in (None, *starts):
        parser.error(f"{options.stem} has no start {options.only!r}; it has {', '.join(starts)}")
    if not torch.cuda.is_available():
        print("error: cold starts need an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    if options.only is not None:
        print(json.dumps(measure(options.stem, starts[options.only])))
        return 0
    result: dict[str, Any] = {"meta": record.meta(options.commit), "rows": []}
    gpu = result["meta"]["gpu"].lower().replace(" ", "-")
    out = options.out or HERE / "results" / gpu / f"cold_{options.stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, start in starts.items():
        found = in_fresh_process(options.stem, name)
        result["rows"].append(row(options.stem, name, found))
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {found.get('missing') or '{:.2f} s'.format(found['seconds'])}, limit {start.limit} s")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
