"""The vision transformers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, without what merges their patches.

Wang et al. 2024 (arXiv 2409.12191, section 2.1), Bai et al. 2025 (arXiv 2502.13923, section 2.1.1:
attention inside windows in most layers) and the Qwen3-VL report (arXiv 2511.21631, section 2).
Classes of transformers; merging is the connector `patch_merger`. A folder of the whole model will
do as well as one of the vision transformer alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLVisionConfig,
    Qwen2VLVisionConfig,
    Qwen3VLMoeVisionConfig,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from mllm.models.encoders.native_vit import NativeTransformer, in_blocks, in_rows
from mllm.models.geometry import Size
from mllm.parts import ENCODERS


class _Blocks(nn.Module):
    """In the place of a merger: the cells of a block beside each other, [C, Dv] to [C / n, n Dv].

    What a tower does to the order of blocks before and after its merger is so done here as well.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, states: Tensor) -> Tensor:
        """Return [C / n, n Dv]."""
        return states.reshape(-1, self.cells * states.shape[-1])


class Qwen2VLEncoder(NativeTransformer):
    """Patch features of the last layer, before the merger and its norm.

    Its patches reach through two frames of a video: an image counts as two frames that are alike.
    """

    OPTIONS = ENCODERS["qwen2_vl"].options
    MODEL: ClassVar[type[PreTrainedModel]] = Qwen2VisionTransformerPretrainedModel
    CONFIG: ClassVar[type[PreTrainedConfig]] = Qwen2VLVisionConfig
    DEPTH = "depth"
    FINAL_NORM = "merger"
    PREPROCESSOR = "Qwen2VLImageProcessor"
    RENAMED: ClassVar[dict[str, str]] = {r"^(model\.)?visual\.": ""}

    @classmethod
    def _merge(cls, config: PreTrainedConfig) -> int:
        return int(config.spatial_merge_size)

    @classmethod
    def _width(cls, config: PreTrainedConfig) -> int:
        return int(config.embed_dim)

    def _strip(self) -> None:
        self.vision.merger = _Blocks(self.geometry.merge**2)

    def encode(self, maps: Sequence[Tensor], grids: Sequence[Size]) -> Tensor:
        """Encode patches, each as (channel, frame, row, column), in the order of blocks."""
        config: Any = self.vision.config
        merge, frames = self.geometry.merge, int(config.temporal_patch_size)
        patches = torch.cat(
            [
                in_blocks(one.permute(0, 2, 4, 1, 3).flatten(0, 1), grid, merge)
                for one, grid in zip(maps, grids, strict=True)
            ]
        )
        film = patches[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)
        shapes = torch.tensor([(1, *grid) for grid in grids], device="cpu")
        known = {
            name: tensor if name.startswith("cu_") else tensor.to(film.device)
            for name, tensor in self._known(shapes).items()
        }
        levels = self._levels(self.vision(film, grid_thw=shapes, **known))
        cells = [level.unflatten(1, (merge**2, -1)).flatten(0, 1) for level in levels]
        return in_rows(torch.cat(cells, dim=-1), grids, merge)

    def _levels(self, output: Any) -> list[Tensor]:
        """What the tower made, in blocks; each layer that is asked for."""
        return [output.pooler_output]

    def _known(self, shapes: Tensor) -> dict[str, Tensor]:
        """What follows from the shapes [V, 3] alone; on a GPU a tower would wait for it.

        Bounds stay on the CPU, where the tower cuts by them.
        """
        return {
            "position_ids": get_vision_position_ids(shapes, self.geometry.merge),
            "cu_seqlens": get_vision_cu_seqlens(shapes),
        }


class Qwen2_5VLEncoder(Qwen2VLEncoder):
    """Patch features of the last layer, before the merger and its norm; windows in most layers."""

    OPTIONS = ENCODERS["qwen2_5_vl"].options
    MODEL = Qwen2_5_VisionTransformerPretrainedModel
    CONFIG = Qwen2_5_VLVisionConfig

    @classmethod
    def _width(cls, config: PreTrainedConfig) -> int:
        return int(config.hidden_size)

    def _known(self, shapes: Tensor) -> dict[str, Tensor]:
        geometry, window = self.geometry, int(self.vision.config.window_size)
        index, bounds = get_vision_window_index(shapes, geometry.merge, window, geometry.patch)
        return {**super()._known(shapes), "window_index": index, "cu_window_seqlens": bounds}


class Qwen3VLEncoder(Qwen2VLEncoder):
    """Patch features of the last layer, before the merger and its norm; learned positions too.

    With `deepstack: true` the features of the inner layers that config.json names stand beside
    them (the Qwen3-VL report, section 2: DeepStack).

    Spec: as `VisionTransformer`, and `deepstack`.
    """

    OPTIONS = ENCODERS["qwen3_vl"].options
    MODEL = Qwen3VLVisionModel
    CONFIG = Qwen3VLVisionConfig

    @classmethod
    def _own(cls, config: PreTrainedConfig) -> PreTrainedConfig:
        """Read the tower beside a mixture of experts: another name for the same fields."""
        if type(config) is not Qwen3VLMoeVisionConfig:
            return config
        return Qwen3VLVisionConfig(**{**config.to_dict(), "model_type": cls.CONFIG.model_type})

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.levels = 1 + len(self.vision.deepstack_visual_indexes)
        self.width *= self.levels

    @classmethod
    def spec_from(
        cls, config: PreTrainedConfig, seen: Mapping[str, Any], path: str | Path, **options: Any
    ) -> dict[str, Any]:
        """Return the spec of what both files say."""
        deepstack = bool(options.pop("deepstack", False))
        return {**super().spec_from(config, seen, path, **options), "deepstack": deepstack}

    @classmethod
    def _config(cls, spec: Mapping[str, Any]) -> PreTrainedConfig:
        config: Any = super()._config(spec)
        named = [layer for layer in config.deepstack_visual_indexes if layer < config.depth]
        config.deepstack_visual_indexes = named if spec.get("deepstack", True) else []
        return config  # type: ignore[no-any-return]

    @classmethod
    def _width(cls, config: PreTrainedConfig) -> int:
        return int(config.hidden_size)

    def _strip(self) -> None:
        super()._strip()
        blocks = [_Blocks(self.geometry.merge**2) for _ in self.vision.deepstack_visual_indexes]
        self.vision.deepstack_merger_list = nn.ModuleList(blocks)

    def _levels(self, output: Any) -> list[Tensor]:
        return [output.pooler_output, *output.deepstack_features]

    def _known(self, shapes: Tensor) -> dict[str, Tensor]:
        vision: Any = self.vision
        indices, weights = get_vision_interpolation_indices_and_weights(
            shapes,
            vision.num_grid_per_side,
            vision.interpolation_mode,
            vision.interpolation_align_corners,
            self.geometry.merge,
        )
        return {**super()._known(shapes), "interp_indices": indices, "interp_weights": weights}
