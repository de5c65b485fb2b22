"""What CLIP and SigLIP share: a vision transformer of transformers and its preprocessor file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from mllm.models.encoders.base import VisionEncoder
from mllm.models.errors import check_folder, loading, read_json
from mllm.models.geometry import RESAMPLING_NAMES, ImageGeometry


class VisionTransformer(VisionEncoder):
    """Patch features of one layer of a vision transformer.

    Layers above the chosen one are not built: they would take memory and never get a gradient.

    Spec: `config` (the vision configuration, already cut to the chosen layer), `layer` (-1 is the
    last layer of the original, -2 the one before it) and `geometry`.
    """

    OPTIONS = ("resize", "layer")
    MODEL: ClassVar[type[PreTrainedModel]]
    CONFIG: ClassVar[type[PreTrainedConfig]]
    DEFAULT_LAYER: ClassVar[int] = -2

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        config = self._config(spec)
        self.width = config.hidden_size
        self.vision = self.MODEL._from_config(config, attn_implementation="sdpa")
        self._strip()

    @abstractmethod
    def _strip(self) -> None:
        """Remove what the chosen layer does not use."""

    @classmethod
    def _config(cls, spec: Mapping[str, Any]) -> PreTrainedConfig:
        # the dtype of the moment counts, not the one of the folder the encoder came from
        values = {key: value for key, value in spec["config"].items() if key != "dtype"}
        config = cls.CONFIG(**values)
        config._attn_implementation = "sdpa"
        return config

    @classmethod
    def spec_from_folder(cls, path: str | Path, **options: Any) -> dict[str, Any]:
        """Read config.json and preprocessor_config.json."""
        check_folder(path, "encoder")
        with loading("encoder", path):
            config = AutoConfig.from_pretrained(path)
        config = getattr(config, "vision_config", config)
        if not isinstance(config, cls.CONFIG):
            raise ValueError(f"{path} holds a {config.model_type!r} model, not {cls.__name__}")
        layer = options.get("layer", cls.DEFAULT_LAYER)
        if not -config.num_hidden_layers <= layer <= -1:
            raise ValueError(
                f"layer {layer}: the encoder has {config.num_hidden_layers} layers, "
                "counted back from -1"
            )
        config.num_hidden_layers += layer + 1
        geometry = _geometry(_preprocessor(path), config, options.get("resize"), str(path))
        values = config.to_diff_dict()
        values["num_hidden_layers"] = config.num_hidden_layers
        return {"config": values, "layer": layer, "geometry": geometry.to_dict()}

    def load_weights(self, path: str | Path) -> None:
        """Load the safetensors of the folder or hub id; weights of unused layers are left out."""
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list the layers left out as unexpected
        try:
            with loading("encoder", path):
                loaded: Any = self.MODEL.from_pretrained(
                    path,
                    config=self._config(self.spec),
                    attn_implementation="sdpa",
                    use_safetensors=True,
                    dtype=torch.get_default_dtype(),
                    output_loading_info=True,
                )
        finally:
            logging.set_verbosity(level)
        self.vision, report = loaded
        self._strip()
        needed = {name for name, _ in self.vision.named_parameters()}
        missing = sorted(needed & set(report["missing_keys"]))
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} weights of the encoder are missing, {missing[0]} first"
            )

    def features(self, images: Tensor) -> Tensor:
        """Encode [V, 3, S, S] to [V, cells, Dv]."""
        states: Tensor = self.vision(images).last_hidden_state
        return states[:, states.shape[1] - self.geometry.cells**2 :]


def drop(module: nn.Module, name: str) -> None:
    """Replace a part whose result is not used by the identity."""
    setattr(module, name, nn.Identity())


def _preprocessor(path: str | Path) -> dict[str, Any]:
    """Read preprocessor_config.json of a folder or hub id."""
    name = "preprocessor_config.json"
    if Path(path).is_dir():
        return read_json(Path(path) / name)
    with loading("preprocessor", path):
        return read_json(Path(str(cached_file(path, name))))


def _geometry(
    seen: Mapping[str, Any], config: PreTrainedConfig, resize: str | None, path: str
) -> ImageGeometry:
    """Read a transformers preprocessor_config.json."""
    size = seen.get("size", config.image_size)
    short_edge = size if isinstance(size, int) else size.get("shortest_edge", 0)
    crops = bool(short_edge) and seen.get("do_center_crop", False)
    crop = seen.get("crop_size", config.image_size)
    side = (crop if isinstance(crop, int) else crop["height"]) if crops else config.image_size
    if side != config.image_size:
        raise ValueError(
            f"{path}: the preprocessor makes {side} pixels, the encoder takes {config.image_size}"
        )
    rule = resize or ("crop" if crops else "squash")
    normal = seen.get("do_normalize", True)
    return ImageGeometry(
        image_size=config.image_size,
        cells=config.image_size // config.patch_size,
        mean=tuple(seen["image_mean"]) if normal else (0.0, 0.0, 0.0),
        std=tuple(seen["image_std"]) if normal else (1.0, 1.0, 1.0),
        resize=rule,
        resampling=RESAMPLING_NAMES[seen.get("resample", 3)],
        short_edge=short_edge if rule == "crop" and crops else 0,
    )
