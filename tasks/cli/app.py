"""The command line `mmadapters`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmadapters.zoo import NANO

from ..reports.console import bar, plain, print_facts, print_scores

app = typer.Typer(
    name="mmadapters",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Adapters for frozen encoders: train, evaluate, predict.",
)
zoo = typer.Typer(no_args_is_help=True, help="The small pretrained encoders that ship with it.")
app.add_typer(zoo, name="zoo")

VERDICT = {True: "[green]holds[/]", False: "[red]does not hold[/]", None: "[yellow]not checked[/]"}
DEBUG = "MMADAPTERS_DEBUG"
FIRST = int(os.environ.get("RANK", "0")) == 0

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config: trainer.epochs=3"),
]


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Tells a user's mistake in one sentence; a traceback only with MMADAPTERS_DEBUG=1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError
            raise
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if os.environ.get(DEBUG):
                raise
            Console(stderr=True).print(f"[red]error:[/] {_escaped(error)}", highlight=False)
            raise typer.Exit(1) from None

    return run


def _escaped(error: BaseException) -> str:
    from rich.markup import escape

    return escape(str(error) or type(error).__name__)


@app.command(add_help_option=False, context_settings={"allow_interspersed_args": True})
@friendly
def train(
    config: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a config that ships.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the run directory.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    show_help: Annotated[
        bool, typer.Option("--help", help="This text; after a config or a task, its keys.")
    ] = False,
) -> None:
    """Adapt an encoder to a task: train, evaluate on the test split, save, report.

    `mmadapters train segmentation --help` lists the keys of a task and their defaults,
    `mmadapters configs` the configs that ship.
    """
    if show_help or config is None:
        _help(config)
        return
    from ..config.file import read_config

    read = read_config(config, overrides or [])
    _quiet_libraries()
    from ..jobs import run as runs
    from ..jobs.folder import REPORT

    with runs.processes(read):
        done = runs.train(read, resume=resume, overwrite=overwrite, quiet=quiet)
    if FIRST:
        console = Console()
        if done.before is not None:
            print_scores(console, done.before, "before training")
        for split, scores in done.scores.items():
            print_scores(console, scores, split)
        print_facts(console, done.facts)
        console.print(f"Report: {done.folder / REPORT}", soft_wrap=True)


def _help(config: str | None) -> None:
    context = typer.Context(typer.main.get_command(app).commands["train"])  # type: ignore[attr-defined]
    context.info_name = "mmadapters train"
    if config is None:
        typer.echo(context.command.get_help(context))
        return
    from ..config.file import TASKS, describe_keys, read_config

    task = config if config in TASKS else read_config(config).task
    table = Table("key", "type", "default", "what", title=f"Keys of a {task} config")
    table.columns[0].no_wrap = True
    for key in describe_keys(task):
        table.add_row(
            *(plain(cell) for cell in (key.path, key.type, key.default_text, key.description))
        )
    Console().print(table)


@app.command()
@friendly
def configs() -> None:
    """The configs that ship, by name."""
    from ..config.file import KINDS, config_names

    table = Table("name", "what")
    for kind in KINDS:
        for name, summary in config_names(kind).items():
            table.add_row(name, summary)
        table.add_section()
    Console().print(table)


@app.command()
@friendly
def continual(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a config that ships.")],
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Learn several jobs in turn on one encoder, and measure what is left of each."""
    from ..jobs.continual.config import read_continual, read_jobs

    read = read_continual(config, overrides or [])
    jobs = read_jobs(read)
    _quiet_libraries()
    from ..jobs import run as runs
    from ..jobs.continual import run as learning
    from ..jobs.continual.report import show

    def tell(text: str) -> None:
        if FIRST and not quiet:
            Console(stderr=True).print(plain(text))

    with runs.processes(jobs[0]):
        done = learning.learn(read, overwrite=overwrite, quiet=quiet, tell=tell)
    if FIRST:
        show(done, Console())


