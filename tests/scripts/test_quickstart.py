"""The first command on a tenth of the real data: fetch, prepare, three stages, report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.quickstart.fetch import apt_works

CHECKOUT = Path(__file__).resolve().parents[2]


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, as the shell script does."""
    return subprocess.run(
        [sys.executable, "-m", "scripts.quickstart", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(1500)
def test_the_first_command_on_a_tenth_of_the_data(tmp_path: Path) -> None:
    packages = [] if apt_works(["sweethome3d-furniture"]) is None else ["--no-apt"]
    arguments = ["--small", "--budget", "0.01", *packages]
    first = quickstart(tmp_path, *arguments)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    outputs = tmp_path / "outputs" / "quickstart"
    assert [marker.parent.name for marker in sorted(outputs.glob("*/FINISHED"))] == [
        "1_align",
        "2_interleaved",
        "3_instruct",
    ]
    assert (outputs / "report.html").is_file()
    assert "caption_gap" in json.loads((outputs / "report.json").read_text())["figures"]
    assert "mllm chat" in first.stdout
    manifest = json.loads((tmp_path / "data" / "quickstart" / "manifest.json").read_text())
    assert all(source["licence"] and source["sha256"] for source in manifest["sources"])

    again = quickstart(tmp_path, *arguments)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert again.stdout.count("already finished") == 3
    assert "Reading" not in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_first_command_without_apt(tmp_path: Path) -> None:
    done = quickstart(tmp_path, "--no-apt", "--fraction", "0.1", "--budget", "0.01")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    manifest = json.loads((tmp_path / "data" / "quickstart" / "manifest.json").read_text())
    assert {source["registry"] for source in manifest["sources"]} == {"pypi"}
    assert (tmp_path / "outputs" / "quickstart" / "3_instruct" / "FINISHED").is_file()
