"""Which torch is installed: never gigabytes of CUDA on a machine without a GPU, unasked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts.packages import write

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
# A virtual environment's python whose pip answers from files.
case "$*" in
*"import sys, torch"*)
    mkdir -p "$HERE/site/torch"
    echo "__version__ = '${TORCH:-none}'" > "$HERE/site/torch/__init__.py"
    PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$HERE/site" exec "$REAL" "$@" ;;
*--report*)
    while [ "$1" != --report ]; do shift; done
    cat "$HERE/report.json" > "$2" ;;
*"-m pip"*)
    echo "$*" >> "$HERE/log"
    case "$*" in *--index-url*) exit "$INDEX_STATUS" ;; esac ;;
*) exec "$REAL" "$@" ;;
esac
"""
CPU = ["torch", "sympy"]
CUDA = ["torch", "nvidia-cublas", "triton"]


Install = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Runs install_torch; gives its result and what pip was asked for."""

    def run(names: list[str], index_status: int = 0, **more: str) -> tuple[int, str, list[str]]:
        write(tmp_path / "bin" / "python", PYTHON.encode()).chmod(0o755)
        report = {"install": [{"metadata": {"name": name}} for name in names]}
        write(tmp_path / "report.json", json.dumps(report).encode())
        script = f'ROOT={CHECKOUT}; . "$ROOT/scripts/environment.sh"; install_torch'
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env={
                "PATH": f"{tmp_path}/no-gpu:/usr/bin:/bin",
                "HERE": str(tmp_path),
                "REAL": sys.executable,
                "MLLM_VENV": str(tmp_path),
                "INDEX_STATUS": str(index_status),
                **more,
            },
            capture_output=True,
            text=True,
        )
        log = tmp_path / "log"
        asked = log.read_text().splitlines() if log.exists() else []
        return result.returncode, result.stderr, asked

    write(tmp_path / "no-gpu" / "nvidia-smi", b"#!/bin/sh\nexit 9\n").chmod(0o755)
    return run


def test_an_ordinary_torch_that_is_a_cpu_build_is_taken(install: Install) -> None:
    status, _, asked = install(CPU)
    assert status == 0
    assert len(asked) == 1
    assert "--index-url" not in asked[0]


def test_otherwise_pytorchs_cpu_index_is_used(install: Install) -> None:
    status, _, asked = install(CUDA)
    assert status == 0
    assert [("--index-url" in line) for line in asked] == [True]


def test_without_that_index_nothing_is_installed_and_the_reason_said(install: Install) -> None:
    status, said, asked = install(CUDA, index_status=1)
    assert status != 0
    assert len(asked) == 1
    assert "nvidia-cublas triton" in said
    assert "MLLM_TORCH=any" in said


def test_a_person_can_accept_the_ordinary_torch(install: Install) -> None:
    status, _, asked = install(CUDA, MLLM_TORCH="any")
    assert status == 0
    assert [("--index-url" in line) for line in asked] == [False]


def test_the_pinned_torch_is_kept_and_another_is_replaced(install: Install) -> None:
    constraints = (CHECKOUT / "constraints.txt").read_text().splitlines()
    (pinned,) = (line.removeprefix("torch==") for line in constraints if line.startswith("torch=="))
    assert install(CPU, TORCH=f"{pinned}+cpu") == (0, "", [])
    status, _, asked = install(CUDA, TORCH="2.11.0+cpu")
    assert status == 0
    assert [("--index-url" in line) for line in asked] == [True]


SCRIPTS = sorted((CHECKOUT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name == "environment.sh" or os.access(script, os.X_OK)
