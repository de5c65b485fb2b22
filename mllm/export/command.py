"""What `mllm export` does: load a stage's folder, write another program's."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mllm.export import EXPORTS
from mllm.export.adapter import HOLDERS, Adapter
from mllm.models.assemble import load
from mllm.models.composites import COMPOSITES
from mllm.models.errors import choose, read_json
from mllm.models.hub import hub_file, local_folder
from mllm.precisions import AUTO, as_dtype
from mllm.training.run_folder import NoSpace

_SPARE = 64 * 2**20  # tokenizer and other small files

_LOADED = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({path!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({path!r}, trust_remote_code=True)"""
_ADAPTED = """
from peft import PeftModel

model = PeftModel.from_pretrained(model, {path!r})"""


def origin(folder: Path) -> str:
    """Return the export that a model came from, which is written where `--to` is left out.

    Raises:
        ValueError: it was assembled from parts.
    """
    config = read_json(hub_file(folder, "config.json", "model"))
    if config.get("model_type") in COMPOSITES:
        return COMPOSITES[config["model_type"]].name
    if found := config.get("origin"):
        return str(found)
    raise ValueError(f"{folder} was assembled from parts; give --to: {', '.join(EXPORTS)}")


def write(folder: Path, to: str, output: Path, dtype: str = AUTO, adapter: bool = False) -> None:
    """Write a stage's model in another format.

    Args:
        folder: what a stage saved, or a folder to begin from; or a hub's `owner/name`.
        to: a key of EXPORTS.
        output: a folder that does not exist or is empty; nothing is left there when this fails.
        dtype: of the weights, as `precisions.precision`; `auto` keeps the saved one.
        adapter: take the language model's LoRA adapter out of the weights and keep it beside them.

    Raises:
        ValueError: what cannot be exported, with the reason.
        NoSpace: the disk is too small.
    """
    exporter = choose(EXPORTS, to, "export")
    wanted = as_dtype(dtype)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already and not empty; give a new folder")
    folder = local_folder(folder, "model")
    lora = Adapter.read(folder / "lora") if adapter else None
    model, processor = load(folder, dtype=wanted)
    if lora is not None:
        lora.take_out(model)
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    if (free := shutil.disk_usage(parent).free) < size + _SPARE:
        raise NoSpace(f"{output} needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB")
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=parent))
    try:
        exporter(model, processor, draft)
        if lora is not None:
            lora.write(model, HOLDERS[to], draft / "adapter")
        draft.chmod(0o755)
        if output.exists():
            output.rmdir()
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def summary(to: str, output: Path) -> str:
    """Return what was written, and the Python that loads it."""
    files = sorted(path for path in output.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files) / 1e6
    lines = [f"{output}: {len(files)} files, {total:,.1f} MB"]
    lines += [f"  {path.relative_to(output)}" for path in files]
    code = _LOADED if to == "transformers" else _LOADED.replace(", trust_remote_code=True", "")
    lines += ["", code.format(path=str(output))]
    if (adapter := output / "adapter").exists():
        lines.append(_ADAPTED.format(path=str(adapter)))
    return "\n".join(lines)
