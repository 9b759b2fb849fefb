"""Which source a recorded result is of."""

import subprocess
from pathlib import Path


def source_commit() -> str | None:
    """Full hash of the checkout that this file lies in, with `-dirty` where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # hash alone, never a tag's name
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
