"""The model classes of an exported folder, as plain transformers loads them.

`mllm.export.source` writes this module and `standalone_processor` into the folder, after the parts
of this package that the model is made of. Lines between the name of a section and `# end` are for
models that need them; `source_sections` has the names. For encoders of native resolution
`standalone_native` stands in for `standalone_square`, and `original_sizes` is `image_grid_thw`.

Shapes: B rows, T tokens of a row, D hidden width, W vocabulary; I images.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
)
from transformers.utils.generic import can_return_tuple

from mllm.export.standalone_blocks import opened_masks
from mllm.export.standalone_fused import fuse_images, run_fused
from mllm.export.standalone_positions import placed_after, standing_tokens, view_grids
from mllm.export.standalone_regions import region_means, with_regions
from mllm.export.standalone_square import (
    encode_images,
    image_geometry,
    image_layouts,
    image_rows,
    sizes_of,
)
from mllm.models.connectors import CONNECTORS
from mllm.models.encoders import ENCODERS
from mllm.models.fusion import FUSIONS
from mllm.models.geometry import Layout
from mllm.models.standing import Newline, standing


class MllmConfig(PreTrainedConfig):
    """Configuration of the model.

    Attributes:
        encoder: what the vision encoder is built from: `name`, `geometry` and what its class adds.
        connector: what the connector is built from: `name` and its options.
        images: how images are cut into tiles; empty for not at all.
        # fused
        fusion: how visual tokens reach the language model: `name` and its options.
        # end
        text_config: configuration of the language model.
        image_token_id: the id that a visual token takes the place of.
        head_bias: whether the output layer has a bias.
        logits_times, logits_cap: what happens to the output layer's numbers, see `LogitsRule`.
    """

    model_type = "mllm_standalone"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}  # type: ignore[misc]

    encoder: dict[str, Any] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    # fused
    fusion: dict[str, Any] = field(default_factory=dict)
    # end
    text_config: Any = None
    image_token_id: int = -1
    head_bias: bool = False
    logits_times: float = 1.0
    logits_cap: float | None = None
    tie_word_embeddings: bool = False
    # blocks
    bidirectional_images: bool = True
    is_mm_prefix_lm: bool = True
    # end

    def __post_init__(self, **kwargs: Any) -> None:
        """Make `text_config` an object; transformers does so only from 5.20."""
        if not isinstance(self.text_config, PreTrainedConfig):
            values = {"model_type": "llama", **(self.text_config or {})}
            self.text_config = AutoConfig.for_model(**values)
        super().__post_init__(**kwargs)


class MllmPreTrainedModel(PreTrainedModel):
    """What both model classes share."""

    config_class = MllmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities: ClassVar[list[str]] = ["image", "text"]  # type: ignore[misc]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]  # type: ignore[misc]
    # in_sequence
    _supports_attention_backend = True
    # end
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        """Leave new modules as their constructors made them.

        Only what is in no file is computed again: loading starts from tensors without data.
        """
        compute = getattr(module, "init_non_persistent_buffers", None)  # timm's name for it
        if compute is not None:
            compute()


class MllmModel(MllmPreTrainedModel):
    """Vision encoder, connector and language model, without the output layer."""

    def __init__(self, config: MllmConfig) -> None:
        super().__init__(config)
        self.vision_tower = ENCODERS[config.encoder["name"]](config.encoder)
        text = config.text_config
        chosen = text._attn_implementation or "sdpa"  # the default
        if chosen == "sdpa" and getattr(text, "attn_logit_softcapping", None):
            text._attn_implementation = "eager"  # SDPA drops the cap, in silence before 5.21
        self.language_model = AutoModel.from_config(text)
        embedding: Any = self.language_model.get_input_embeddings()
        width = embedding.embedding_dim
        # fused
        self.fusion = FUSIONS[config.fusion["name"]](config.fusion, text, width)
        width = self.fusion.visual_width
        # end
        self.connector = CONNECTORS[config.connector["name"]](
            config.connector, self.vision_tower.width, width
        )
        self.geometry = image_geometry(config.encoder["geometry"], config.images)
        # newline
        self.connector.newline = Newline(width)
        # end
        self.post_init()
        # fused
        self._no_split_modules = {*(self._no_split_modules or ()), *self.fusion.WHOLE}
        # end

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def layouts(self, pixel_values: Tensor, original_sizes: Tensor | None) -> list[Layout]:
        """Return the layout of every image."""
        sizes = sizes_of(pixel_values, original_sizes)
        layouts = image_layouts(self.geometry, self.config.connector, sizes)
        # fused
        layouts = [self.fusion.layout(layout) for layout in layouts]
        # end
        return layouts

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self,
        pixel_values: Tensor,
        original_sizes: Tensor | None = None,
        # asked
        asked: Tensor | None = None,
        # end
        # regions
        regions: Tensor | None = None,
        # end
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images; `pooler_output` is a list with the visual tokens of each.

        Args:
            pixel_values, original_sizes: what `MllmImageProcessor.preprocess` made of all images.
            # asked
            asked: [V, L], ids of what is asked about each view, -1 behind their end.
            # end
            # regions
            regions: as `region_rows`; their features come after the visual tokens of their images.
            # end
        """
        layouts = self.layouts(pixel_values, original_sizes)
        rows = sum(image_rows(layout) for layout in layouts)
        if rows != len(pixel_values):
            raise ValueError(f"pixel_values has {len(pixel_values)} rows, these images have {rows}")
        weight = next(self.vision_tower.parameters())
        pixel_values = pixel_values.to(weight.device, weight.dtype)
        features, grids = encode_images(self.vision_tower, pixel_values, layouts)
        like = next(self.connector.parameters())
        tokens = self.connector(
            features.flatten(0, -2).to(like.device, like.dtype),
            grids,
            # asked
            *self._asked(asked, len(grids), like),
            # end
        )
        made = tokens.split([layout.made for layout in layouts])
        # regions
        means = region_means(made, regions)
        # end
        # ordered
        made = [self._ordered(tokens, layout) for tokens, layout in zip(made, layouts, strict=True)]
        # end
        # regions
        made = [torch.cat(both) for both in zip(made, means, strict=True)]
        # end
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(made))  # type: ignore[arg-type]

    # asked
    def _asked(self, asked: Tensor | None, views: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings of what is asked about each view [V, L, D], and where they are."""
        if asked is None or not asked.numel():
            asked = torch.full((views, 1), -1)
        embedding: Any = self.get_input_embeddings()
        asked = asked.to(embedding.weight.device)
        text = embedding(asked.clamp(min=0)).to(like.device, like.dtype)
        return text, (asked >= 0).to(like.device)

    # end
    # ordered
    def _ordered(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Put the visual tokens of an image into the order in which they stand in the text."""
        if layout.order is None:
            return tokens
        newline: Any = getattr(self.connector, "newline", None)
        rows = tokens if newline is None else newline(tokens)
        return standing(rows, torch.from_numpy(layout.order).to(tokens.device), None)

    # end
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        original_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        # asked
        asked: Tensor | None = None,
        # end
        # regions
        regions: Tensor | None = None,
        # end
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states [B, T, D] after the final norm.

        Args:
            input_ids: [B, T], with as many image tokens as the images make visual tokens.
            pixel_values, original_sizes: as `get_image_features`, of all rows in order.
            attention_mask, position_ids, past_key_values, kwargs: of the language model.
            inputs_embeds: [B, T, D] instead of ids, visual tokens already in their places.
            # asked
            asked: [V, L], as `get_image_features`.
            # end
            # regions
            regions: as `get_image_features`.
            # end
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("pixel_values need input_ids, which say where the images are")
        # spatial
        position_ids, ahead = self.positions(
            input_ids,
            pixel_values,
            original_sizes,
            position_ids,
            attention_mask,
            past_key_values,
            # regions
            regions,
            # end
        )
        # end
        images = None
        if pixel_values is not None:
            shown = self.get_image_features(
                pixel_values,
                original_sizes,
                # asked
                asked=asked,
                # end
                # regions
                regions=regions,
                # end
                return_dict=True,
            )
            images = shown.pooler_output
        # in_sequence
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, images)
        # end
        # blocks
        attention_mask = opened_masks(
            self.config, input_ids, inputs_embeds, attention_mask, past_key_values
        )
        # end
        kwargs |= {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        # in_sequence
        outputs: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds, **kwargs
        )
        # end
        # fused
        fused = fuse_images(self, input_ids, images, inputs_embeds, past_key_values)
        outputs = run_fused(self.language_model, fused, **kwargs)
        # end
        # spatial
        cache: Any = outputs.past_key_values
        if cache is not None and ahead is not None:
            cache.rope_deltas = ahead
        # end
        return outputs

    # spatial
    def positions(
        self,
        input_ids: Tensor | None,
        pixel_values: Any,
        original_sizes: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Any = None,
        # regions
        regions: Tensor | None = None,
        # end
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return positions [3, B, T] (time, row, column), and what `placed_after` returns besides.

        Of embeddings without ids nobody knows which are images: all count as text.
        """
        if input_ids is None:
            return position_ids, None
        none = pixel_values is None and original_sizes is None
        layouts = [] if none else self.layouts(pixel_values, original_sizes)
        # fused
        layouts = layouts if self.fusion.PARTS else []  # one token stands for an image, as text
        # end
        grids = view_grids(self.vision_tower, self.config.connector, layouts)
        # regions
        layouts = with_regions(layouts, regions)
        # end
        slots = input_ids == self.config.image_token_id
        order = standing_tokens(layouts)
        return placed_after(slots, grids, order, position_ids, attention_mask, cache)

    def get_rope_index(
        self,
        input_ids: Tensor,
        original_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return positions [3, B, T] and [B, 1], how far each row's are ahead of plain ones.

        The name is the one of Qwen2-VL's class; vLLM asks for it.
        """
        if original_sizes is None and bool((input_ids == self.config.image_token_id).any()):
            raise ValueError("the positions of image tokens need original_sizes")
        given = (None, original_sizes, None, attention_mask)
        positions, ahead = self.positions(input_ids, *given)
        assert positions is not None
        assert ahead is not None
        return positions, ahead

    # end
    # in_sequence
    def _embed(self, input_ids: Any, images: Any) -> Tensor:
        """Embed ids [B, T] to [B, T, D], with the image tokens replaced by visual tokens."""
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        if images is None:
            return embeds
        tokens = torch.cat(images).to(embeds.device, embeds.dtype)
        slots = input_ids == self.config.image_token_id
        if int(slots.sum()) != len(tokens):
            raise ValueError(
                f"the text has {int(slots.sum())} image tokens, the images make {len(tokens)} "
                "visual tokens: write the text with this model's processor and do not cut it"
            )
        return embeds.masked_scatter(slots[..., None], tokens)

    # end
