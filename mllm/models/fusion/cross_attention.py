"""Gated cross-attention layers before chosen layers of the language model.

Flamingo, Alayrac et al. 2022, arXiv 2204.14198: the layers are those of section 2.2 (figure 4), a
token sees the last image before it (section 2.3), the MLP has squared ReLUs as its models do. An
image takes one token in the text, and its visual tokens are keys and values: those of all its tiles
where it is cut, as in Llama 3.2's vision models (mllama in transformers). Tokens that see no image
pass such a layer unchanged, MLP included (as there): a text without images stays the language
model's own, however far the gates have opened.

Shapes: B rows, T tokens of a row, D hidden width; S text tokens that see an image, K visual tokens
of a call, W their width; H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm import parts
from mllm.models.fusion.base import Fused, Fusion, Visual, Work, untouched
from mllm.models.fusion.hooks import Hook
from mllm.models.fusion.segments import Segments, attend, sight, sizes, spread
from mllm.models.geometry import Layout

_EPS = 1e-6
_KEPT = "mllm_images"  # attribute of a cache: what later tokens of its rows see

Pair = tuple[Tensor, Tensor]
"""Keys and values [K, H, E]."""


class GatedLayer(GradientCheckpointingLayer):
    """Attention to visual tokens and an MLP, each behind a tanh gate that starts at 0."""

    def __init__(self, width: int, visual: int, heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=_EPS)
        self.visual_norm = nn.RMSNorm(visual, eps=_EPS)
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(visual, heads * head_width, bias=False)
        self.value = nn.Linear(visual, heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_norm = nn.RMSNorm(width, eps=_EPS)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        rows: Tensor,
        tokens: Tensor | None,
        *,
        segments: Segments,
        pair: Pair | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Pair | None]:
        """Map hidden states [S, D], which see tokens [K, W], to [S, D].

        Args:
            rows, tokens: no tokens where `pair` is given.
            segments: which rows see which tokens.
            pair: keys and values that an earlier call has kept.
            keep: return them too.
        """
        if pair is None:
            assert tokens is not None
            seen = self.visual_norm(tokens)
            pair = self._split(self.key(seen)), self._split(self.value(seen))
        attended = attend(self._split(self.query(self.norm(rows))), *pair, segments).flatten(1)
        rows = rows + self.attention_gate.tanh() * self.out(attended)
        inner = functional.relu(self.up(self.mlp_norm(rows))).square()
        rows = rows + self.mlp_gate.tanh() * self.down(inner)
        return rows, pair if keep else None

    def _split(self, x: Tensor) -> Tensor:
        """[n, H x E] to [n, H, E]."""
        return x.view(len(x), self.heads, -1)


@dataclass(slots=True)
class _Call:
    """What one call of the language model sees.

    Attributes:
        tokens: [K, W]; None where all layers have keys and values in `pairs`.
        segments: None for a blank image, which every layer runs on and no token sees.
        pairs: of each layer.
        keep: whether `pairs` is to be filled.
    """

    tokens: Tensor | None
    segments: Segments | None
    pairs: dict[str, Pair] = field(default_factory=dict)
    keep: bool = False


@dataclass(frozen=True, slots=True)
class _Kept:
    """What later tokens of a cache's rows see.

    Attributes:
        seen: visual tokens that each row sees, 0 for none.
        pairs: their keys and values, row after row, of each layer.
    """

    seen: tuple[int, ...]
    pairs: dict[str, Pair]


class CrossAttention(Fusion):
    """Gated cross-attention to visual tokens, which are no part of the sequence.

    Layers stand before layers 0, `every`, 2 x `every` and so on of the language model, or before
    those in `layers`. With `only_immediate: false` a token sees all images before it in its
    document.
    """

    OPTIONS = parts.FUSIONS["cross_attention"].options
    WHOLE: ClassVar[tuple[str, ...]] = (GatedLayer.__name__,)
    PARTS: ClassVar[bool] = False

    def __init__(self, spec: Mapping[str, Any], config: PreTrainedConfig, embedding: int) -> None:
        super().__init__(spec, config, embedding)
        count, width = config.num_hidden_layers, config.hidden_size
        heads = self.chosen("heads") or config.num_attention_heads
        own_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
        head_width = self.chosen("head_width") or own_width
        inner = self.chosen("inner") or 4 * width
        self.pair_work = 2 * heads * head_width
        self.only_immediate = self.chosen("only_immediate")
        self.layers = nn.ModuleDict(
            {
                str(number): GatedLayer(width, embedding, heads, head_width, inner)
                for number in self.chosen_layers(range(0, count, self.chosen("every")), count)
            }
        )

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse two ways of choosing layers."""
        super().check(spec)
        if spec.get("layers") is not None and spec.get("every") is not None:
            raise ValueError("fusion cross_attention: give every or layers, not both")

    @classmethod
    def layout(cls, layout: Layout) -> Layout:
        """Return the same image with one token in the text, without marks and newlines.

        Keys have no order, so ends of lines would say nothing. Padding stays left out.
        """
        if layout.order is None:
            return replace(layout, writing=(1,))
        order = layout.order[layout.order >= 0]
        return replace(layout, writing=(1,), grid=(1, len(order)), order=order)

    def arranged(
        self,
        rows: Tensor,
        order: Tensor | None,
        bags: Tensor | None,
        views: tuple[int, ...],
    ) -> Visual:
        """Return the visual tokens image by image: `bags` are those of an image, not a mean."""
        if order is None or not len(order):
            return Visual(rows, views)
        images = [1] * len(order) if bags is None or not len(bags) else bags.tolist()
        return Visual(rows.index_select(0, order), tuple(images))

    def tokens_of_rows(
        self, slots: Tensor, views: Sequence[int], arranged: int | None
    ) -> list[int]:
        """Return how many visual tokens each row has, or with `arranged` how many images."""
        counts: list[int] = slots.sum(dim=1).tolist()
        _check_images(sum(counts), len(views) if arranged is None else arranged)
        if arranged is not None:
            return counts
        ends = (0, *accumulate(views))
        return [ends[high] - ends[low] for low, high in pairwise((0, *accumulate(counts)))]

    def fuse(
        self,
        text: Tensor,
        slots: Tensor,
        visual: Visual | None,
        bounds: Sequence[int] | None,
        cache: Cache | None,
    ) -> Fused:
        """Leave the embeddings as they are; chosen layers see the images."""
        places: list[int] = slots.flatten().nonzero().flatten().tolist()
        _check_images(len(places), len(visual.images) if visual is not None else 0)
        kept = _kept(cache, places)
        if visual is not None and not visual.images:
            text = untouched(text, visual)
        if kept is not None:
            return Fused(text, self._hooks(_later(kept, text)))
        if visual is None:
            return Fused(text)
        if not visual.images:
            return Fused(text, self._hooks(_Call(visual.tokens.to(text.dtype), None)))
        rows, tokens = text.shape[:2]
        keep = bounds is None  # a pack has no cache
        bounds = bounds or range(0, rows * tokens + 1, tokens)
        seen = sight(places, visual.images, bounds, self.only_immediate)
        call = _Call(visual.tokens.to(text.dtype), seen.segments(text.device), keep=keep)
        last = [(0, 0)] * rows
        for (place, _), span in zip(seen.texts, seen.tokens, strict=True):
            last[place // tokens] = span
        return Fused(text, self._hooks(call), partial(_keep, call, last))

    def _hooks(self, call: _Call) -> tuple[Hook, ...]:
        return tuple(Hook(int(name), partial(self._see, name, call)) for name in self.layers)

    def _see(self, name: str, call: _Call, hidden: Tensor, _: Tensor) -> Tensor:
        """Run a layer on the hidden states [B, T, D] that see something."""
        flat, segments, layer = hidden.flatten(0, 1), call.segments, self.layers[name]
        place = layer.get_parameter("attention_gate").device
        if place.type == "meta":  # its weights come when it is called
            place = flat.device
        tokens = None if call.tokens is None else call.tokens.to(place)
        if segments is None:
            assert tokens is not None
            nobody = Segments(torch.arange(1), (1,), (len(tokens),))
            rows, _pair = layer(flat[:1].to(place), tokens, segments=nobody)
            nothing: Tensor = hidden + rows[:0].sum().to(flat.device)
            return nothing
        where = segments.where.to(flat.device)
        rows, pair = layer(
            flat.index_select(0, where).to(place),
            tokens,
            segments=segments,
            pair=call.pairs.get(name),
            keep=call.keep,
        )
        if call.keep:
            call.pairs[name] = pair
        return flat.index_copy(0, where, rows.to(flat.device)).view_as(hidden)

    def work(self) -> Work:
        """Return the layers' matrices, and the products of attention."""
        parts: dict[str, tuple[nn.Parameter, ...]] = {
            kind: tuple(
                layer.get_submodule(name).get_parameter("weight")
                for layer in self.layers.values()
                for name in names
            )
            for kind, names in (
                ("token", ("query", "out", "up", "down")),
                ("visual", ("key", "value")),
            )
        }
        return Work(parts["token"], parts["visual"], float(self.pair_work * len(self.layers)))


def _check_images(wanted: int, images: int) -> None:
    """Refuse a text that does not have one image token for every image.

    Raises:
        ValueError: with both numbers.
    """
    if wanted != images:
        raise ValueError(
            f"the text has {wanted} image tokens, but there are {images} images, and with fusion "
            "cross_attention an image takes one: the processor and the model disagree"
        )


def _kept(cache: Cache | None, places: Sequence[int]) -> _Kept | None:
    """What the rows of a cache see; `places` are those of image tokens in this call.

    Raises:
        ValueError: there are some, and the cache has tokens.
    """
    if cache is None:
        return None
    if int(cache.get_seq_length()) == 0:
        if hasattr(cache, _KEPT):
            delattr(cache, _KEPT)  # it was emptied, and is used for other rows
        return None
    if places:
        raise ValueError(
            "fusion cross_attention: images come with the first call of a cache, before other "
            "tokens are in it"
        )
    kept: _Kept | None = getattr(cache, _KEPT, None)
    return kept


def _keep(call: _Call, last: Sequence[tuple[int, int]], cache: Cache) -> None:
    """Leave keys and values of what each row's later tokens see in its cache."""
    some = next(iter(call.pairs.values()))[0]
    seen = spread(last, some.device)
    pairs = call.pairs
    if len(seen) < len(some):
        pairs = {
            name: (key.index_select(0, where), value.index_select(0, where))
            for name, (key, value) in pairs.items()
            for where in [seen.to(key.device)]
        }
    setattr(cache, _KEPT, _Kept(sizes(last), pairs))


def _later(kept: _Kept, text: Tensor) -> _Call:
    """New tokens [B, T, D] of rows that have seen their images."""
    rows, tokens = text.shape[:2]
    if rows != len(kept.seen):
        raise ValueError(
            f"fusion cross_attention: the cache has images of {len(kept.seen)} rows, but {rows} "
            "rows go on"
        )
    texts = [(row * tokens, (row + 1) * tokens) for row in range(rows) if kept.seen[row]]
    keys = tuple(count for count in kept.seen if count)
    return _Call(None, Segments(spread(texts, text.device), sizes(texts), keys), kept.pairs)
