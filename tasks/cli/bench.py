"""The command `bench`: time and memory of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import friendly


@friendly
def bench(
    encoders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ENCODER]...",
            help="vit-s16, vit-b16, vit-l16, wav2vec2-base, clip-b32, nano-vit, nano-wav2vec2, "
            "nano-clip, or a name that load_backbone takes.",
        ),
    ] = None,
    more: Annotated[
        str | None,
        typer.Option("--encoders", help="Further encoders, separated by commas: vit-s16,clip-b32"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda if there is a GPU.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Type of the weights, fp32 or bf16; by default bf16 on a GPU."),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(help="Batch sizes of forward passes; by default 1,32,256, on a CPU 1,8."),
    ] = None,
    train_batch: Annotated[
        int | None, typer.Option(help="Batch size of training steps; by default 64, on a CPU 4.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Length of the clips for speech encoders, in seconds.")
    ] = 10.0,
    blocks: Annotated[
        str,
        typer.Option(
            help="First adapted block, several separated by commas: half, three-quarters or a "
            "number."
        ),
    ] = "0,half,three-quarters",
    method: Annotated[
        str, typer.Option(help="Our method: double_seq_bn, seq_bn or lora.")
    ] = "double_seq_bn",
    size: Annotated[int, typer.Option(help="Bottleneck size, in channels.")] = 48,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Measure also with torch.compile and CUDA graphs.")
    ] = False,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peers",
            metavar="PYTHON",
            help="A Python interpreter that has peft or adapters; may be repeated.",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Number of rounds; figures are medians over them.")
    ] = 7,
    threads: Annotated[int | None, typer.Option(help="Threads of torch on a CPU.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for bench.json, bench.md and bench.png.")
    ] = Path("out/bench"),
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a figure misses its bound.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Measure adapters against the bare encoder, full fine-tuning, peft and AdapterHub.

    One run measures forward pass, training step, memory, switch, mixed batch and load. It gives
    medians, ratios and the share of the limit that is reached.
    """
    from ..bench import command

    settings = command.settings(
        encoders=[*(encoders or ()), *command.listed(more)],
        device=device,
        precision=precision,
        batches=batches,
        train_batch=train_batch,
        seconds=seconds,
        starts=command.listed(blocks),
        method=method,
        size=size,
        compile=compiled,
        peers=peers or [],
        repeats=repeats,
        threads=threads,
    )
    if not command.run(settings, out, quiet=quiet) and check:
        raise typer.Exit(1)
