"""Plans as text, and as a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import yaml

from lightning_rlhf.plan.layout import PARTS, Layout
from lightning_rlhf.plan.planner import Answer, Settings
from lightning_rlhf.plan.speed import Device
from lightning_rlhf.plan.stages import waiting


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def name_of(layout: Layout) -> str:
    """A layout in a few words."""
    words: list[str] = [layout.plugin if layout.copies * layout.each > 1 else "one device"]
    sizes = {"tp": layout.tp, "pp": layout.pp, "sp": layout.sp}
    words += [f"{name} {size}" for name, size in sizes.items() if size > 1]
    words += [f"{layout.copies} copies"] if layout.copies > 1 and layout.each > 1 else []
    return ", ".join(words)


def as_text(answer: Answer, settings: Settings) -> str:
    """What a layout takes: its parts, where most is taken, and how fast it is."""
    layout, shape, most = answer.layout, answer.shape, answer.most
    lines = [
        f"{name_of(layout)}; {settings.devices} x {size(settings.memory)}; {settings.precision}; checkpointing "
        f"{'on' if layout.checkpointing else 'off'}",
        f"micro-batch: {shape.rows} rows of {shape.row_tokens} tokens = {shape.tokens:,}; {shape.passes} in a step",
        *_of_pipeline(layout),
        "",
        f"{'a rank, at its peak':24}{most.name}",
    ]
    lines += [f"  {part:22}{size(most.parts[part]):>14}" for part in PARTS if most.parts[part]]
    lines += [
        f"  {'all':22}{size(most.on_device):>14}",
        "",
        f"{'tokens a second':24}{answer.tokens_per_second:,.0f} ({answer.seconds:,.2f} s a step)",
        f"{'if a device has':24}{_of_device(settings.device)}",
        "",
        "It fits." if answer.fits else f"It does not fit: {size(most.on_device - settings.room)} too much.",
    ]
    return "\n".join(lines)


def _of_device(device: Device) -> str:
    """What speeds are for."""
    told = (
        f"{device.flops / 1e12:,.4g} TFLOP/s, {device.utilization:.0%} of which training reaches, memory of "
        f"{device.bandwidth / 1e9:,.4g} GB/s, a link of {device.link / 1e9:,.4g} GB/s"
    )
    usual = replace(device, utilization=Device.utilization) == Device()
    return f"{told}: an A100 in bf16 (--flops and others change it)" if usual else told


def _of_pipeline(layout: Layout) -> list[str]:
    """How often ranks wait for each other."""
    if layout.pp == 1:
        return []
    return [f"in {layout.parts} parts; a rank waits {waiting(layout.pp, layout.parts):.0%} of the time for others"]


def in_a_line(answer: Answer) -> str:
    """A layout, and whether it fits."""
    words = [name_of(answer.layout), f"{answer.shape.tokens:,} tokens"]
    words += ["checkpointing"] if answer.layout.checkpointing else []
    return f"{', '.join(words)}: {size(answer.most.on_device)}, {'fits' if answer.fits else 'does not fit'}"


def ranking(answers: Sequence[Answer], count: int = 12) -> str:
    """Layouts in a table, as they come."""
    rows = [("layout", "micro-batch", "checkpointing", "peak", "tokens/s", "")]
    for answer in answers[:count]:
        rows.append(
            (
                name_of(answer.layout),
                f"{answer.shape.tokens:,}",
                "on" if answer.layout.checkpointing else "off",
                size(answer.most.on_device),
                f"{answer.tokens_per_second:,.0f}",
                "fits" if answer.fits else "does not fit",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left = len(answers) - count
    return "\n".join([*table, *([f"... and {left} more"] if left > 0 else [])])


def as_config(answer: Answer, stage: str, accumulates: bool, on_gpu: bool, precision: str) -> str:
    """A config to use after the stage's: the layout, and the micro-batch.

    Args:
        answer: The layout.
        stage: Name of the stage's class.
        accumulates: Whether the Trainer makes micro-batches. False: the stage does.
        on_gpu: Whether it runs on GPUs.
        precision: The Trainer's.
    """
    layout, shape = answer.layout, answer.shape
    trainer: dict[str, object] = {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": layout.each * layout.copies,
        "strategy": "auto",
        "precision": precision,
    }
    if layout.each * layout.copies > 1:
        arguments: dict[str, object] = {"plugin": layout.plugin, "tp": layout.tp}
        if layout.pp > 1:
            arguments |= {"pp": layout.pp, "micro_batches": layout.micro_batches}
        if layout.sp > 1:
            arguments["sp"] = layout.sp
        trainer["strategy"] = {
            "class_path": "lightning_rlhf.strategies.ColossalAIStrategy",
            "init_args": arguments,
        }
    model: dict[str, object] = {"load": {"gradient_checkpointing": layout.checkpointing}}
    if accumulates:
        trainer["accumulate_grad_batches"] = shape.passes
    else:
        model["updates"] = {"micro_batch_tokens": shape.tokens}
    found = {"model": {"class_path": stage, "init_args": model}, "trainer": trainer}
    head = (
        f"# {name_of(layout)}: {size(answer.most.on_device)} a rank, {answer.tokens_per_second:,.0f} tokens a second, "
        "as lightning-rlhf plan says.\n# Use it after the stage's config.\n"
    )
    return head + yaml.safe_dump(found, sort_keys=False)
