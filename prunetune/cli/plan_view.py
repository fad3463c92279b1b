"""How `prunetune plan` looks; it computes nothing. Fits 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prunetune.core.console import console, warn
from prunetune.core.sizes import format_bytes, format_count, format_fraction
from prunetune.pipeline.plan_run import RunPlan

_SHOWN_SHAPES = 6


def show_plan(plan: RunPlan) -> None:
    """Prints the plan."""
    console().print(_head(plan))
    for title, table in _tables(plan):
        console().print(f"\n[bold]{escape(title)}[/bold]")
        console().print(table)
    console().print()
    for text in plan.warnings:
        warn(escape(text))
    if not plan.warnings:
        console().print("[green]no warnings[/green]; to start, say train instead of plan")


def _tables(plan: RunPlan) -> Iterator[tuple[str, Table]]:
    yield "Model", _sizes(plan)
    if len(plan.candidates) > 1:
        yield f"Shapes that meet the budget ({len(plan.candidates)}); the run chooses one", _shapes(plan)
    yield "Peak memory of training, estimated, per process", _memory(plan)
    title = "Steps: not known before the rows are read" if plan.steps is None else f"{plan.steps} steps"
    if plan.relative_flops is not None:
        title += f", {plan.relative_flops:.0%} of the FLOPs of a plain LoRA run"
    yield title, _steps(plan)


def _head(plan: RunPlan) -> Text:
    kept, config = plan.kept, plan.config
    text = Text()
    text.append(config.model.name, style="bold")
    text.append(f" ({plan.architecture.model_type}) on {config.data.train}")
    text.append(f", about {plan.rows:,} rows" if plan.rows else "")
    text.append(f"\nbudget {plan.budget}; within it ")
    text.append(f"{format_fraction(kept['decoder'])} of decoder", style="bold")
    text.append(f" and {format_fraction(kept['total'])} of total parameters stay\n")
    text.append(f"mask {config.mask.method}, compensation {config.compensation.method}, ")
    text.append(f"units {', '.join(config.target.units)}, widths in steps of {config.target.align}")
    if config.lora.ranks.method != "keep":
        text.append(f"\nranks of the adapters from the freeze on by {config.lora.ranks.method}")
    if config.model.quantize:
        text.append(f"\nbase in {config.model.quantize} while training, export in {config.export.dtype}")
    for name, part in (("rows", config.data.samples), ("target tokens", config.data.tokens)):
        if part.method is not None:
            share = f", {format_fraction(part.kept)} stay" if part.kept < 1 else ""
            text.append(f"\n{name} chosen while training by {part.method}{share}")
    return text


def _sizes(plan: RunPlan) -> Table:
    dense, compact, config = plan.dense, plan.compact, plan.config
    table = _table("", "dense", "compact", "kept")

    def row(name: str, before: float, after: float, show: Callable[[float], str] = format_count) -> None:
        table.add_row(name, show(before), show(after), format_fraction(after / before))

    row("parameters", dense.total_params, compact.total_params)
    row("  in the decoder's linears", dense.decoder_params, compact.decoder_params)
    row(f"weights on disk, {config.export.dtype}", dense.size_bytes, compact.size_bytes, format_bytes)
    row(
        f"FLOPs a token, {config.train.max_length} before it",
        dense.flops_per_token,
        compact.flops_per_token,
    )
    row("KV cache a token", dense.kv_bytes_per_token, compact.kv_bytes_per_token, format_bytes)
    row(f"adapters, rank {config.lora.rank}", dense.lora_params, compact.lora_params)
    return table


def _shapes(plan: RunPlan) -> Table:
    shown = plan.candidates[:_SHOWN_SHAPES]
    more = len(plan.candidates) - len(shown)
    hidden = "hidden" in plan.config.target.units
    table = _table("layers", "query heads", "KV groups", "MLP channels", *(["hidden size"] if hidden else []))
    for shape in shown:
        widths = [shape.layers, shape.query_heads, shape.kv_groups, shape.mlp_channels]
        table.add_row(*map(str, widths), *([str(shape.width(plan.architecture))] if hidden else []))
    if more:
        table.add_row(f"and {more} smaller")
    return table


def _memory(plan: RunPlan) -> Table:
    table = _table("", "warm-up, search", "recover")
    for part, size in plan.dense.memory.items():
        table.add_row(part, format_bytes(size), format_bytes(plan.compact.memory[part]))
    table.add_section()
    table.add_row("together", format_bytes(plan.dense.memory_bytes), format_bytes(plan.compact.memory_bytes))
    return table


def _steps(plan: RunPlan) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="fold")
    table.add_column(style="dim")
    for item in plan.derived:
        table.add_row(item.name, item.value, item.reason)
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(first, justify="left", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
