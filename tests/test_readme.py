"""What the README shows is there and runs: make targets, command lines, the Python example, the file tree, links."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from hylo.cli import app
from hylo.extension import ExtensionReport

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def lines(program):
    found = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    return [line for line in found if line.startswith(f"{program} ")]


@pytest.mark.parametrize("line", lines("make"))
def test_make_targets_exist(line):
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("line", [*lines("hylo"), *(line.split(" -m ")[1] for line in lines("torchrun"))])
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


def test_quoted_results_are_the_recorded_ones():
    """Numbers in README and docs are those of the recorded runs, which carry their commit."""
    quickstart = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    for page in (README, (ROOT / "docs" / "quickstart.md").read_text()):
        for name in ("teacher_loss", "loss_after_init", "loss_after_ild", "loss_after_kd"):
            assert f"{quickstart[name]:.4f}" in page, name
        assert f"{quickstart['cache_percent']:.2f} %" in page
    stories = json.loads((ROOT / "docs" / "results" / "stories260k.json").read_text())
    page = (ROOT / "docs" / "upcycling.md").read_text()
    for run in stories["runs"]:
        for name in ("loss_after_init", "loss_after_ild", "loss_after_kd"):
            assert f"{run[name]:.3f}" in page, (run["mixer"], run["init"], name)


def test_the_recorded_quickstart_meets_its_bar():
    quickstart = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    assert quickstart["loss_after_kd"] <= 1.1 * quickstart["teacher_loss"]
    assert quickstart["cache_percent"] <= 10


def test_the_recorded_length_extension_meets_its_bars_and_is_quoted():
    report = ExtensionReport.model_validate_json((ROOT / "docs" / "results" / "extension" / "report.json").read_text())
    page = (ROOT / "docs" / "long-context.md").read_text()
    hybrids = list(report.hybrids.values())
    assert all(met for hybrid in hybrids for met in hybrid.met.values())
    measured = [report.teacher, *(one for hybrid in hybrids for one in (hybrid.before, hybrid.after))]
    for window in ("short", "long"):
        assert " | ".join(f"{getattr(one, window).loss:.3f}" for one in measured) in page, window
    for one in measured:
        for grid in one.needle.values():
            assert f"{grid.mode} | " + " | ".join(f"{100 * share:.0f}" for share in grid.by_length) in page
