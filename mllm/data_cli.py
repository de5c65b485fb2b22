"""`mllm data`: shards made, counted, checked and looked at."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from data_packing.wording import counted

if TYPE_CHECKING:
    from data_packing.executors import Executor
    from data_packing.ledger import Refusal
    from data_packing.scan import Rules

data = typer.Typer(help="Prepare data, and look at it.", no_args_is_help=True)

SHOWN_REFUSALS = 10
Shards = Annotated[
    list[str], typer.Argument(help="Shards: files, folders, globs, a-{000..009}.tar.")
]
ModelFolder = Annotated[
    Path | None, typer.Option(help="A folder with a processor, such as a stage's.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; default: one, for much data all processors.")
]
AllowHttp = Annotated[bool, typer.Option("--allow-http", help="Read from http:// and https://.")]
Passes = Annotated[str, typer.Option("--executor", help="local, or ray: a cluster.")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


@data.command()
def info(
    shards: Shards,
    model: ModelFolder = None,
    workers: Workers = None,
    executor: Passes = "local",
    allow_http: AllowHttp = False,
    as_json: AsJson = False,
) -> None:
    """Say what lies in shards: documents, sizes, formats, scripts, refused records, tokens."""
    from data_packing.info import survey, together
    from data_packing.scan import find_sources
    from data_packing.tables import info_tables

    sources = find_sources(shards, allow_http)
    rules = _rules(model)
    with _progress() as advance:
        facts = survey(sources, rules, _executor(executor, sources, workers), advance)
    if as_json:
        values = {name: each.to_json() for name, each in facts.items()}
        typer.echo(json.dumps({"sources": values, "all": together(facts).to_json()}))
        return
    Console().print(info_tables(facts))


@data.command()
def lint(
    shards: Shards,
    model: ModelFolder = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="What a pack holds.")] = None,
    strict: Annotated[bool, typer.Option(help="Warnings fail too.")] = False,
    workers: Workers = None,
    executor: Passes = "local",
    allow_http: AllowHttp = False,
    as_json: AsJson = False,
) -> None:
    """Find every defect of shards. Exit status: 0 clean, 1 defects, 2 wrong use."""
    from data_packing.lint import lint as look
    from data_packing.lint import summary
    from data_packing.scan import find_sources
    from data_packing.tables import lint_tables, verdict

    if tokens is not None and model is None:
        raise ValueError("--tokens needs --model: only a model says how many tokens a document is")
    sources = find_sources(shards, allow_http)
    rules = _rules(model)
    with _progress() as advance:
        report = look(
            sources,
            rules=rules,
            tokens=tokens,
            executor=_executor(executor, sources, workers),
            advance=advance,
        )
    if as_json:
        for defect in report.defects:
            typer.echo(json.dumps(defect.to_json()))
        typer.echo(json.dumps({"level": "summary", **summary(report)}))
    else:
        console = Console()
        if report.defects:
            console.print(lint_tables(report))
        console.print(verdict(report), markup=False, highlight=False, soft_wrap=True)
    if report.count("error") or (strict and report.defects):
        raise typer.Exit(1)


@data.command()
def shard(
    source: Annotated[
        str, typer.Argument(help="A folder, a file or a pattern of documents, on this machine.")
    ],
    out: Annotated[str, typer.Argument(help="The folder for the shards, or a URL (s3://…).")],
    format: Annotated[
        str | None, typer.Option(help="How it is written (docs/formats.md); default: detected.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The shards' name; default: OUT's.")] = None,
    documents_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    images: Annotated[
        str | None, typer.Option(help="Where paths in records start; default: at their file.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Images that one clip becomes.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Turn documents into shards that training reads. Run it again to go on where it stopped."""
    from data_packing.formats import Options, detect, drafts
    from data_packing.sharding import NothingUsable, identity_of
    from data_packing.sharding import shard as write
    from data_packing.storage import here

    path, folder = here(source), None if images is None else here(images)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--images {images}: there is no such folder")
    if format is None:
        format = detect(path)
        typer.echo(f"{source} is read as {format}; --format names another")
    last = out.rstrip("/").rpartition("/")[2]
    options = Options(folder, frames)
    try:
        with _progress() as advance:
            report = write(
                partial(drafts, path, format, options),
                {"format": format, "options": options, "files": identity_of(path)},
                out,
                name or re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_") or "data",
                documents_per_shard,
                workers,
                lambda done: advance(done, None),
            )
    except NothingUsable as error:
        raise ValueError("\n".join([str(error), *_astray(error.refused, images)])) from None
    typer.echo(
        f"{counted(report.documents, 'document')} with {counted(report.images, 'image')} in "
        f"{counted(len(report.paths), 'shard')} ({report.bytes / 2**20:,.1f} MiB) in {out}; "
        f"{len(report.refused):,} refused"
    )
    for refusal in report.refused[:SHOWN_REFUSALS]:
        typer.echo(f"  {refusal.key}: {refusal.reason}")
    if len(report.refused) > SHOWN_REFUSALS:
        typer.echo(f"  … and {len(report.refused) - SHOWN_REFUSALS:,} more")
    for line in _astray(report.refused, images):
        typer.echo(line)


