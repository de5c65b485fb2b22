"""What plain transformers makes of a folder, in a process that cannot import `mllm`.

python outside_process.py JOBS RESULTS: JOBS is JSON, a list of {folder, messages} or {folder,
image, text}; RESULTS is a safetensors file with ids, logits and eight new tokens of each job.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

Job = dict[str, Any]


class Blocker(MetaPathFinder):
    """Finds nothing, and nobody after it is asked."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] in ("mllm", "data_packing"):
            raise ImportError(f"{name} is blocked")
        return None


def run(jobs: Sequence[Job], scratch: Path) -> list[dict[str, Any]]:
    """Return what the process wrote, job by job; `class` is the name of the model's class."""
    from safetensors.torch import load_file

    asked, answered = scratch / "jobs.json", scratch / "results.safetensors"
    asked.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, __file__, str(asked), str(answered)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = [{"class": name} for name in json.loads(done.stdout)]
    for key, tensor in load_file(answered).items():
        number, name = key.split(".")
        results[int(number)][name] = tensor
    return results


def _main(asked: str, answered: str) -> None:
    sys.meta_path.insert(0, Blocker())
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    try:
        import mllm  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("mllm can be imported")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    classes = []
    for number, job in enumerate(json.loads(Path(asked).read_text())):
        processor = AutoProcessor.from_pretrained(job["folder"])
        model = AutoModelForImageTextToText.from_pretrained(job["folder"]).eval()
        classes.append(type(model).__name__)
        if "messages" in job:
            inputs = processor.apply_chat_template(
                job["messages"],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            image = Image.open(job["image"])
            inputs = processor(images=image, text=job["text"], return_tensors="pt")
        with torch.no_grad():
            found[f"{number}.logits"] = model(**inputs).logits
            new = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        found[f"{number}.ids"] = inputs["input_ids"]
        found[f"{number}.new"] = new[:, inputs["input_ids"].shape[1] :].contiguous()
    save_file(found, answered)
    print(json.dumps(classes))


if __name__ == "__main__":
    _main(*sys.argv[1:])
