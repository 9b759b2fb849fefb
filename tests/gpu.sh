#!/usr/bin/env bash
# What the kernels need an NVIDIA GPU for, in one run: build, tests, sanitizer, benchmark.
#
#     tests/gpu.sh OUT_DIR [COMMIT]
#
# Leaves in OUT_DIR: environment.txt build.log pytest.log memcheck.log racecheck.log initcheck.log; of the cold starts and
# of each benchmark a log and a result; train_step.json summary.txt. Every step runs; the exit status is 1 if any failed.
# PYTHON names the interpreter.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: tests/gpu.sh OUT_DIR [COMMIT]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
commit=${2:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
failed=0
: >"$out/summary.txt"

step() { # step NAME COMMAND...: its output goes to NAME.log, its verdict and last lines to summary.txt
  local name=$1 begin=$SECONDS status
  shift
  "$@" >"$out/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=1
  { echo "== $name: exit $status, $((SECONDS - begin)) s: $*"; tail -n 3 "$out/$name.log"; } | tee -a "$out/summary.txt"
}

environment() {
  echo "commit $commit"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  nvcc --version | tail -n 2
  "$python" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'
  "$python" -m pip list 2>/dev/null | grep -i -E '^(cuda|nvidia-cuda|triton|transformers|pybind11|setuptools|cmake|ninja|flash|mamba|fla)'
}

step environment environment
mv "$out/environment.log" "$out/environment.txt"
step build "$python" -m pip install --no-build-isolation --no-deps -e .
step pytest "$python" -m pytest -m gpu -ra -q tests/compat tests/csrc tests/ops tests/test_model_gpu.py \
  tests/test_inference_gpu.py tests/test_memory_gpu.py tests/test_distill_gpu.py tests/test_extension.py
for tool in memcheck racecheck initcheck; do
  how=()
  [ $tool = racecheck ] && how=(--racecheck)
  step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m tests.csrc.sanitizer_run "${how[@]}"
done
for stem in gated_delta_rule ssd causal_conv1d mla_absorb; do
  step "cold_$stem" "$python" -m bench.cold "$stem" --out "$out/cold_$stem.json" --commit "$commit"
done
for stem in gated_rms_norm gated_delta_rule causal_conv1d ssd mamba2 mla_absorb linear_kl mla_prefill mla_attention rms_norm \
  swiglu l2_norm skinny_linear sampling; do
  step "bench_$stem" "$python" -m bench "$stem" --out "$out" --commit "$commit"
done
step train_step "$python" -m bench.train_step --case gdn-ce-8k m2-ce-8k --out "$out/train_step.json" --commit "$commit"
step memory "$python" -m bench.memory --out "$out/memory.json" --commit "$commit"
exit $failed
