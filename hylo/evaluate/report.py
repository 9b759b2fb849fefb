"""One evaluation of a hybrid beside its teacher: `evaluate` gathers the numbers, `render_table` shows them."""

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from hylo.errors import UserError
from hylo.evaluate.cache import (
    CacheBytes,
    CachePercent,
    MeasuredCache,
    cache_bytes,
    cache_percent,
    crossover_tokens,
    measure_cache,
)
from hylo.evaluate.common import encode_text
from hylo.evaluate.needle import ModelReader, NeedleGrid, NeedleMode, NeedleSettings, build_cases, needle_grid
from hylo.evaluate.perplexity import LossReport, held_out_loss

T = TypeVar("T")


class Pair(BaseModel, Generic[T]):
    """The same number of both models; `teacher` is None where no teacher was given."""

    model_config = ConfigDict(frozen=True)

    teacher: T | None
    hybrid: T


class EvaluationReport(BaseModel):
    """Everything `hylo evaluate` measures; `model_dump_json` is the JSON report."""

    model_config = ConfigDict(frozen=True)

    name: Pair[str]
    parameters: Pair[int]
    dtype: Pair[str]
    text_tokens: int
    text_bytes: int
    loss: Pair[LossReport]
    cache_bytes_per_token: Pair[int]  # from the formulas, key scales included
    state_bytes_per_sequence: Pair[int]  # from the formulas: fp32 recurrent and conv states
    cache: Pair[CacheBytes]
    cache_measured: Pair[MeasuredCache]
    cache_percent: CachePercent | None
    crossover_tokens: float | None  # context from which the hybrid needs less memory than the teacher
    needle: dict[NeedleMode, Pair[NeedleGrid]]


class _ModelNumbers(BaseModel):
    """One model's column."""

    loss: LossReport
    cache: CacheBytes
    measured: MeasuredCache
    needle: dict[NeedleMode, NeedleGrid]


