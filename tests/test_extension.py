"""The demonstration of length extension: its recipe, its books, and the whole run in small."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from hylo.distill.recipe import Recall
from hylo.errors import UserError
from hylo.evaluate import NEEDLE_KEYS, PROSE_NEEDLE
from hylo.extension import Extension, ExtensionReport, load_extension, run_extension
from hylo.extension.__main__ import main
from hylo.extension.books import unpack
from hylo.extension.recipe import Text
from tests import tiny

SHIPPED = Path(__file__).parents[1] / "recipes" / "extension" / "books-1k-to-32k.yaml"
PATTERN = {"fact": PROSE_NEEDLE.needle, "question": f"{PROSE_NEEDLE.question}{PROSE_NEEDLE.answer}."}
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
SIZES = {name: getattr(tiny.llama().config, name) for name in SHAPE} | {"max_position_embeddings": 128}


def archive(root: Path, **texts: str) -> Path:
    path = root / "books.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for name, text in texts.items():
            content = text.encode()
            member = tarfile.TarInfo(f"books/{name}.md")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def small(root: Path, **changes: Any) -> dict[str, Any]:
    """The demonstration from 128 to 512 tokens, two steps a stage."""
    texts = {name: tiny.text(200, seed=seed) for seed, name in enumerate(("one", "two", "held"))}
    train = {"text": str(root / "books" / "train" / "*.md")}
    recall = {"documents": 4, "words": 400, "spacing": 40, "reach": 200, "patterns": [PATTERN], "keys": 18}
    sources = [train, train | {"recall": recall}]
    stage = {"sequence_length": 128, "batch_size": 2, "steps": 2, "learning_rate": 1e-3, "log_every": 1}
    hybrid = {"mla_layers": [1], "kv_lora_rank": 12}
    long_rope = {"factor": 4.0, "original_max_position_embeddings": 128, "max_position_embeddings": 512}
    return {
        "name": "small",
        "output": str(root / "run"),
        "text": {
            "archive": str(archive(root, **texts)),
            "directory": str(root / "books"),
            "held_out": ["held*"],
            "vocabulary": 384,
        },
        "sources": [train],
        "teacher": {"model": dict(SIZES), "stages": [stage | {"name": "pretrain", "kind": "ce"}]},
        "hybrids": {mixer: hybrid | {"mixer": mixer} for mixer in ("gated_deltanet", "mamba2")},
        "short": "distil",
        "stages": [
            stage | {"name": "align", "kind": "ild"},
            stage | {"name": "distil", "kind": "kl"},
            stage | {"name": "long", "kind": "ce", "sequence_length": 512, "rope": long_rope, "sources": sources},
        ],
        "evaluation": {
            "short_window": 128,
            "long_window": 512,
            "batch_tokens": 1024,
            "needle_lengths": [124, 504],
            "needle_depths": [0.0, 1.0],
            "needle_repeats": 1,
        },
        "device": "cpu",
    } | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExtensionReport]:
    root = tmp_path_factory.mktemp("extension")
    return root, run_extension(Extension.model_validate(small(root)), console=Console(quiet=True))


def test_all_parts_run_and_the_report_holds_every_number(finished: tuple[Path, ExtensionReport]) -> None:
    root, report = finished
    written = json.loads((root / "run" / "report.json").read_text())
    assert ExtensionReport.model_validate(written) == report
    assert list(report.hybrids) == ["gated_deltanet", "mamba2"]
    assert report.teacher_stages["pretrain"].tokens == 2 * 2 * 128
    assert report.teacher.needle.keys() == {"likelihood"}
    for name, one in report.hybrids.items():
        assert one.mixer_types == [name, "mla"]
        assert [(stage, record.steps) for stage, record in one.stages.items()] == [
            ("align", 2),
            ("distil", 2),
            ("long", 2),
        ]
        assert one.stages["long"].tokens == 2 * 2 * 512
        before, after = one.before.short.loss, one.after.short.loss
        assert before != after
        assert one.short_loss_percent == pytest.approx(100 * (after / before - 1))
        far, near = one.after.long.by_position[-1], one.after.short.by_position[-1]
        assert (far.start, far.end, near.start, near.end) == (256, 512, 64, 128)
        assert one.flat_percent == pytest.approx(100 * (far.loss / near.loss - 1))
        for numbers in (one.before, one.after):
            assert numbers.short.tokens == numbers.long.tokens > 1000
        grid = one.after.needle["likelihood"]
        assert (grid.lengths, grid.depths, grid.cases) == ([124, 504], [0.0, 1.0], 4)
        assert one.needle["likelihood"].longest == grid.by_length[1]
        assert one.needle["likelihood"].within == grid.by_length[0]
        assert one.met.keys() == {"needle_likelihood", "needle_generation", "short_loss", "flat"}


def test_plots_and_models_are_there(finished: tuple[Path, ExtensionReport]) -> None:
    run = finished[0] / "run"
    names = {path.name for path in run.glob("*.png")}
    assert names == {"loss_by_position.png", "needle_likelihood.png", "needle_generation.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.glob("*.png"))
    config = json.loads((run / "mamba2" / "long" / "model" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == 512


def test_a_finished_run_is_not_done_again(finished: tuple[Path, ExtensionReport]) -> None:
    root, report = finished
    extension = Extension.model_validate(small(root))
    with pytest.raises(UserError, match=r"output directory '.*run' exists; --resume continues the run in it"):
        run_extension(extension)
    before = (root / "run" / "mamba2" / "log.jsonl").stat().st_mtime_ns
    again = run_extension(extension, resume=True, console=Console(quiet=True))
    assert again.hybrids == report.hybrids
    assert (root / "run" / "mamba2" / "log.jsonl").stat().st_mtime_ns == before

    other = extension.model_copy(update={"seed": 2})
    with pytest.raises(UserError, match=r"output directory '.*run' holds another run than this recipe's"):
        run_extension(other, resume=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_whole_run_on_a_gpu_in_bf16(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    linear = {"linear_num_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 128}
    values = small(tmp_path, device="cuda", precision="bf16")
    values["teacher"]["model"] |= wide
    values["hybrids"]["gated_deltanet"] |= linear
    for hybrid in values["hybrids"].values():
        hybrid["kv_lora_rank"] = 64
    report = run_extension(Extension.model_validate(values), console=Console(quiet=True))
    assert report.device == torch.cuda.get_device_name()
    for one in report.hybrids.values():
        # Ten steps teach next to nothing: losses stay near that of an even guess among 384 tokens, 5.95.
        assert 2 < one.after.long.loss < 8
        assert 2 < one.after.short.loss < 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short": "long"}, "short must name a stage before the last of align, distil, long, got 'long'"),
        ({"evaluation.short_window": 512}, "short_window must be below 512, got 512"),
        ({"evaluation.needle_lengths": [64, 128]}, "needle_lengths must be on both sides of 128, got 64 to 128"),
        ({"stages.2.sequence_length": 1024}, "stage 'long' has sequence_length 1024, longer than the student's"),
        ({"stages.0.stepps": 1}, "unknown key 'stages.0.stepps'"),
        ({"text.archive": "nowhere.tar"}, "cannot read archive 'nowhere.tar': No such file or directory"),
        ({"text.held_out": ["*"]}, "leaves no file for 'train'"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small(tmp_path)))
    settings = [f"--set={key}={json.dumps(value)}" for key, value in change.items()]
    monkeypatch.setattr("sys.argv", ["extension", str(recipe), *settings])
    assert main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_books_of_another_split_are_refused(tmp_path: Path) -> None:
    text = Text(
        archive=str(archive(tmp_path, one="a", two="b", three="c")),
        directory=str(tmp_path / "books"),
        held_out=["t*"],
        vocabulary=300,
    )
    books = unpack(text)
    assert [path.name for path in books.train] == ["one.md"]
    assert books.held_out_text() == "c\n\nb"
    assert unpack(text) == books
    with pytest.raises(UserError, match=r"directory '.*books' has another text than '.*' with held_out \['one\*'\]"):
        unpack(text.model_copy(update={"held_out": ["one*"]}))


def test_the_shipped_recipe_extends_by_32_and_trains_on_needles_it_is_not_tested_with() -> None:
    extension = load_extension(SHIPPED)
    evaluation = extension.evaluation
    assert evaluation.long_window == 32 * evaluation.short_window == extension.stages[-1].sequence_length
    assert max(evaluation.needle_lengths) + evaluation.needle_answer_tokens == evaluation.long_window
    for name in extension.hybrids:
        assert extension.hybrid_recipe(name).stages == extension.stages
    stages = (*extension.teacher.stages, *extension.stages)
    sources = [source for one in (extension, *stages) for source in one.sources or ()]
    recalls: list[Recall] = [source.recall for source in sources if source.recall is not None]
    assert len(recalls) == 5  # two kinds of all short stages, the teacher's first stage, two long ones
    for recall in recalls:
        assert set(recall.avoid) == set(NEEDLE_KEYS)
        assert recall.patterns[0].model_dump() == PATTERN
