"""EfficientNet-Lite, from the package efficientnet-lite-pytorch (Apache-2.0, ImageNet)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllm.models.encoders.base import VisionEncoder
from mllm.models.encoders.preprocessor import (
    normalisation,
    read_preprocessor,
    resampling,
    square,
)
from mllm.models.errors import check_folder, loading, read_json, unknown
from mllm.models.geometry import RESAMPLING_NAMES, ImageGeometry
from mllm.models.weight_files import check_weight_files
from mllm.parts import ENCODERS

IMAGE_SIZES = {
    "efficientnet-lite0": 224,
    "efficientnet-lite1": 240,
    "efficientnet-lite2": 260,
    "efficientnet-lite3": 280,
    "efficientnet-lite4": 300,
}
_STRIDE = 32
_MODEL_TYPE = "efficientnet_lite"


class EfficientNetLiteEncoder(VisionEncoder):
    """The convolutional features before pooling: 1280 wide, one cell per 32 pixels.

    Spec: `variant` (a key of IMAGE_SIZES) and `geometry`.
    """

    OPTIONS = ENCODERS["efficientnet_lite"].options
    width = 1280

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        # no drop-connect: a random skip would make a packed step differ from an unpacked one
        net = _package().from_name(spec["variant"], drop_connect_rate=0.0)
        for unused in ("_fc", "_dropout", "_avg_pooling"):
            delattr(net, unused)
        self.net = net

    @classmethod
    def spec_from_folder(cls, path: str | Path, **options: Any) -> dict[str, Any]:
        """Read config.json and preprocessor_config.json."""
        check_folder(path, "encoder")
        folder = Path(path)
        config = read_json(folder / "config.json")
        if config.get("model_type") != _MODEL_TYPE:
            raise ValueError(
                f"{folder} holds a {config.get('model_type')!r} model, not an EfficientNet-Lite"
            )
        variant = config.get("variant", "")
        if variant not in IMAGE_SIZES:
            raise unknown("EfficientNet-Lite variant", variant, IMAGE_SIZES)
        seen = read_preprocessor(folder)
        where = f"{folder}: the preprocessor file"
        side = square(seen.get("image_size"), f"{where}'s image_size")
        mean, std = normalisation(seen, where)
        geometry = ImageGeometry(
            image_size=side,
            cells=-(-side // _STRIDE),
            mean=mean,
            std=std,
            resize=options.get("resize") or seen.get("resize", ""),
            resampling=resampling(seen, where),
        )
        return {"variant": variant, "geometry": geometry.to_dict()}

    def load_weights(self, path: str | Path) -> None:
        """Load model.safetensors."""
        check_weight_files(path, "encoder")
        file = Path(path) / "model.safetensors"
        with loading("encoder weights", file):
            weights = load_file(file)
        needed = self.net.state_dict()
        wrong = [
            name
            for name, value in needed.items()
            if name not in weights or weights[name].shape != value.shape
        ]
        if wrong or len(weights) > len(needed):
            other = wrong or [name for name in weights if name not in needed]
            raise ValueError(
                f"{file} does not hold the weights of {self.spec['variant']}: {len(other)} are "
                f"missing, of another shape or too many, {other[0]} first; take both files from "
                "one checkpoint"
            )
        self.net.load_state_dict(weights)

    def features(self, images: Tensor) -> Tensor:
        """Encode [V, 3, S, S] to [V, cells, 1280].

        Images with channels last are twice as fast on a CPU. The weights keep their order:
        DeepSpeed broadcasts them as bytes and needs them contiguous.
        """
        maps: Tensor = self.net.extract_features(
            images.contiguous(memory_format=torch.channels_last)
        )
        return maps.flatten(2).transpose(1, 2)


def convert_package_weights(
    weights_file: str | Path, folder: str | Path, variant: str = "efficientnet-lite0"
) -> None:
    """Turn the package's .pth into a folder that `EfficientNetLiteEncoder.from_folder` loads.

    The package's own rule scales the short side to the image size with bilinear filtering and does
    not say how to make a square; "squash" keeps the whole picture. The classifier is left out.

    Args:
        weights_file: e.g. efficientnet-lite0-57934424.pth.
        folder: made if missing; config.json is written last.

    Raises:
        ValueError: unknown variant, or not a file of tensors by name.
    """
    if variant not in IMAGE_SIZES:
        raise unknown("EfficientNet-Lite variant", variant, IMAGE_SIZES)
    try:
        state = torch.load(weights_file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{weights_file}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(
            f"{weights_file} is damaged, or not a file of weights (only tensors are read from it)"
        ) from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value.contiguous() for name, value in state.items() if "_fc." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_size": IMAGE_SIZES[variant],
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resize": "squash",
            "resample": RESAMPLING_NAMES.index("bilinear"),
        },
    )
    _write_json(folder / "config.json", {"model_type": _MODEL_TYPE, "variant": variant})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _package() -> Any:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "the encoder 'efficientnet_lite' needs a package: "
            "pip install --no-deps efficientnet-lite-pytorch"
        ) from error
    return EfficientNet
