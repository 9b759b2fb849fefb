"""`python -m hylo.extension RECIPE`: the demonstration of length extension (docs/long-context.md)."""

import argparse
import sys
from pathlib import Path

from hylo.errors import UserError
from hylo.extension.recipe import load_extension
from hylo.extension.run import run_extension


def main() -> int:
    """Command line; 2 where the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m hylo.extension", description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file, as recipes/extension/books-1k-to-32k.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SUBKEY=VALUE", help="over the recipe's")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in the output directory")
    arguments = parser.parse_args()
    try:
        run_extension(load_extension(arguments.recipe, overrides=arguments.set), resume=arguments.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