@app.command()
@friendly
def compare(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a config that ships.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the trainings that are done already.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is there.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", help="Train this method alone, to be collected later; may be repeated."
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Methods beside plain bottlenecks of as many parameters: metric, step time, memory."""
    from ..jobs.comparison.config import read_comparison, read_contenders

    read = read_comparison(config, overrides or [])
    read_contenders(read)
    _quiet_libraries()
    from ..jobs.comparison import report as reports
    from ..jobs.comparison import run as comparison

    with bar("comparing", 1) as progress:

        def tell(what: str, done: int, of: int) -> None:
            progress(done, of)
            if not quiet:
                Console(stderr=True).print(
                    f"{min(done + 1, of)}/{of} {plain(what)}", highlight=False
                )

        done = comparison.compare(
            read, resume=resume, overwrite=overwrite, only=only or (), tell=tell
        )
    if done is None:
        Console().print("Trained; `mmadapters compare … --resume` collects all that are.")
    elif markdown:
        typer.echo(reports.markdown(done))
    else:
        reports.show(done, Console())


@app.command()
@friendly
def bench(
    encoders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ENCODER]...",
            help="vit-s16, vit-b16, vit-l16, wav2vec2-base, clip-b32, nano-vit, nano-wav2vec2, "
            "nano-clip, or a name as load_backbone takes it.",
        ),
    ] = None,
    more: Annotated[
        str | None, typer.Option("--encoders", help="More of them: vit-s16,clip-b32")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda where there is a GPU.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16 weights; bf16 by default on a GPU.")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="Of forward passes: 1,32,256, and 1,8 on a CPU.")
    ] = None,
    train_batch: Annotated[
        int | None, typer.Option(help="Of training steps: 64, and 4 on a CPU.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of a speech encoder's clips.")] = 10.0,
    blocks: Annotated[
        str, typer.Option(help="First adapted blocks: half, three-quarters, or numbers.")
    ] = "0,half,three-quarters",
    method: Annotated[
        str, typer.Option(help="Of ours: double_seq_bn, seq_bn or lora.")
    ] = "double_seq_bn",
    size: Annotated[int, typer.Option(help="Channels of a bottleneck.")] = 48,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also with torch.compile and CUDA graphs.")
    ] = False,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peers",
            metavar="PYTHON",
            help="An interpreter that has peft or adapters; may be repeated.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds, of which medians are taken.")] = 7,
    threads: Annotated[int | None, typer.Option(help="torch's, on a CPU.")] = None,
    out: Annotated[Path, typer.Option(help="For bench.json, bench.md and bench.png.")] = Path(
        "out/bench"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 where a figure misses its bound.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """What adapters cost beside the bare encoder, full fine-tuning, peft and AdapterHub.

    Forward pass, training step, memory, switch, mixed batch and load, in one run, with medians,
    ratios and the share of the limit that is reached.
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


@app.command()
@friendly
def multitask(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a config that ships.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the run directory.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train several tasks together on one encoder, adapters sharing all, a half or nothing."""
    from ..jobs.multitask.config import read_multitask, read_tasks

    read = read_multitask(config, overrides or [])
    jobs = read_tasks(read)
    _quiet_libraries()
    from ..jobs import run as runs
    from ..jobs.multitask import run as joint
    from ..jobs.multitask.report import show

    with runs.processes(jobs[0]):
        done = joint.learn(read, resume=resume, overwrite=overwrite, quiet=quiet)
    if FIRST:
        show(done, Console())


@app.command()
@friendly
def evaluate(
    directory: Annotated[Path, typer.Argument(help="A run or an adapter directory.")],
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(help="Another source: a folder, a file, a hub name.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure a saved adapter on a split of its own or of other data."""
    _quiet_libraries()
    from mmadapters.files import write_text

    from ..artifact import open_directory
    from ..data import load as sources
    from ..jobs.metrics import figures
    from ..jobs.run import evaluate_split

    changes = [*(overrides or []), *([f"data.source={json.dumps(data)}"] if data else [])]
    opened = open_directory(directory, overrides=changes)
    wanted: Any = split
    splits: Any = sources.load(opened.task.config.data, opened.task.columns, (wanted,))
    if split not in splits:
        raise ValueError(f"the data has no split {split!r}: name it in data.splits")
    with bar(f"evaluating {split}", len(splits[split])) as progress:
        found = evaluate_split(opened.task, opened.model, splits[split], progress=progress)
    scores = opened.task.score(found.records, bootstrap=opened.task.config.evaluation.bootstrap)
    print_scores(Console(), scores, split)
    if found.problems:
        Console(stderr=True).print(f"{len(found.problems)} rows could not be used")
    if out is not None:
        write_text(out, json.dumps(figures(scores), indent=2, ensure_ascii=False) + "\n")


@app.command()
@friendly
def predict(
    directory: Annotated[Path, typer.Argument(help="A run or an adapter directory.")],
    inputs: Annotated[list[str], typer.Argument(help="Files and folders, or what the task takes.")],
    out: Annotated[
        Path | None, typer.Option(help="A folder for masks, pictures and predictions.jsonl.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change the saved job: backbone.weights=FILE", metavar="KEY=VALUE"
        ),
    ] = None,
) -> None:
    """Apply a saved adapter to files; a line of JSON for each input."""
    _quiet_libraries()
    from mmadapters.files import write_text

    from ..artifact import open_directory
    from ..jobs.prediction import predict as results

    opened = open_directory(directory, overrides=change or [])
    lines = []
    for result in results(opened, inputs, out=out):
        lines.append(json.dumps(result, ensure_ascii=False))
        typer.echo(lines[-1])
    if out is not None:
        write_text(out / "predictions.jsonl", "".join(f"{line}\n" for line in lines))


@app.command()
@friendly
def inspect(
    backbone: Annotated[str, typer.Argument(help="As load_backbone takes it: timm/…, nano/vit.")],
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download its weights.")] = False,
    weights: Annotated[str | None, typer.Option(help="A local file of weights.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the library's constructor: img_size=224", metavar="KEY=VALUE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The sites of an encoder, their shapes, and what each method would cost."""
    _quiet_libraries()
    from ..jobs import inspection

    found = inspection.inspect(
        backbone, pretrained=pretrained, weights=weights, options=_options(option or [])
    )
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        inspection.print_inspection(found, Console())


def _options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{pair!r} is no KEY=VALUE")
        options[key] = yaml.safe_load(value)
    return options


@app.command()
@friendly
def doctor(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a config that ships.")],
    overrides: Overrides = None,
) -> None:
    """Read the data and say what is wrong with it, before any training; exit 1 if something is."""
    from ..config.file import read_config

    read = read_config(config, overrides or [])
    _quiet_libraries()
    from .. import artifact
    from ..config.schema import SPLITS
    from ..data import doctor as doctors
    from ..data import load as sources
    from ..jobs.model import rows_to_fit

    task = artifact.task_class(read.task)(read)
    splits = sources.load(read.data, task.columns, SPLITS)
    task.fit(rows_to_fit(splits.get("train")), artifact.make_backbone(read.backbone))
    report = doctors.examine(task, splits)
    doctors.print_report(report, Console())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@friendly
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs and their reports are saved.")] = Path(
        "out/demo"
    ),
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")
    ] = None,
) -> None:
    """All tasks on data that ships and on the nano encoders: head only beside adapters."""
    _quiet_libraries()
    from ..jobs import demo as demos

    demos.show(demos.run(out, list(tasks or demos.TASKS)), Console(), out)


@app.command()
@friendly
def index(
    directory: Annotated[Path, typer.Argument(help="A retrieval run or adapter directory.")],
    inputs: Annotated[list[str], typer.Argument(help="Pictures and folders of them.")],
    out: Annotated[Path, typer.Option(help="The index: a folder.")] = Path("index"),
) -> None:
    """Make a FAISS index of pictures, to be searched by text or picture."""
    _quiet_libraries()
    from ..artifact import open_directory
    from ..retrieval.index import build_index

    opened = open_directory(directory)
    with bar("encoding", 1) as progress:
        count = build_index(opened.task, opened.model, inputs, out, progress=progress)
    Console().print(f"{count} pictures in {out}", soft_wrap=True)


@app.command()
@friendly
def search(
    directory: Annotated[Path, typer.Argument(help="The adapter that the index was made with.")],
    index: Annotated[Path, typer.Argument(help="A folder that `mmadapters index` wrote.")],
    query: Annotated[str, typer.Argument(help="Words, or the path of a picture.")],
    count: Annotated[int, typer.Option("-k", min=1, help="How many results.")] = 5,
) -> None:
    """Search an index by words or by a picture."""
    _quiet_libraries()
    from ..artifact import open_directory
    from ..retrieval.index import search_index

    opened = open_directory(directory)
    table = Table("similarity", "found", title=plain(query))
    for found in search_index(opened.task, opened.model, index, query, count=count):
        table.add_row(f"{found['similarity']:.3f}", plain(found[found["kind"]]))
    Console().print(table)


def _quiet_libraries() -> None:
    """Their warnings are for the authors of training scripts, their bars stand in the way."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


@zoo.command("list")
def list_encoders() -> None:
    """Name, libraries, size and card of every shipped encoder."""
    table = Table("name", "libraries", "MB", "what", "card")
    table.columns[-1].overflow = "fold"
    for name, row in NANO.items():
        size = sum(file.stat().st_size for file in row.directory.glob("*.safetensors")) / 1e6
        card = row.directory / "README.md"
        table.add_row(name, ", ".join(row.libraries), f"{size:.1f}", row.summary, str(card))
    Console().print(table)


@zoo.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Encoders; all by default.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data sets that some figures need.")
    ] = None,
) -> None:
    """Measure the cards' headline figures again; exit with 1 if one does not hold.

    A figure whose data or speech synthesiser is not there is "not checked", which is no pass; if
    nothing at all could be checked, the exit code is 2.
    """
    from ..zoo.verify import verify as recompute

    if unknown := sorted(set(names or ()) - set(NANO)):
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(NANO)}")
    figures = recompute(names or None, data=data)
    table = Table("figure", "card", "now", "tolerance", "", "note")
    for figure in figures:
        now = "—" if figure.measured is None else f"{figure.measured:.4f}"
        claimed, tolerance = f"{figure.expected:.4f}", f"{figure.tolerance:.4f}"
        verdict = VERDICT[figure.holds]
        table.add_row(figure.name, claimed, now, tolerance, verdict, figure.note)
    Console().print(table)
    verdicts = [figure.holds for figure in figures]
    if False in verdicts:
        raise typer.Exit(1)
    if True not in verdicts:
        raise typer.Exit(2)
