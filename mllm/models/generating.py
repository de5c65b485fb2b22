"""How `generate` of transformers is served: images, positions and beams.

Shapes: B rows, T tokens of a row, V views of all rows.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationMixin

from mllm.models.geometry import Size
from mllm.models.images import NAMES, Images
from mllm.models.positions import is_spatial, named, placed
from mllm.models.views import repeat_rows


class Generating(GenerationMixin):
    """What a `MultimodalModel` does between the steps of a generation."""

    config: Any
    encoder: Any
    connector: Any
    fusion: Any

    def tokens_per_view(self, sizes: Tensor) -> list[int]:
        """Return M of every view, from their sizes [V, 2]."""
        return [*map(prod, self._token_grids(sizes))]

    def _token_grids(self, sizes: Tensor) -> list[Size]:
        """Return (rows, columns) of the visual tokens of every view."""
        grids, connector = self.encoder.grids(sizes.tolist()), self.connector
        return [connector.output_grid(connector.spec, grid) for grid in grids]

    def _placed(
        self,
        input_ids: Tensor | None,
        images: Images,
        position_ids: Tensor | None,
        mask: Tensor | None = None,
        bounds: tuple[int, ...] | None = None,
        cache: Cache | None = None,
    ) -> Tensor | None:
        """Return positions as the language model takes them, see `positions.placed`.

        Of embeddings that are given without ids nobody knows which are images: all count as text.
        """
        if input_ids is None or not is_spatial(self.config.text_config):
            return position_ids
        sizes = images.sizes
        grids = self._token_grids(sizes) if sizes is not None and self.fusion.PARTS else []
        slots = input_ids == self.config.image_token_id
        seen = 0 if cache is None else cache.get_seq_length()
        return placed(
            slots, grids, named(images.order, images.bags), position_ids, mask, bounds, seen
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the images to the first step only; later ones find them in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if kwargs.get("inputs_embeds") is None and is_spatial(self.config.text_config):
            images = Images.taken_from(dict(kwargs))
            plain, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
            places = self._placed(input_ids, images, plain, mask)
            assert places is not None
            inputs["position_ids"] = places[..., -inputs["input_ids"].shape[1] :]
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs |= dict.fromkeys(NAMES)
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows for beams or several answers; a row's views stay together."""
        images = Images.taken_from(model_kwargs)
        if images.pixels is not None and expand_size > 1:
            assert input_ids is not None
            images = self._repeated(input_ids, expand_size, images)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        return input_ids, {**model_kwargs, **images.by_name()}

    def _repeated(self, input_ids: Tensor, times: int, images: Images) -> Images:
        """Repeat the images of every row so many times."""
        assert images.sizes is not None
        tokens = self.tokens_per_view(images.sizes)
        slots = input_ids == self.config.image_token_id
        arranged = None
        if images.order is not None:
            arranged = len(images.order if images.bags is None else images.bags)
        wanted = self.fusion.tokens_of_rows(slots, tokens, arranged)
        return repeat_rows(images, tokens, wanted, times)
