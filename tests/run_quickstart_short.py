"""The quickstart's short form, killed in the middle of distillation and resumed, and what must be true of its report.

    python -m tests.run_quickstart_short [--out runs/quickstart-short]

`.ci/run` takes it: it asserts the report's fields, that the run goes on from its checkpoint, and that the loss falls.
It does not assert how far: a tenth of the steps is no training.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hylo.distill.checkpoint import checkpoint_steps
from hylo.quickstart.measure import stage_rows
from hylo.quickstart.report import QuickstartReport

POLL = 0.05  # seconds; a training step takes ten times as long


def kill_after_first_checkpoint(command: list[str], checkpoints: Path) -> None:
    """Start `command` and SIGKILL it once there is a complete checkpoint."""
    with subprocess.Popen(command) as process:
        while not any(checkpoints.glob("step-*")):
            if process.poll() is not None:
                raise SystemExit(f"the quickstart ended with {process.returncode} before its first checkpoint")
            time.sleep(POLL)
        process.kill()


def check(written: dict[str, Any]) -> None:
    report = QuickstartReport.model_validate(written)
    assert written.keys() == QuickstartReport.model_fields.keys()
    assert report.short
    # Eight steps of alignment are still above where they began (docs/quickstart.md has what eighty do).
    assert min(report.loss_after_init, report.loss_after_ild) > report.loss_after_kd > 0
    assert report.teacher_bits_per_byte < report.xz_bits_per_byte
    assert report.cache_bytes_per_token.hybrid <= 0.1 * report.cache_bytes_per_token.teacher
    assert report.state_bytes_per_sequence.teacher == 0 < report.state_bytes_per_sequence.hybrid
    assert report.needle.keys() == {"likelihood"}
    assert report.seconds.keys() >= {"corpus", "upcycle", "ild", "kd", "evaluation", "total"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-short"), help="new directory")
    out: Path = parser.parse_args().out
    command = [sys.executable, "-m", "hylo.quickstart", "--short", "--out", str(out)]
    log, checkpoints = (out / "distillation" / name for name in ("log.jsonl", "kd/checkpoints"))
    kill_after_first_checkpoint(command, checkpoints)
    saved = max(checkpoint_steps(checkpoints))
    before = [row for row in stage_rows(log, "kd") if row["step"] <= saved]
    print(f"== killed after step {saved} of distillation; now resumed", flush=True)
    subprocess.run([*command, "--resume"], check=True)
    after = stage_rows(log, "kd")
    assert after[: len(before)] == before, "the resumed run repeated steps of its checkpoint"
    assert len(after) > len(before), "the run was killed after its last step"
    check(json.loads((out / "report.json").read_text(encoding="utf-8")))
    print("== report, resume and falling loss: as they must be")


if __name__ == "__main__":
    main()
