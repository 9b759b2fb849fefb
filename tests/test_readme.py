"""What the README shows is there and runs: make targets, command lines, the Python example, the file tree, links."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from hylo.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def lines(program):
    found = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    return [line for line in found if line.startswith(f"{program} ")]


@pytest.mark.parametrize("line", lines("make"))
def test_make_targets_exist(line):
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("line", lines("hylo"))
def test_command_lines_parse(line):
    _, name, *arguments = shlex.split(line)
    command = get_command(app).commands[name]
    command.make_context(name, list(arguments))


def test_the_python_example_runs():
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["o"].shape == (2, 1000, 4, 128)
    assert names["o_next"].shape == (2, 1, 4, 128)


def test_the_file_tree_exists():
    (tree,) = [text for kind, text in BLOCKS if kind == ""]
    for line in tree.strip().splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_continuous_integration_calls_the_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
