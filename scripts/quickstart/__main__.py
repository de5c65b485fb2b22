"""The quick start: fetch, prepare, train three stages, report. Typed again, it goes on.

    python -m scripts.quickstart [--small] [--fraction 0.1] [--no-apt]

Data goes to data/quickstart and results to outputs/quickstart, below the working directory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from data_packing.files import explain
from scripts.quickstart.console import say
from scripts.quickstart.downloads import ended
from scripts.quickstart.fetch import fetch_all
from scripts.quickstart.prepare import DATA, add_arguments, prepare
from scripts.quickstart.stages import OUTPUTS, train_stages
from scripts.quickstart.summary import chat_command, figures, table

__all__ = ["main"]

SMALL_SHARE = 0.1
GOES_ON = "Stopped. The same command goes on where it was: {command}"


def main() -> int:
    """Run every phase that is not done yet; returns the exit status."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--budget", type=float, help="share of the recipes' tokens to train on")
    parser.add_argument("--no-train", action="store_true", help="stop after the data")
    arguments = parser.parse_args()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        say("\n" + GOES_ON.format(command=_command()))
        return 130
    except ValueError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {explain(error)}")
        return 2


def _command() -> str:
    """What the person typed, as far as one can tell."""
    return " ".join(["./scripts/quickstart.sh", *sys.argv[1:]])


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    fetched = fetch_all(apt=False if arguments.no_apt else None, small=arguments.small)
    manifest = prepare(DATA, fetched, arguments.fraction)
    say(f"Data is ready in {DATA}; where it comes from: {DATA / 'SOURCES.md'}")
    if arguments.no_train:
        return 0
    from scripts.quickstart.warm import warm

    warm()
    share = arguments.fraction * (SMALL_SHARE if arguments.small else 1.0)
    status = train_stages(DATA, arguments.budget or share)
    if status:
        if status == 130:
            say(GOES_ON.format(command=_command()))
        return status
    if _reported():
        figures(OUTPUTS)
    elif status := _report():
        return status
    table(OUTPUTS)
    minutes = (time.monotonic() - started) / 60
    say(f"\nThis run took {minutes:.1f} minutes. Report: {OUTPUTS / 'report.html'}")
    say(f"Licences of the data: {DATA / 'SOURCES.md'} ({len(manifest['sources'])} sources)")
    say(f"\nTalk to it:\n  {chat_command(DATA, OUTPUTS)}")
    return 0


def _reported() -> bool:
    """Whether the report is newer than every stage."""
    report = OUTPUTS / "report.json"
    stages = [marker.stat().st_mtime for marker in OUTPUTS.glob("*/FINISHED")]
    return report.is_file() and report.stat().st_mtime > max(stages, default=0.0)


def _report() -> int:
    """Evaluate what was trained; prints its own table."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mllm.evaluation.report", str(OUTPUTS)], env=dict(os.environ)
    )
    with ended(process):
        return process.wait()


if __name__ == "__main__":
    # The folder of the checkout is importable by its workers too, whatever the working directory.
    checkout = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (checkout, os.environ.get("PYTHONPATH")))
    )
    sys.exit(main())
