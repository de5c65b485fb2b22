"""What encoders share whose classes are those of transformers: configuration, layer, weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mllm.models.checks import building, check_sections, read_config
from mllm.models.encoders.base import VisionEncoder
from mllm.models.encoders.preprocessor import read_geometry, read_preprocessor, square
from mllm.models.errors import check_folder, loading
from mllm.models.families import model_class
from mllm.models.geometry import Geometry
from mllm.models.weight_files import check_all_used, check_weight_files

_QUIET: dict[str, Any] = {
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "pos_embed_jitter": None,
    "pos_embed_rescale": None,
    "pos_embed_shift": None,
    "projection_dropout": 0.0,
}
"""Randomness that some models add while they train: with it a packed step would differ from an
unpacked one, and a resumed run from an uninterrupted one."""

_NOT_KEPT = ("dtype", "out_features", "out_indices", "_out_features", "_out_indices", "stage_names")


class VisionTransformer(VisionEncoder):
    """Patch features of one layer of a vision transformer.

    Layers above the chosen one are not built: they would take memory and never get a gradient.
    Where the layer is the last, the model's final normalisation is applied; inner layers come as
    they are. Class and register tokens are left out: they have no place on the grid. Families
    whose class token is trained for use take `class_token: true`, which repeats it beside every
    cell (as DINOv2's depth probes do, arXiv 2304.07193, section 7.4) and doubles the width.

    Spec: `config` (the vision configuration, already cut to the chosen layer), `layer` (-1 is the
    last layer of the original, -2 the one before it), `class_token` (where the family takes it)
    and `geometry`.
    """

    MODEL: ClassVar[type[PreTrainedModel]]
    CONFIG: ClassVar[type[PreTrainedConfig]]
    DEPTH: ClassVar[str] = "num_hidden_layers"  # what the configuration calls the number of layers
    FINAL_NORM: ClassVar[str]
    ATTENTION: ClassVar[str] = "sdpa"
    RENAMED: ClassVar[dict[str, str]] = {}  # names in a folder that transformers does not map
    UNUSED: ClassVar[Mapping[str, Any]] = {}  # values of the configuration that leave parts out

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        config = self._config(spec)
        self.class_token = bool(spec.get("class_token", False))
        self.width = self._width(config) * (2 if self.class_token else 1)
        self.vision = self.MODEL._from_config(config, attn_implementation=self.ATTENTION)
        self._strip()

    def _strip(self) -> None:
        """Remove what the chosen layer does not use."""
        if self.spec["layer"] != -1:
            drop(self.vision, self.FINAL_NORM)

    @classmethod
    def _depth(cls, config: PreTrainedConfig) -> int:
        """Layers of the whole model."""
        return int(getattr(config, cls.DEPTH))

    @classmethod
    def _cut(cls, config: PreTrainedConfig, depth: int) -> None:
        """Keep the first `depth` layers."""
        setattr(config, cls.DEPTH, depth)

    @classmethod
    def _width(cls, config: PreTrainedConfig) -> int:
        """Features of a cell of the last layer built."""
        return int(config.hidden_size)

    @classmethod
    def _cells(cls, config: PreTrainedConfig, side: int) -> int:
        """Rows of the grid of an image of this side; a border below one patch is not seen."""
        return side // int(config.patch_size)

    @classmethod
    def _takes(cls, config: PreTrainedConfig) -> int | None:
        """The only image side that the positions fit; None if they fit any."""
        return int(config.image_size)

    @classmethod
    def _config(cls, spec: Mapping[str, Any]) -> PreTrainedConfig:
        # the dtype of the moment counts, not the one of the folder the encoder came from
        values = {key: value for key, value in spec["config"].items() if key != "dtype"}
        config = cls.CONFIG(**{**values, **cls.UNUSED})
        for name, value in _QUIET.items():
            if hasattr(config, name):
                setattr(config, name, value)
        config._attn_implementation = cls.ATTENTION
        return config

    @classmethod
    def _own(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """Turn a configuration of another name but the same meaning into the family's."""
        return config

    @classmethod
    def _preprocessor(cls, path: str | Path) -> Mapping[str, Any]:
        """Read what the folder says about images."""
        return read_preprocessor(path)

    @classmethod
    def _read_config(cls, path: str | Path) -> PreTrainedConfig:
        """Read config.json; of a model of images and texts, its vision part."""
        check_folder(path, "encoder")
        config = read_config("encoder", path)
        check_sections(config, path, "vision_config")
        config = cls._own(getattr(config, "vision_config", config))
        if type(config) is not cls.CONFIG:
            raise ValueError(
                f"{path} holds a {config.model_type!r} model, not {cls.__name__}{_meant(config)}"
            )
        for name in ("image_size", "patch_size"):
            if hasattr(config, name):
                side = square(getattr(config, name), f"{path}: {name} of config.json")
                setattr(config, name, side)
        channels = getattr(config, "num_channels", getattr(config, "in_channels", 3))
        if channels != 3:
            raise ValueError(f"{path}: config.json has {channels} channels, not 3")
        cls._blueprint(config, path)
        return config

    @classmethod
    def _blueprint(cls, config: PreTrainedConfig, path: str | Path) -> nn.Module:
        """Build the model without weights, to be looked at.

        Raises:
            ValueError: transformers cannot, with the folder and the reason.
        """
        with building("encoder", path), torch.device("meta"):
            model: nn.Module = cls.MODEL._from_config(
                cls._config({"config": cls._values(config)}), attn_implementation=cls.ATTENTION
            )
        return model

    @classmethod
    def _values(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """What rebuilds a configuration."""
        values = config.to_diff_dict()
        values[cls.DEPTH] = cls._depth(config)  # also where it is the class's default
        return {key: value for key, value in values.items() if key not in _NOT_KEPT}

    @classmethod
    def spec_from_folder(cls, path: str | Path, **options: Any) -> dict[str, Any]:
        """Read config.json and preprocessor_config.json."""
        return cls.spec_from(cls._read_config(path), cls._preprocessor(path), path, **options)

    @classmethod
    def spec_from(
        cls, config: PreTrainedConfig, seen: Mapping[str, Any], path: str | Path, **options: Any
    ) -> dict[str, Any]:
        """Return the spec of what both files say, changing `config`; `path` is for messages."""
        layer, depth = options.get("layer", cls.OPTIONS["layer"].default), cls._depth(config)
        if type(layer) is not int or not -depth <= layer <= -1:
            raise ValueError(
                f"layer {layer!r}: the encoder has {depth} layers, counted back from -1"
            )
        cls._cut(config, depth + layer + 1)
        geometry = cls._read_geometry(config, seen, path, options)
        spec = {
            "config": cls._values(config),
            "layer": layer,
            "geometry": geometry.to_dict(),
        }
        if "class_token" in cls.OPTIONS:
            spec["class_token"] = options.get("class_token", False)
        return spec

    @classmethod
    def _read_geometry(
        cls,
        config: PreTrainedConfig,
        seen: Mapping[str, Any],
        path: str | Path,
        options: Mapping[str, Any],
    ) -> Geometry:
        """What the folder's preprocessor file makes of an image."""
        return read_geometry(
            seen,
            path,
            cells=lambda side: cls._cells(config, side),
            takes=cls._takes(config),
            resize=options.get("resize"),
        )

    def load_weights(self, path: str | Path) -> None:
        """Load the safetensors of the folder or hub id; weights of unused layers are left out."""
        check_weight_files(path, "encoder")
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list the layers left out as unexpected
        try:
            with loading("encoder", path):
                loaded: Any = self.MODEL.from_pretrained(
                    path,
                    config=self._config(self.spec),
                    attn_implementation=self.ATTENTION,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # reported below, in one line
                    key_mapping=self.RENAMED or None,
                    dtype=torch.get_default_dtype(),
                    output_loading_info=True,
                )
        finally:
            logging.set_verbosity(level)
        self.vision, report = loaded
        self._strip()
        needed = {name for name, _ in self.vision.named_parameters()}
        wrong = sorted(needed & {_name(key) for key in report["mismatched_keys"]})
        if wrong:
            raise ValueError(
                f"{path}: {len(wrong)} weights of the encoder have another shape than config.json "
                f"says, {wrong[0]} first; take both files from one checkpoint"
            )
        missing = sorted(needed & set(report["missing_keys"]))
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} weights of the encoder are missing, {missing[0]} first"
            )
        whole = self._blueprint(self._read_config(path), path)
        check_all_used(report["unexpected_keys"], whole, path, "encoder")

    def features(self, images: Tensor) -> Tensor:
        """Encode [V, 3, S, S] to [V, cells, Dv]; prefix tokens come first and are cut off."""
        states: Tensor = self.vision(images).last_hidden_state
        cells = states[:, states.shape[1] - self.square.cells**2 :]
        if not self.class_token:
            return cells
        return torch.cat([cells, states[:, :1].expand(-1, cells.shape[1], -1)], dim=-1)


def drop(module: nn.Module, name: str) -> None:
    """Replace a part whose result is not used by the identity."""
    setattr(module, name, nn.Identity())


def drop_mask_token(model: Any) -> None:
    """Turn the mask token of self-supervised pre-training into a constant nobody reads."""
    embeddings: Any = model.embeddings
    if isinstance(token := embeddings.mask_token, nn.Parameter):
        del embeddings.mask_token
        embeddings.register_buffer("mask_token", token.detach(), persistent=False)


def _meant(config: PreTrainedConfig) -> str:
    """What to do with a folder of another kind."""
    from mllm.models.encoders import ENCODERS  # the registry names this module's families

    for name, family in ENCODERS.items():
        if getattr(family, "CONFIG", None) is type(config):
            return f"; give encoder.name: {name}"
    if model_class(config) is not None:
        return "; a language model goes to model.language_model"
    return ""


def _name(key: Any) -> str:
    """The name in a report of transformers, which lists names or (name, shape, shape)."""
    return str(key[0]) if isinstance(key, tuple) else str(key)
