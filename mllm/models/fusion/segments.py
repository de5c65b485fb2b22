"""Which tokens of the text see which visual tokens, and attention of the one to the other.

A segment is a run of text tokens that see the same visual tokens. Scores exist for a segment at a
time: never for all tokens of a pack and all its visual tokens.

Shapes: S text tokens that see something, K visual tokens, N segments, H heads, E head width.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from mllm.models.backends import chosen_backend

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segments:
    """Runs of text tokens with what they see.

    Attributes:
        where: int64 [S], places of the text tokens in all rows laid one after another.
        queries, keys: text tokens and visual tokens of each segment.
        sees: int64 [sum of keys], the visual tokens of all segments one after another. None: all
            visual tokens as they are.
    """

    where: Tensor
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    sees: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """Spans of text places, and of the visual tokens that they see; one segment each."""

    texts: tuple[Span, ...]
    tokens: tuple[Span, ...]

    def segments(self, device: torch.device) -> Segments:
        """Return the same as tensors."""
        whole = list(itertools.pairwise((0, *accumulate(b - a for a, b in self.tokens))))
        sees = None if list(self.tokens) == whole else spread(self.tokens, device)
        return Segments(spread(self.texts, device), sizes(self.texts), sizes(self.tokens), sees)


def sight(
    places: Sequence[int], images: Sequence[int], bounds: Sequence[int], only_last: bool
) -> Sight:
    """Let every token see the images before it in its document, an image's own token included.

    Args:
        places: of the image tokens in all rows laid one after another, rising.
        images: visual tokens of each.
        bounds: where documents begin, and the end.
        only_last: not all images before it, only the last.
    """
    ends = (0, *accumulate(images))
    texts, tokens, first, document = [], [], 0, -1
    for number, place in enumerate(places):
        mine = bisect_right(bounds, place) - 1
        if mine != document:
            first, document = number, mine
        stop = bounds[mine + 1]
        if number + 1 < len(places):
            stop = min(stop, places[number + 1])
        texts.append((place, stop))
        tokens.append((ends[number if only_last else first], ends[number + 1]))
    return Sight(tuple(texts), tuple(tokens))


def spread(spans: Sequence[Span], device: torch.device) -> Tensor:
    """Return the numbers of all spans, int64 [n]."""
    numbers = [torch.arange(low, high) for low, high in spans]
    return (torch.cat(numbers) if numbers else torch.arange(0)).to(device)


def sizes(spans: Sequence[Span]) -> tuple[int, ...]:
    """Return the length of every span."""
    return tuple(high - low for low, high in spans)


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Attend from text tokens [S, H, E] to the visual tokens [K, H, E] of their segment: [S, H, E].

    No order among the visual tokens, no mask: a segment sees all of its own.
    """
    if segments.sees is not None:
        sees = segments.sees.to(key.device)
        key, value = (tensor.index_select(0, sees) for tensor in (key, value))
    backend = chosen_backend(query.device, query.dtype)
    if backend == "sdpa" or query.shape[-1] % 8:  # the fused kernels take multiples of 8
        return _sdpa(query, key, value, segments)
    first, second = (
        torch.tensor((0, *accumulate(counts)), dtype=torch.int32, device=query.device)
        for counts in (segments.queries, segments.keys)
    )
    most = max(segments.queries), max(segments.keys)
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        output: Tensor = flash_attn_varlen_func(query, key, value, first, second, *most)
        return output
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(query, key, value, first, second, *most)
    assert isinstance(attended, Tensor)
    return attended


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Run one segment after another."""
    queries = query.transpose(0, 1)[None].split(segments.queries, dim=2)
    keys, values = (
        tensor.transpose(0, 1)[None].split(segments.keys, dim=2) for tensor in (key, value)
    )
    attended = map(functional.scaled_dot_product_attention, queries, keys, values)
    return torch.cat([*attended], dim=2)[0].transpose(0, 1)