def default_needle_lengths(window: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and the whole of the window, without those under 128 tokens."""
    return tuple(n for n in (window // 8, window // 4, window // 2, window) if n >= 128) or (window,)


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    teacher: Any = None,
    window: int,
    batch_size: int = 1,
    needle: NeedleSettings | None = None,
    names: tuple[str, str] = ("hybrid", "teacher"),
) -> EvaluationReport:
    """Measure `model`, and `teacher` the same way, on held-out `text`.

    Args:
        model, teacher: Hugging Face causal LMs of the families hylo, llama or qwen3, sharing `tokenizer`.
        text: held-out text, also the haystack of the needle test.
        window: tokens per window of the loss.
        batch_size: windows run together.
        needle: grid of the needle test; None leaves the test out.
        names: of `model` and of `teacher`, for the report.
    Raises:
        UserError: text shorter than a window, a window or needle length beyond a model's positions, vocabularies of
            different size, a needle grid that the text cannot fill, a model of another family.
    """
    both = [model] if teacher is None else [model, teacher]
    _check_models(both, names, window, needle)
    tokens = encode_text(tokenizer, text)
    text_bytes = len(text.encode())
    cases = [] if needle is None else build_cases(tokenizer, text, needle)

    def measure(one: Any) -> _ModelNumbers:
        loss = held_out_loss(
            one,
            tokens,
            window=window,
            batch_size=batch_size,
            bos_token_id=tokenizer.bos_token_id,
            text_bytes=text_bytes,
        )
        grids = {}
        if needle is not None:
            reader = ModelReader(one, tokenizer, needle.max_new_tokens)
            grids = {mode: needle_grid(reader, cases, mode) for mode in needle.modes}
        bytes_ = cache_bytes(one.config, one.dtype)
        return _ModelNumbers(loss=loss, cache=bytes_, measured=measure_cache(one), needle=grids)

    return _assemble([measure(one) for one in both], both, names, len(tokens), text_bytes)


def _check_models(both: list[Any], names: tuple[str, str], window: int, needle: NeedleSettings | None) -> None:
    longest = 0 if needle is None else max(needle.lengths, default=0) + needle.max_new_tokens
    for one, name in zip(both, names, strict=False):
        limit = one.config.max_position_embeddings
        if window > limit:
            raise UserError(f"window of {window} tokens is beyond the {limit} positions of {name}")
        if longest > limit:
            raise UserError(f"needle prompt and answer of {longest} tokens are beyond the {limit} positions of {name}")
        cache_bytes(one.config, one.dtype)  # refuses an unknown family before anything is computed
    sizes = [one.config.vocab_size for one in both]
    if len(set(sizes)) > 1:
        raise UserError(f"vocabularies differ: {names[0]} has {sizes[0]} tokens, {names[1]} has {sizes[1]}")


def _assemble(
    numbers: list[_ModelNumbers], both: list[Any], names: tuple[str, str], tokens: int, text_bytes: int
) -> EvaluationReport:
    def pair(values: list[Any]) -> Pair[Any]:
        return Pair(hybrid=values[0], teacher=values[1] if len(values) > 1 else None)

    caches = [one.cache for one in numbers]
    compared = len(numbers) > 1
    return EvaluationReport(
        name=pair(list(names[: len(both)])),
        parameters=pair([sum(p.numel() for p in one.parameters()) for one in both]),
        dtype=pair([str(one.dtype).removeprefix("torch.") for one in both]),
        text_tokens=tokens,
        text_bytes=text_bytes,
        loss=pair([one.loss for one in numbers]),
        cache_bytes_per_token=pair([one.per_token for one in caches]),
        state_bytes_per_sequence=pair([one.state for one in caches]),
        cache=pair(caches),
        cache_measured=pair([one.measured for one in numbers]),
        cache_percent=cache_percent(*caches) if compared else None,
        crossover_tokens=crossover_tokens(*caches) if compared else None,
        needle={mode: pair([one.needle[mode] for one in numbers]) for mode in numbers[0].needle},
    )


def format_bytes(count: float) -> str:
    """Bytes with a binary unit and three digits: 1536 -> '1.5 KiB'."""
    units = ("B", "KiB", "MiB", "GiB")
    for unit in units[:-1]:
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} {units[-1]}"


def role_label(report: EvaluationReport, role: str, separator: str = ": ") -> str:
    """'teacher: Llama-3.2-1B', or the role alone where the model has no other name."""
    name = getattr(report.name, role)
    return role if name == role else f"{role}{separator}{name}"


def render_table(report: EvaluationReport) -> Table:
    """The report's main numbers for the terminal, one column a model."""
    table = Table(title=f"Evaluation on {report.text_tokens:,} tokens, {report.text_bytes:,} bytes of held-out text")
    table.add_column("")
    columns = ["hybrid"] if report.name.teacher is None else ["teacher", "hybrid"]
    for column in columns:
        table.add_column(role_label(report, column, "\n"), justify="right", overflow="fold")
    for label, cells in _rows(report, columns):
        table.add_row(label, *cells)
    if report.cache_percent is not None:
        table.caption = _cache_caption(report, report.cache_percent)
    return table


def _rows(report: EvaluationReport, columns: list[str]) -> list[tuple[str, list[str]]]:
    def row(label: str, pair: Pair[Any], show: Any) -> tuple[str, list[str]]:
        return label, [show(getattr(pair, column)) for column in columns]

    rows = [
        row("parameters", report.parameters, lambda n: f"{n:,}"),
        row("dtype", report.dtype, str),
        row("loss (nats per token)", report.loss, lambda r: f"{r.loss:.4f}"),
        row("perplexity", report.loss, lambda r: f"{r.perplexity:.3f}"),
        row("bits per byte", report.loss, lambda r: f"{r.bits_per_byte:.4f}"),
        row("cache per token", report.cache, lambda c: format_bytes(c.per_token)),
        row("  measured", report.cache_measured, lambda c: format_bytes(c.per_token)),
        row("state per sequence", report.cache, lambda c: format_bytes(c.state)),
        row("  measured", report.cache_measured, lambda c: format_bytes(c.state)),
    ]
    for mode, grids in report.needle.items():
        chance = f"chance {grids.hybrid.chance:.0%}"
        rows.append(row(f"needle, {mode} ({chance})", grids, lambda g: f"{g.mean:.1%}"))
    return rows


def _cache_caption(report: EvaluationReport, percent: CachePercent) -> str:
    share = f"cache per token: {percent.published:.2f} % of the teacher's"
    if percent.with_key_scales != percent.published:
        share += f" ({percent.with_key_scales:.2f} % with key scales)"
    if report.crossover_tokens is None:
        return f"{share}; the hybrid never needs less memory"
    return f"{share}; the hybrid needs less memory from {report.crossover_tokens:,.0f} tokens on"
