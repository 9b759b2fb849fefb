"""Where a recipe of the quickstart reads and writes, set by the script that runs it."""

import json
from collections.abc import Mapping
from pathlib import Path


def path_overrides(paths: Mapping[str, Path]) -> list[str]:
    """`hylo.distill.load_recipe` overrides for {dotted key: path}; quoted, so that any path stays a string in YAML."""
    return [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
