"""A recipe file as plain values: strict YAML, laid over the files that it extends, its stages in the order they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hylo.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:  # an anchor's keys, which the mapping's own may replace
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key '{key}' is given twice, again in line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_recipe_file(path: Path) -> Any:
    """What a recipe file says, as a schema takes it.

    `extends`, a path or a list of them relative to the file, is laid under the file: mappings are joined key by key,
    anything else is replaced, and what comes later wins. `stages` may be a mapping of names, so that files can change
    one stage of another's; `order` lists those that run, all as they stand without it. `name` is the file's own
    unless something gives one.

    Raises:
        UserError: a file cannot be read, is no YAML or extends itself, or `order` names a stage that is not there.
    """
    values = _with_extended(path, ())
    if not isinstance(values, dict):
        return values
    return _in_order({"name": path.stem} | values, path)


def _with_extended(path: Path, within: tuple[Path, ...]) -> Any:
    """Args: within: the files that extend this one, from the first."""
    if path.resolve() in [one.resolve() for one in within]:
        raise UserError(f"recipe '{path}' extends itself: {' -> '.join(map(str, (*within, path)))}")
    values = _yaml(path)
    if not isinstance(values, dict) or "extends" not in values:
        return values
    under: Any = {}
    for name in _names(values.pop("extends"), "extends", path):
        under = _joined(under, _with_extended(path.parent / name, (*within, path)))
    return _joined(under, values)


def _names(value: Any, key: str, path: Path) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"recipe '{path}': '{key}' is a name or a list of names, got {value!r}")
    return names


def _joined(under: Any, over: Any) -> Any:
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return under | {key: _joined(under[key], value) if key in under else value for key, value in over.items()}


def _in_order(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Stages given by name as a list; those of a list are in order already, and `order` is then no key."""
    stages = values.get("stages")
    if not isinstance(stages, dict):
        return values
    order = _names(values.pop("order", list(stages)), "order", path)
    for name in order:
        if name not in stages:
            raise UserError(f"recipe '{path}': order names stage '{name}', and there are only {', '.join(stages)}")
    return values | {"stages": [_named(name, stages[name]) for name in order]}


def _named(name: str, stage: Any) -> Any:
    return {"name": name} | stage if isinstance(stage, dict) else stage


def _yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"cannot read recipe '{path}': {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"recipe '{path}' is not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe '{path}' is not valid YAML: {' '.join(str(error).split())}") from None
