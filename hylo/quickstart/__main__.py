"""`python -m hylo.quickstart`: the same as `hylo quickstart`."""

import argparse
import sys
from pathlib import Path

from hylo.errors import UserError
from hylo.quickstart.run import run_quickstart


def main() -> int:
    """Command line of the quickstart; 2 where the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m hylo.quickstart", description=run_quickstart.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="new directory for the results")
    parser.add_argument("--short", action="store_true", help="a tenth of the training steps")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in the directory")
    arguments = parser.parse_args()
    try:
        run_quickstart(arguments.out, short=arguments.short, resume=arguments.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
