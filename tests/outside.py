"""A process of its own that cannot import this project: what folders are to those who lack it.

`ask` starts it. There the functions `answer` of scripts run, which import nothing of ours.

python outside.py SCRIPT REQUESTS.json: each request has a name and arguments of `answer`; what it
returns is saved beside the requests.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

HIDDEN = {"mllm", "data_packing", "tests"}


class Hide:
    """Finds the project's packages first, and refuses them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
        return None


def ask(
    script: Path, requests: Mapping[str, Mapping[str, Any]], scratch: Path
) -> dict[str, dict[str, Any]]:
    """Return what a script answers to every request; `error` where it could not.

    Args:
        script: a file with a function `answer`, which returns tensors and plain values by name.
        requests: its arguments, plain values for JSON.
        scratch: a folder for files.
    """
    file = scratch / "requests.json"
    file.write_text(json.dumps(requests))
    unset = {"PYTHONPATH", "PYTHONSTARTUP"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HF_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", __file__, str(script), str(file)]
    run = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    print(run.stderr)
    assert run.returncode == 0, run.stderr
    import torch

    return {name: torch.load(scratch / f"{name}.pt", weights_only=True) for name in requests}


def _main(script: str, file: str) -> None:
    sys.meta_path.insert(0, Hide())
    try:
        __import__("mllm")
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("mllm can be imported")
    import torch

    torch.set_num_threads(1)
    answer = runpy.run_path(script)["answer"]
    for name, request in json.loads(Path(file).read_text()).items():
        try:
            found = answer(**request)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, Path(file).parent / f"{name}.pt")


if __name__ == "__main__":
    _main(*sys.argv[1:])
