"""The model classes of an exported folder, as plain transformers loads them.

`mllm.export.source` writes this module and `standalone_processor` into the folder, after the parts
of this package that the model is made of. Lines up to `# end` are for some models only: those after
`# tiles` for models that cut images, `# ordered` for models that leave some visual tokens out,
`# newline` for models whose lines of visual tokens end with a learned row, `# fused` for models
whose images reach the language model's layers (they have `standalone_fused` too), `# in_sequence`
for all others. For encoders of native resolution `standalone_native` stands in for
`standalone_square`, and `original_sizes` is called `image_grid_thw`.

Shapes: B rows, T tokens of a row, D hidden width, W vocabulary; I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from mllm.export.standalone_fused import fuse_images, run_fused
from mllm.export.standalone_square import (
    encode_images,
    image_geometry,
    image_layouts,
    image_rows,
    pick_images,
    sizes_of,
)
from mllm.models.connectors import CONNECTORS
from mllm.models.encoders import ENCODERS
from mllm.models.families import LogitsRule
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
        self, pixel_values: Tensor, original_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images; `pooler_output` is a list with the visual tokens of each.

        Args:
            pixel_values, original_sizes: what `MllmImageProcessor.preprocess` made of all images.
        """
        layouts = self.layouts(pixel_values, original_sizes)
        rows = sum(image_rows(layout) for layout in layouts)
        if rows != len(pixel_values):
            raise ValueError(f"pixel_values has {len(pixel_values)} rows, these images have {rows}")
        weight = next(self.vision_tower.parameters())
        pixel_values = pixel_values.to(weight.device, weight.dtype)
        features, grids = encode_images(self.vision_tower, pixel_values, layouts)
        like = next(self.connector.parameters())
        tokens = self.connector(features.flatten(0, -2).to(like.device, like.dtype), grids)
        made = tokens.split([layout.made for layout in layouts])
        # ordered
        made = [self._ordered(tokens, layout) for tokens, layout in zip(made, layouts, strict=True)]
        # end
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(made))  # type: ignore[arg-type]

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states [B, T, D] after the final norm.

        Args:
            input_ids: [B, T], with as many image tokens as the images make visual tokens.
            pixel_values, original_sizes: as `get_image_features`, of all rows in order.
            attention_mask, position_ids, past_key_values, kwargs: of the language model.
            inputs_embeds: [B, T, D] instead of ids, visual tokens already in their places.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("pixel_values need input_ids, which say where the images are")
        kwargs |= {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        # in_sequence
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values, original_sizes)
        outputs: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds, **kwargs
        )
        # end
        # fused
        images = None
        if pixel_values is not None:
            shown = self.get_image_features(pixel_values, original_sizes, return_dict=True)
            images = shown.pooler_output
        fused = fuse_images(self, input_ids, images, inputs_embeds, past_key_values)
        outputs = run_fused(self.language_model, fused, **kwargs)
        # end
        return outputs

    # in_sequence
    def _embed(self, input_ids: Any, pixel_values: Any, original_sizes: Any) -> Tensor:
        """Embed ids [B, T] to [B, T, D], with the image tokens replaced by visual tokens."""
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        images = self.get_image_features(pixel_values, original_sizes, return_dict=True)
        tokens = torch.cat(images.pooler_output).to(embeds.device, embeds.dtype)
        slots = input_ids == self.config.image_token_id
        if int(slots.sum()) != len(tokens):
            raise ValueError(
                f"the text has {int(slots.sum())} image tokens, the images make {len(tokens)} "
                "visual tokens: write the text with this model's processor and do not cut it"
            )
        return embeds.masked_scatter(slots[..., None], tokens)

    # end


class MllmForConditionalGeneration(MllmPreTrainedModel, GenerationMixin):
    """The model with its output layer: texts and images in, text out."""

    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}  # type: ignore[misc]

    def __init__(self, config: MllmConfig) -> None:
        super().__init__(config)
        self.model = MllmModel(config)
        embedding: Any = self.model.get_input_embeddings()
        self.lm_head = nn.Linear(
            embedding.embedding_dim, config.text_config.vocab_size, bias=config.head_bias
        )
        modules = self.model.named_modules()
        name = next(name for name, module in modules if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        head: nn.Module = self.lm_head
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = value

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As `MllmModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

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
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, W] and, with labels [B, T] (not shifted), the mean loss over them.

        The other arguments are those of `MllmModel`. `logits_to_keep`: only the last so many
        positions (0: all), or the positions themselves.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            original_sizes=original_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        whole = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if whole else logits_to_keep
        rule = LogitsRule(self.config.logits_times, self.config.logits_cap)
        logits = rule(self.lm_head(outputs.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the images to the first step only; later ones find them in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["pixel_values"] = inputs["original_sizes"] = None
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows for beams or several answers; a row's images stay together."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        original_sizes = model_kwargs.pop("original_sizes", None)
        if pixel_values is not None and expand_size > 1:
            assert input_ids is not None
            layouts = self.model.layouts(pixel_values, original_sizes)
            rows = self._images_of_rows(input_ids, layouts)
            images = [image for row in rows for _ in range(expand_size) for image in row]
            pixel_values, original_sizes = pick_images(
                pixel_values, original_sizes, layouts, images
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        given = {"pixel_values": pixel_values, "original_sizes": original_sizes}
        return input_ids, {**model_kwargs, **given}

    def _images_of_rows(self, input_ids: Tensor, layouts: Sequence[Layout]) -> list[list[int]]:
        """Return for every row the places of its images."""
        ends = torch.tensor([layout.tokens for layout in layouts]).cumsum(0)
        row_ends = (input_ids == self.config.image_token_id).sum(dim=1).cumsum(0).cpu()
        row_of_image = torch.bucketize(ends, row_ends)
        return [(row_of_image == row).nonzero()[:, 0].tolist() for row in range(len(input_ids))]
