"""The `mllm` command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from data_packing.files import explain
from mllm.data_cli import data
from mllm.precisions import precision
from mllm.training.progress import complain
from mllm.training.ranks import gpu_count
from mllm.training.run_folder import NoSpace

app = typer.Typer(
    name="mllm",
    help="Train and use multimodal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")

RecipePath = Annotated[Path, typer.Argument(help="A recipe, or a folder of recipes.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe to change.")
]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Workers, one GPU each.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Workers without GPUs.")] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Machines, a line `host slots=8` each: docs/launching.md.")
    ] = None,
) -> None:
    """Train a stage, or all stages of a folder. Run it again to go on where it stopped."""
    from mllm.training.launch import train as run
    from mllm.training.ranks import Ranks

    raise typer.Exit(run(recipe, overrides or [], Ranks.choose(gpus, cpus, hostfile)))


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Say what a run will be: tokens, packs, steps, documents left out, parameters.

    Exit status: 0 when it can be trained, 1 when training would stop, 2 wrong use.
    """
    from mllm.recipe import load_all
    from mllm.training.sources import check_paths

    # a mistake is refused before torch is loaded
    check_paths([stage for _, stage in load_all(recipe, overrides or [])])
    quiet()
    from mllm.training.forecast import forecast

    raise typer.Exit(forecast(recipe, overrides or []))


@app.command()
def checkpoints(
    folder: Annotated[Path, typer.Argument(help="A stage's folder, or a folder of stages.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """List the checkpoints of a stage and verify them: every file is read and its hash compared.

    Exit status: 0 when all are whole, 1 when one is damaged, 2 wrong use.
    """
    from rich.console import Console

    from mllm.training import checkpoint_list

    found = checkpoint_list.listing(folder)
    if as_json:
        typer.echo(json.dumps([entry.to_json() for entry in found]))
    else:
        Console().print(checkpoint_list.table(found))
    raise typer.Exit(any(entry.damage is not None for entry in found))


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="What a stage saved.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image to ask about.")] = None,
    question: Annotated[str | None, typer.Option(help="Ask once and leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")
    ] = 0.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
) -> None:
    """Talk to a model about images."""
    from mllm.inference.chat import chat as talk

    talk(folder, image or [], question, max_new_tokens, temperature, device)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="What a stage saved.")],
    output: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[
        str | None,
        typer.Option(help="The format: see docs/export.md; left out, what it began from."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16, fp16 (or torch's names), or auto: the saved one.")
    ] = "auto",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Keep the LoRA adapter apart from the weights.")
    ] = False,
) -> None:
    """Write a model for other programs, which load it without this package."""
    precision(dtype)
    quiet()
    from mllm.export.command import origin, summary, write

    to = to or origin(folder)
    write(folder, to, output, dtype, adapter)
    print(summary(to, output))


@app.command()
def assemble(
    recipe: Annotated[Path, typer.Argument(help="A recipe; its model section is enough.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder; default: outputs/FOLDER/RECIPE-assembled.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="fp32, bf16, fp16 (or torch's names), or auto: the language model's."),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read no weights, save none.")] = False,
) -> None:
    """Build the model of a recipe, save it, and say what it is: parameters, tokens of images."""
    from mllm.recipe import load_parts
    from mllm.training.sources import check_model

    if recipe.is_dir():
        raise ValueError(f"{recipe} is a folder of stages: give the recipe of one")
    precision(dtype)
    parts = load_parts(recipe, overrides or [])
    check_model(parts.model)
    default = Path("outputs", recipe.resolve().parent.name, f"{recipe.stem}-assembled")
    quiet()
    from mllm.training.assembly import assemble as build

    build(parts, None if dry_run else output or default, dtype)


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(help="A part, model or family, shown in full.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """List what a recipe can name, with options, defaults and the paper.

    Encoders, connectors, fusions, tilings, objectives, published models and language models.

    A name is found however it is spelt: qwen2_vl, Qwen2-VL.
    """
    from rich.console import Console

    from mllm.parts import listing

    shown = listing.overview() if name is None else listing.in_full(name)
    if as_json:
        typer.echo(json.dumps(listing.as_json(name)))
    else:
        Console().print(shown)


def quiet() -> None:
    """Keep the libraries' own progress bars and notices off a person's screen."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu_count() else "cpu")
    from mllm.inference.quiet import quiet as quiet_transformers

    quiet_transformers()


def main() -> None:
    """The command's entry point: errors of users are one message, without a traceback."""
    try:
        app()
    except (ValueError, NoSpace) as error:
        complain(str(error))
        raise SystemExit(2) from None
    except OSError as error:
        complain(explain(error))
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