def _astray(refused: Sequence[Refusal], images: str | None) -> Iterator[str]:
    """What to do where records were refused because their images are not where they say."""
    from data_packing.formats.media import astray

    if count := sum(astray(item.reason) for item in refused):
        start = f"in {images}" if images else "at their file"
        yield (
            f"{counted(count, 'record')} named an image or clip that was not found: paths started "
            f"{start}; --images FOLDER says where else"
        )


@data.command()
def index(
    shards: Shards,
    model: Annotated[Path, typer.Option(help="A folder with a processor, such as a stage's.")],
    text: Annotated[
        str | None, typer.Option(help="The text variant to count; default: the texts as written.")
    ] = None,
    workers: Workers = None,
    executor: Passes = "local",
    allow_http: AllowHttp = False,
) -> None:
    """Count the tokens of shards beforehand; training finds the counts beside them.

    Several machines may each take some of the shards.
    """
    from data_packing.index import count_tokens
    from data_packing.scan import find_sources
    from mllm.cli import quiet

    sources = find_sources(shards, allow_http)
    quiet()
    from mllm.models.processor import Processor

    processor = Processor.from_pretrained(model)
    paths = [path for group in sources.values() for path in group]
    with _progress() as advance:
        done = refused = 0
        passes = _executor(executor, sources, workers)
        for counts in count_tokens(paths, processor.cost, processor.text_fingerprint, passes, text):
            done += len(counts["offset"])
            refused += len(counts["cost_refused"])
            advance(done, None)
    line = f"counted for {model}: {counted(done, 'document')} in {counted(len(paths), 'shard')}"
    if text is not None:
        line += f", with the text {text!r}"
    typer.echo(f"{line}; {refused:,} refused" if refused else line)


@data.command()
def preview(
    recipe: Annotated[Path, typer.Argument(help="The recipe of one stage.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to change."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("preview.html"),
    packs: Annotated[int, typer.Option(min=1, help="How many packs to show.")] = 16,
    step: Annotated[int, typer.Option(min=1, help="The first step to show.")] = 1,
) -> None:
    """Write one HTML page of what the model will see: packs, tokens, what is learned, images."""
    from mllm.recipe import load

    if recipe.is_dir():
        raise ValueError(f"{recipe} is a folder of stages: give the recipe of one")
    load(recipe, overrides or [])  # a mistake is refused before torch is loaded
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"--out {out}: give a file in a folder that is there")
    from mllm.cli import quiet

    quiet()
    from mllm.training.preview import preview as write

    console = Console(stderr=True)

    def say(phase: str) -> None:
        console.print(f"{phase} …", markup=False, highlight=False)

    seen = write(recipe, overrides or [], out, packs, step, say)
    typer.echo(f"{counted(len(seen.packs), 'pack')} of {seen.facts['packs']:,} in {out}")


def _executor(name: str, sources: dict[str, list[Path]], workers: int | None) -> Executor:
    """Who works: as asked, or as many local processes as the amount of data is worth."""
    from data_packing.executors import Executor
    from data_packing.scan import processes

    return Executor(name, (workers or 0) if name == "ray" else processes(sources, workers))


def _rules(folder: Path | None) -> Rules | None:
    """What the model of a folder says of documents."""
    if folder is None:
        return None
    from data_packing.scan import Rules
    from mllm.cli import quiet

    quiet()
    from mllm.models.processor import Processor

    processor = Processor.from_pretrained(folder)
    return Rules(processor.cost, processor.image_cost, processor.template.special_token)


@contextmanager
def _progress() -> Iterator[Callable[[int, int | None], None]]:
    """A bar with documents per second on stderr; where that is no terminal, one line at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    began, seen = time.monotonic(), [0]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("reading shards", total=None, rate="")

    def advance(done: int, total: int | None) -> None:
        values: dict[str, Any] = {"completed": done, "total": total, "description": "documents"}
        bar.update(task, rate=_rate(done, time.monotonic() - began), **values)
        seen[0] = done

    with bar:
        yield advance
    seconds = time.monotonic() - began
    line = f"{counted(seen[0], 'document')} in {seconds:.1f} s, {_rate(seen[0], seconds)}"
    console.print(line, markup=False, highlight=False)


def _rate(done: int, seconds: float) -> str:
    return f"{done / max(seconds, 1e-9):,.0f} documents/s"
