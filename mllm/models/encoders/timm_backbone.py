"""Any backbone of timm (Wightman 2019, github.com/huggingface/pytorch-image-models), an optional
package: vision transformers and convolutional networks alike give the feature map of one level."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from mllm.models.encoders.base import VisionEncoder
from mllm.models.encoders.preprocessor import read_file, square
from mllm.models.errors import check_folder, loading, unknown
from mllm.models.geometry import RESAMPLING_NAMES, ImageGeometry
from mllm.models.weight_files import check_weight_files
from mllm.parts import ENCODERS


class TimmEncoder(VisionEncoder):
    """Features of one level of a backbone, row by row of its grid; later levels are not built.

    The folder (or hub id) is one of timm's: config.json with `architecture` and `pretrained_cfg`,
    which says how images are prepared, and model.safetensors. `layer` counts timm's feature
    levels back from -1, the default: blocks of a transformer, stages of most other networks. At -1
    the backbone's final normalisation is applied, where it has one; inner levels come as they are.
    Class and register tokens are left out.

    timm's own centre cut rounds half a pixel to even, ours down: where the scaled side minus the
    cut is odd, the two may be one pixel apart.

    Spec: `architecture`, `args` (of `timm.create_model`), `layer`, `width` and `geometry`.
    """

    OPTIONS = ENCODERS["timm"].options

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.width = int(spec["width"])
        self.net, self._level = _backbone(spec)

    @classmethod
    def spec_from_folder(cls, path: str | Path, **options: Any) -> dict[str, Any]:
        """Read config.json, and measure the features on tensors without data."""
        check_folder(path, "encoder")
        config = read_file(path, "config.json")
        seen = config.get("pretrained_cfg")
        if "architecture" not in config or not isinstance(seen, dict):
            raise ValueError(
                f"{path} holds a {config.get('model_type')!r} model, not one of timm: its "
                "config.json has no architecture with a pretrained_cfg"
            )
        layer = options.get("layer", cls.OPTIONS["layer"].default)
        args = config.get("model_args") or {}
        spec = {
            "architecture": config["architecture"],
            # no random skips: a packed step would differ from an unpacked one
            "args": {key: value for key, value in args.items() if not key.endswith("_rate")},
            "layer": layer,
        }
        shape = _prepared(seen, path, options.get("resize"))
        spec["width"], cells = _measured(spec, shape["image_size"], path)
        return {**spec, "geometry": ImageGeometry(**shape, cells=cells).to_dict()}

    def load_weights(self, path: str | Path) -> None:
        """Load model.safetensors; the classifier and later levels are left out."""
        check_weight_files(path, "encoder")
        file = Path(path) / "model.safetensors"
        with loading("encoder weights", path):
            if not Path(path).is_dir():
                file = Path(str(cached_file(str(path), file.name)))
            weights = load_file(file)
        needed = self.net.state_dict()
        missing = [name for name in needed if name not in weights]
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} weights of the encoder are missing, {missing[0]} first"
            )
        wrong = [name for name, value in needed.items() if weights[name].shape != value.shape]
        if wrong:
            raise ValueError(
                f"{path}: {len(wrong)} weights of the encoder have another shape than "
                f"{self.spec['architecture']}, {wrong[0]} first; take both files from one "
                "checkpoint"
            )
        self.net.load_state_dict({name: weights[name] for name in needed})

    def features(self, images: Tensor) -> Tensor:
        """Encode [I, 3, S, S] to [I, cells, width]."""
        maps = _level(self.net, images, self._level, self.spec["layer"] == -1)
        return maps.flatten(2).transpose(1, 2)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the encoder 'timm' needs a package: pip install timm ({reason})"
        ) from error
    return timm


def _backbone(spec: Mapping[str, Any]) -> tuple[Any, int]:
    """Build without weights up to the chosen level; return it and the level's number."""
    timm, architecture = _timm(), spec["architecture"]
    if not timm.is_model(architecture):
        raise unknown("architecture of timm", architecture, timm.list_models())
    net = timm.create_model(architecture, pretrained=False, num_classes=0, **spec["args"])
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"timm's {architecture} does not give features of its levels")
    last = spec["layer"] == -1
    try:
        levels = net.prune_intermediate_layers([spec["layer"]], prune_norm=not last)
    except AssertionError as error:
        raise ValueError(f"layer {spec['layer']}: {architecture} has fewer levels") from error
    for module in net.modules():  # rates that are the architecture's own defaults
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return net, int(levels[-1])


def _level(net: Any, images: Tensor, level: int, norm: bool) -> Tensor:
    """The feature map [I, D, rows, columns] of a level."""
    maps: list[Tensor] = net.forward_intermediates(
        images, indices=[level], norm=norm, intermediates_only=True, output_fmt="NCHW"
    )
    return maps[-1]


def _measured(spec: Mapping[str, Any], side: int, path: str | Path) -> tuple[int, int]:
    """Return (width, cells of a row) by running the backbone on tensors without data."""
    architecture = spec["architecture"]
    with torch.device("meta"):
        net, level = _backbone(spec)
        try:
            maps = _level(net, torch.zeros(1, 3, side, side), level, spec["layer"] == -1)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{path}: timm's {architecture} gives no features of level {spec['layer']} of "
                f"{side} pixels ({str(error).splitlines()[0]})"
            ) from error
    _, width, rows, columns = maps.shape
    if rows != columns:
        raise ValueError(f"{path}: timm's {architecture} makes {rows} x {columns} cells, no square")
    maps.sum().backward()
    idle = [name for name, weight in net.named_parameters() if weight.grad is None]
    if idle:
        raise ValueError(
            f"{path}: {len(idle)} weights of timm's {architecture} do not reach level "
            f"{spec['layer']} and could not learn, {idle[0]} first; it is not supported"
        )
    return width, rows


def _prepared(seen: Mapping[str, Any], path: str | Path, resize: str | None) -> dict[str, Any]:
    """Values of an ImageGeometry, all but the cells, from timm's pretrained_cfg."""
    where = f"{path}: pretrained_cfg of config.json"
    needed = ("input_size", "interpolation", "crop_pct", "mean", "std")
    missing = [key for key in needed if seen.get(key) is None]
    if missing:
        raise ValueError(f"{where} gives no {missing[0]}; copy the checkpoint's own config.json")
    channels, *sides = seen["input_size"]
    if channels != 3:
        raise ValueError(f"{where}: input_size has {channels} channels, not 3")
    side = square(sides, f"{where}: input_size")
    if seen["interpolation"] not in RESAMPLING_NAMES:
        raise unknown(f"interpolation in {where}", seen["interpolation"], RESAMPLING_NAMES)
    if min(seen["std"]) <= 0:
        raise ValueError(f"{where}: std divides by zero")
    rules = {"center": "crop", "squash": "squash", "border": "pad"}
    mode = seen.get("crop_mode") or "center"
    if mode not in rules:
        raise unknown(f"crop_mode in {where}", mode, rules)
    short_edge = floor(side / seen["crop_pct"])
    if mode != "center" and short_edge != side:
        raise ValueError(f"{where}: crop_mode {mode} with crop_pct {seen['crop_pct']} is not known")
    rule = resize or rules[mode]
    return {
        "image_size": side,
        "mean": tuple(seen["mean"]),
        "std": tuple(seen["std"]),
        "resize": rule,
        "resampling": seen["interpolation"],
        "short_edge": short_edge if rule == rules[mode] == "crop" else 0,
    }
