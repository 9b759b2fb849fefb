"""python -m bench.cold gated_delta_rule [--out FILE]: how long a user waits for the first forward and backward.

Each start runs in a process of its own with empty disk caches, over short sequences, so that kernels are looked up,
compiled and loaded and little else. `import torch`, `import hylo_ops` and the CUDA context come before the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import gated_delta_rule, record
from bench.shapes import DeltaCase
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

    case: DeltaCase
    backend: str
    packaged: bool
    limit: float


_PUBLISHED = DeltaCase("d128-1k", 1, 1024, 16, 16, 128, 128)
_UNLISTED = DeltaCase("d80-208-1k", 1, 1024, 6, 6, 80, 208)
STARTS = {
    "packaged": Start(_PUBLISHED, "cuda", packaged=True, limit=0.3),
    "unlisted": Start(_UNLISTED, "cuda", packaged=True, limit=5.0),
    "nvrtc": Start(_PUBLISHED, "cuda", packaged=False, limit=5.0),
    "unlisted-nvrtc": Start(_UNLISTED, "cuda", packaged=False, limit=5.0),
    "triton": Start(_PUBLISHED, "triton", packaged=True, limit=30.0),
}


def measure(start: Start, device: str = "cuda") -> dict[str, Any]:
    """Seconds of the first call in this process, or the reason why there is none."""
    if not start.packaged:
        cubin.packaged_path = lambda spec: Path(os.devnull, spec.stem)
    inputs = gated_delta_rule.draw(start.case, "fast", device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    try:
        backward = gated_delta_rule.pending_backward(partial(gated_delta_rule.our_chunk, start.backend), inputs)
        wait()
        middle = time.perf_counter()
        backward()
        wait()
    except NotImplementedError as reason:
        return {"missing": str(reason)}
    end = time.perf_counter()
    return {"seconds": end - begin, "forward_seconds": middle - begin, "backward_seconds": end - middle}


def in_fresh_process(name: str) -> dict[str, Any]:
    """What `measure` gives where nothing is cached on disk."""
    with tempfile.TemporaryDirectory() as empty:
        caches = {variable: str(Path(empty, variable)) for variable in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR")}
        command = [sys.executable, "-m", "bench.cold", "gated_delta_rule", "--only", name]
        answer = subprocess.run(
            command, env={**os.environ, **caches}, cwd=HERE.parent, capture_output=True, text=True, check=False
        )
    if answer.returncode:
        return {"missing": f"failed: {(answer.stderr.strip().splitlines() or ['nothing was printed'])[-1]}"}
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    start = STARTS[name]
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
    parser.add_argument("stem", choices=["gated_delta_rule"])
    parser.add_argument("--only", choices=list(STARTS), help="measure in this process, with the caches as they are")
    parser.add_argument("--out", type=Path, help="JSON file; bench/results/<gpu>/cold_<stem>.json by default")
    parser.add_argument("--commit", help="what the result is of, where there is no git to ask")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: cold starts need an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    if options.only is not None:
        print(json.dumps(measure(STARTS[options.only])))
        return 0
    result: dict[str, Any] = {"meta": record.meta(options.commit), "rows": []}
    gpu = result["meta"]["gpu"].lower().replace(" ", "-")
    out = options.out or HERE / "results" / gpu / f"cold_{options.stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in STARTS:
        found = in_fresh_process(name)
        result["rows"].append(row(name, found))
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {found.get('missing') or '{:.2f} s'.format(found['seconds'])}, limit {STARTS[name].limit} s")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
