"""The model: encoder → connector → fusion → language model.

Shapes: B rows, T tokens of a row, D hidden width, W vocabulary; V views of the call (a view is one
thing that the encoder encodes), P bytes of all their pixels, M visual tokens of a view, E their
width: D, or what the fusion asks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mllm.models import attention
from mllm.models.blocks import what_attention_is_told
from mllm.models.config import MultimodalConfig
from mllm.models.connectors import CONNECTORS, Connector
from mllm.models.encoders import ENCODERS, VisionEncoder
from mllm.models.errors import check_folder, choose, loading
from mllm.models.families import causal_class, check_config, output_layer
from mllm.models.fusion import Fused, Fusion, Visual, check_images, fusion_class, hooked
from mllm.models.generating import Generating
from mllm.models.images import Images
from mllm.models.standing import Newline
from mllm.models.tiles import TILINGS
from mllm.models.weight_files import check_weight_files

_NEVER_QUANTISED = ("encoder", "connector", "fusion", "lm_head")
"""What stays whole when a model is loaded in 4 or 8 bits, unless the user names other modules."""


class MultimodalModel(Generating, PreTrainedModel, GenerationMixin):
    """A vision encoder, a connector and a causal language model.

    No weight is touched outside its own module's forward, so every part may be sharded.

    Args:
        config: what to build.
        encoder, language_model: ready parts with weights; built without weights if left out.

    Attributes:
        encoder, connector, fusion, language_model: the parts; `train:` keys of a recipe name them.
    """

    config_class = MultimodalConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(
        self,
        config: MultimodalConfig,
        encoder: VisionEncoder | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        text = config.text_config
        check_config(text)
        self.encoder = encoder or choose(ENCODERS, config.encoder["name"], "encoder")(
            config.encoder
        )
        language_model = language_model or causal_class(text).from_config(
            text, attn_implementation=attention.NAME
        )
        embedding: Any = language_model.get_input_embeddings()  # OPT's may be narrower than hidden
        self.fusion: Fusion = fusion_class(config.fusion)(
            config.fusion, text, embedding.embedding_dim
        )
        self.connector: Connector = choose(CONNECTORS, config.connector["name"], "connector")(
            config.connector, self.encoder.width, self.fusion.visual_width
        )
        width = embedding.embedding_dim
        if self.connector.reads_text(config.connector) and self.fusion.visual_width != width:
            raise ValueError(
                f"connector {config.connector['name']}: text needs visual tokens as wide as token "
                f"embeddings, and the fusion {config.fusion['name']} has others; leave text out"
            )
        self.language_model = language_model
        self.cut_images(config.images)
        # looped over in Python, experts call modules by what the tokens are; shards cannot bear it
        experts = language_model.get_correct_experts_implementation(None)
        for shared in (text, language_model.config):  # the outer config resets its parts'
            shared._attn_implementation = attention.NAME
            shared._experts_implementation = experts
        self.post_init()
        # a block's parts never land on two devices: their sums would meet nowhere
        whole = {type(part).__name__ for part in (self.encoder, self.connector)}
        self._no_split_modules = {*(self._no_split_modules or ()), *whole, *self.fusion.WHOLE}

    def _init_weights(self, module: nn.Module) -> None:
        """Leave new modules as their constructors made them; the parts know best.

        Only what is in no file is computed again: loading starts from tensors without data.
        """
        compute = getattr(module, "init_non_persistent_buffers", None)  # timm's name for it
        if compute is not None:
            compute()

    def cut_images(self, images: dict[str, Any]) -> None:
        """Take images as they are cut by this `images:` section; a new newline is random."""
        check_images(self.config.fusion, images)
        self.config.images = images
        needed = "tiling" in images and TILINGS[images["tiling"]].NEWLINE and self.fusion.PARTS
        if needed and not hasattr(self.connector, "newline"):
            self.connector.newline = Newline(self.fusion.visual_width).to(self.dtype)
        elif not needed and hasattr(self.connector, "newline"):
            del self.connector.newline

    # -- the path from ids and pixels to hidden states ------------------------------------------

    def hidden_states(
        self,
        input_ids: Tensor,
        pixels: Tensor | None = None,
        sizes: Tensor | None = None,
        order: Tensor | None = None,
        bags: Tensor | None = None,
        asked: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return hidden states [B, T, D] after the final norm; `lm_head` turns them into logits.

        Args:
            input_ids: [B, T]; a pack is one row, [T] or [1, T].
            pixels: uint8 [P], the views of all rows one after another, each as [height, width, 3].
                None: no image.
            sizes: [V, 2], (height, width) of each view. Best on the CPU, where its numbers are
                needed; a GPU is waited for once.
            order, bags, asked: as `Images`.
            position_ids: [B, T] or [T]; in a pack they restart with every document (the default).
                A language model of three directions makes its own of them; [3, B, T] stay.
            cu_seqlens: int32 [n+1], document bounds of a pack. None: ordinary rows.
            attention_mask: [B, T], 1 where a row has a token. Not for packs.
            documents: int32 [n+1], document bounds of one row with a mask of its own: images are
                seen inside a document only.

        Raises:
            ValueError: image tokens and features differ in number, views that the encoder does not
                take, or wrong bounds.
        """
        images = Images(pixels, sizes, order, bags, asked)
        states: Tensor = self._states(
            input_ids, images, position_ids, cu_seqlens, attention_mask, documents, **kwargs
        ).last_hidden_state
        return states

    @property
    def lm_head(self) -> nn.Module:
        """The output layer [.., D] -> [.., W]; call it as a module, a shard is gathered then.

        It gives logits as the family defines them, its scale and soft cap included.
        """
        return output_layer(self.get_output_embeddings(), self.language_model.config)

    def image_features(self, pixels: Tensor, sizes: Tensor, asked: Tensor | None = None) -> Tensor:
        """Return the visual tokens [sum M, E] that views make; arguments as `hidden_states`."""
        sizes = sizes.cpu()
        trains = self.encoder.trains
        if self.encoder.training != (self.training and trains):
            self.encoder.train(self.training)  # frozen or thawed since train() was called
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            features = self.encoder(pixels, sizes)
        features = features.to(next(self.connector.parameters()).dtype)
        grids = self.encoder.grids(sizes.tolist())
        if not self.connector.reads_text(self.connector.spec):
            tokens: Tensor = self.connector(features, grids)
            return tokens
        if asked is None or not asked.numel():
            asked = sizes.new_full((len(sizes), 1), -1, device=pixels.device, dtype=torch.int64)
        text = self.get_input_embeddings()(asked.clamp(min=0)).to(features.dtype)
        tokens = self.connector(features, grids, text, asked >= 0)
        return tokens

    def _states(
        self,
        input_ids: Tensor | None,
        images: Images,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        attention_mask: Tensor | None,
        documents: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model without its output layer: a BaseModelOutputWithPast."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if cu_seqlens is not None and attention_mask is not None:
            raise ValueError("a pack (cu_seqlens) is one row without an attention mask")
        if position_ids is not None and position_ids.ndim == 1:
            position_ids = position_ids[None]
        if input_ids is not None and input_ids.ndim == 1:
            input_ids = input_ids[None]
        entered = input_ids if inputs_embeds is None else inputs_embeds
        assert entered is not None
        bounds = _bounds(documents if cu_seqlens is None else cu_seqlens, entered.shape[:2])
        cache = kwargs.get("past_key_values")
        fused = self._fuse(input_ids, images, inputs_embeds, bounds, cache)
        body, layers = self.language_model.base_model, self.config.text_config.num_hidden_layers
        if position_ids is None and cu_seqlens is not None and bounds is not None:
            position_ids = _restarting_positions(bounds, fused.embeds.device)[None]
        packed = None if cu_seqlens is None else bounds
        kwargs |= what_attention_is_told(self.config, input_ids, packed, cache)
        kwargs["position_ids"] = self._placed(
            input_ids, images, position_ids, attention_mask, bounds, cache
        )
        if cu_seqlens is None or bounds is None:
            with hooked(body, layers, fused.hooks):
                states = body(inputs_embeds=fused.embeds, attention_mask=attention_mask, **kwargs)
            if fused.keep is not None and states.past_key_values is not None:
                fused.keep(states.past_key_values)
            return states
        with attention.packed_call(body, layers), hooked(body, layers, fused.hooks):
            return body(
                inputs_embeds=fused.embeds,
                cu_seqlens=cu_seqlens,
                bounds=bounds,
                **{"use_cache": False, **kwargs},
            )

    def _fuse(
        self,
        input_ids: Tensor | None,
        images: Images,
        embeds: Tensor | None = None,
        bounds: tuple[int, ...] | None = None,
        cache: Cache | None = None,
    ) -> Fused:
        """Return what the language model starts from: ids [B, T], embedded, and their images."""
        if embeds is not None:  # what stands at image tokens is in them
            nowhere = embeds.new_zeros(embeds.shape[:2], dtype=torch.bool)
            return self.fusion.fuse(embeds, nowhere, None, bounds, cache)
        assert input_ids is not None
        text = self.language_model.get_input_embeddings()(input_ids)
        slots = input_ids == self.config.image_token_id
        visual = self._visual(images, input_ids.device)
        return self.fusion.fuse(text, slots, visual, bounds, cache)

    def _visual(self, images: Images, device: torch.device) -> Visual | None:
        """Return the visual tokens of a call; None where there are none and no rank waits."""
        if images.pixels is None or images.sizes is None or not images.views:
            if images.pixels is None and not self.training:
                return None
            # every rank runs the vision path in every call, or sharded weights would wait for ever
            pixels, sizes = self.encoder.blank(device)
            return Visual(self._rows(pixels, sizes)[: sum(self.tokens_per_view(sizes))], ())
        rows = self._rows(images.pixels, images.sizes, images.asked)
        views = tuple(self.tokens_per_view(images.sizes.cpu()))
        return self.fusion.arranged(rows, images.order, images.bags, views)

    def _rows(self, pixels: Tensor, sizes: Tensor, asked: Tensor | None = None) -> Tensor:
        """Return what can stand at image tokens: visual tokens of all views, and the newline."""
        tokens = self.image_features(pixels, sizes, asked)
        newline: Newline | None = getattr(self.connector, "newline", None)
        return tokens if newline is None else newline(tokens)

    # -- what transformers expects ---------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixels: Tensor | None = None,
        sizes: Tensor | None = None,
        order: Tensor | None = None,
        bags: Tensor | None = None,
        asked: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, W] and, with labels [B, T] (not shifted), the mean loss over them.

        The other arguments are those of `hidden_states`. `inputs_embeds` [B, T, D] stand in for
        ids, visual tokens included. `logits_to_keep`: only the last so many positions (0: all), or
        the positions themselves. `output_hidden_states=True` gives the language model's;
        `output_attentions` is refused (ValueError), for attention keeps no weights.
        """
        if kwargs.pop("output_attentions", None) or self.config.output_attentions:
            raise ValueError("output_attentions: attention keeps no weights here; leave it out")
        kwargs.setdefault("output_hidden_states", self.config.output_hidden_states or None)
        given = {
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "inputs_embeds": inputs_embeds,
        }
        extra = {name: value for name, value in (given | kwargs).items() if value is not None}
        images = Images(pixels, sizes, order, bags, asked)
        states = self._states(input_ids, images, position_ids, cu_seqlens, attention_mask, **extra)
        kept = states.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            span = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            kept = kept[:, span]
        logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            labels = labels if labels.ndim == 2 else labels[None]
            loss = self.language_model.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1]
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=states.past_key_values,
            hidden_states=states.hidden_states,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None, **kwargs: Any
    ) -> Any:
        """Load what `save_pretrained` wrote; arguments as in transformers, safetensors only.

        None: no folder, but `config` and `state_dict`.

        Raises:
            ValueError: not a model of this kind, files missing or damaged, weights that do not fit.
        """
        path = pretrained_model_name_or_path
        if path is not None:
            check_folder(path, "model")
            if not {"subfolder", "variant"} & kwargs.keys():  # files of other names
                check_weight_files(path, "model")
        wants_report = kwargs.pop("output_loading_info", False)
        quantisation: Any = kwargs.get("quantization_config")
        if getattr(quantisation, "llm_int8_skip_modules", ()) is None:
            quantisation.llm_int8_skip_modules = list(_NEVER_QUANTISED)
        with loading("model", path or "memory"):
            loaded: Any = super().from_pretrained(
                path, **{**kwargs, "output_loading_info": True, "use_safetensors": True}
            )
        model, report = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, report.get(kind) or ())):
                raise ValueError(
                    f"{path or 'the model'}: the weights do not fit the configuration "
                    f"({len(names)} {kind.replace('_', ' ')}, {names[0]} first)"
                )
        return (model, report) if wants_report else model

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's output layer, without what its family does afterwards."""
        head: nn.Module | None = self.language_model.get_output_embeddings()
        assert head is not None
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's output layer."""
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The language model without its output layer."""
        return self.language_model.base_model


def _bounds(cu_seqlens: Tensor | None, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Document bounds of one row as plain numbers; None where every row is a document."""
    if cu_seqlens is None:
        return None
    rows, tokens = shape
    if rows != 1:
        raise ValueError("a pack (cu_seqlens) is one row without an attention mask")
    return attention.document_bounds(cu_seqlens, tokens)


def _restarting_positions(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions [T] that restart at every bound."""
    spans = itertools.pairwise(bounds)
    return torch.cat([torch.arange(high - low, device=device) for low, high in spans])
