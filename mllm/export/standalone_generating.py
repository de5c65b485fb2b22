"""The exported model with its output layer, and how it generates.

See `standalone`, of which this is the other half, with the same sections.

Shapes: B rows, T tokens of a row, D hidden width, W vocabulary; I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mllm.export.standalone import MllmConfig, MllmModel, MllmPreTrainedModel
from mllm.export.standalone_images import rows_of
from mllm.export.standalone_regions import pick_regions, with_regions
from mllm.export.standalone_square import pick_images
from mllm.models.families import LogitsRule
from mllm.models.geometry import Layout


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
        # asked
        asked: Tensor | None = None,
        # end
        # regions
        regions: Tensor | None = None,
        # end
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
            # asked
            asked=asked,
            # end
            # regions
            regions=regions,
            # end
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
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the images to the first step only; later ones find them in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # spatial
        if kwargs.get("inputs_embeds") is None:
            names = ("pixel_values", "original_sizes", "position_ids", "attention_mask")
            places, _ = self.model.positions(
                input_ids,
                *map(kwargs.get, names),
                # regions
                regions=kwargs.get("regions"),
                # end
            )
            inputs["position_ids"] = places[..., -inputs["input_ids"].shape[1] :]
        # end
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["pixel_values"] = inputs["original_sizes"] = None
            # asked
            inputs["asked"] = None
            # end
            # regions
            inputs["regions"] = None
            # end
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
        # asked
        asked = model_kwargs.pop("asked", None)
        # end
        # regions
        regions = model_kwargs.pop("regions", None)
        # end
        if pixel_values is not None and expand_size > 1:
            assert input_ids is not None
            layouts = self.model.layouts(pixel_values, original_sizes)
            # regions
            layouts = with_regions(layouts, regions)
            # end
            rows = self._images_of_rows(input_ids, layouts)
            images = [image for row in rows for _ in range(expand_size) for image in row]
            pixel_values, original_sizes = pick_images(
                pixel_values, original_sizes, layouts, images
            )
            # asked
            if asked is not None:
                asked = asked[rows_of([len(layout.sizes) for layout in layouts], images)]
            # end
            # regions
            regions = pick_regions(regions, images)
            # end
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        given = {"pixel_values": pixel_values, "original_sizes": original_sizes}
        # asked
        given["asked"] = asked
        # end
        # regions
        given["regions"] = regions
        # end
        return input_ids, {**model_kwargs, **given}

    def _images_of_rows(self, input_ids: Tensor, layouts: Sequence[Layout]) -> list[list[int]]:
        """Return for every row the places of its images."""
        ends = torch.tensor([layout.tokens for layout in layouts]).cumsum(0)
        row_ends = (input_ids == self.config.image_token_id).sum(dim=1).cumsum(0).cpu()
        row_of_image = torch.bucketize(ends, row_ends)
        return [(row_of_image == row).nonzero()[:, 0].tolist() for row in range(len(input_ids))]
