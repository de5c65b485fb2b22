"""What every fusion is: visual tokens of the connector in, a language model that sees them out.

Shapes: B rows, T tokens of a row, D width of token embeddings; K visual tokens of a call, I images
of a call, E width that the connector makes of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from mllm.models.errors import check_options
from mllm.models.fusion.hooks import Hook
from mllm.models.geometry import Layout
from mllm.models.standing import standing
from mllm.parts.option import Option, chosen, problems


@dataclass(frozen=True, slots=True)
class Visual:
    """The visual tokens of a call.

    Attributes:
        tokens: [K, E], in the order in which they stand.
        images: how many of them each image has (each view, where the views of an image have tokens
            of their own in the text). Empty: they are of a blank image that nobody sees, made so
            that every rank runs every weight.
    """

    tokens: Tensor
    images: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fused:
    """What a call of the language model starts from.

    Attributes:
        embeds: [B, T, D], what enters its first layer.
        hooks: what else reaches it.
        keep: given the cache that the call filled, leaves there what later calls need.
    """

    embeds: Tensor
    hooks: tuple[Hook, ...] = ()
    keep: Callable[[Cache], None] | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What a fusion adds to a step, for the cost of a pack.

    Attributes:
        token: weights that every token of the text passes; visual: that every visual token passes.
        pair: multiply-adds of a forward pass for every text token and visual token that it sees.
    """

    token: tuple[nn.Parameter, ...] = ()
    visual: tuple[nn.Parameter, ...] = ()
    pair: float = 0.0


class Fusion(nn.Module, ABC):
    """From token embeddings and visual tokens to what the language model computes with.

    Weights are touched inside their own modules' forward only, and every training call runs every
    module, image or not: where weights are sharded, ranks would wait for each other otherwise.

    Args:
        spec: its options by name; stored in the model's config.json.
        config: the language model's.
        embedding: D.

    Attributes:
        OPTIONS: what a recipe may set, by name; declared in mllm/parts/fusions.py.
        WHOLE: names of its classes whose parts must be on one device.
        PARTS: whether parts of an image have tokens of their own in the text: its visual tokens,
            marks of tiles and ends of lines, regions. Otherwise an image takes one token.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    WHOLE: ClassVar[tuple[str, ...]] = ()
    PARTS: ClassVar[bool] = True

    def __init__(self, spec: Mapping[str, Any], config: PreTrainedConfig, embedding: int) -> None:
        super().__init__()
        self.check(spec)
        self.spec = dict(spec)
        self.embedding = embedding

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse options that make no sense.

        Raises:
            ValueError: an unknown option or a bad value.
        """
        options = {name: value for name, value in spec.items() if name != "name"}
        name = spec.get("name", cls.__name__)
        check_options(options, cls.OPTIONS, f"the fusion {name}")
        for _, problem in problems(cls.OPTIONS, options):
            raise ValueError(f"fusion {name}: {problem}")

    def chosen(self, name: str) -> Any:
        """Return what the spec gives, or the option's default."""
        return chosen(self.OPTIONS, self.spec, name)

    def chosen_layers(self, otherwise: Iterable[int], count: int) -> tuple[int, ...]:
        """Return `layers`, of a language model of `count`.

        Raises:
            ValueError: it has no such layer.
        """
        layers = tuple(self.chosen("layers") or otherwise)
        if layers[-1] >= count:
            raise ValueError(
                f"fusion {self.spec['name']}: there is no layer {layers[-1]}; the language model "
                f"has {count} layers, 0 to {count - 1}"
            )
        return layers

    @classmethod
    def layout(cls, layout: Layout) -> Layout:
        """Return what stands in the text for an image of this layout."""
        return layout

    @property
    def visual_width(self) -> int:
        """E, which the connector is built for."""
        return self.embedding

    def arranged(
        self,
        rows: Tensor,
        order: Tensor | None,
        bags: Tensor | None,
        views: tuple[int, ...],
    ) -> Visual:
        """Return the visual tokens as they stand.

        Args:
            rows: [M, E] of all views, [M + 1, E] with a newline.
            order, bags: which of them stand where; see `Images`.
            views: how many visual tokens each view makes.
        """
        if order is None or not len(order):
            return Visual(rows[: sum(views)], views)
        return Visual(standing(rows, order, bags), views)

    @abstractmethod
    def fuse(
        self,
        text: Tensor,
        slots: Tensor,
        visual: Visual | None,
        bounds: Sequence[int] | None,
        cache: Cache | None,
    ) -> Fused:
        """Return what the language model is to be called with.

        Args:
            text: embeddings of all tokens [B, T, D].
            slots: bool [B, T], where image tokens are.
            visual: None where there is no image and no rank waits for one.
            bounds: where documents begin in the rows laid one after another, and B x T. None: every
                row is one document.
            cache: of earlier tokens of the rows.

        Raises:
            ValueError: image tokens and images do not agree.
        """

    def tokens_of_rows(
        self, slots: Tensor, views: Sequence[int], arranged: int | None
    ) -> list[int]:
        """Return the image tokens of each row that views are counted by; see `repeat_rows`.

        Args:
            slots: as `fuse`.
            views: how many visual tokens each view makes.
            arranged: for how many image tokens `Images.order` says what stands there; None: what
                the views make, as they make it.

        Raises:
            ValueError: image tokens and images do not agree.
        """
        counts: list[int] = slots.sum(dim=1).tolist()
        check_counts(sum(counts), len(views), sum(views) if arranged is None else arranged)
        return counts

    def work(self) -> Work:
        """Return what it adds to a step."""
        return Work()


def check_visual(slots: Tensor, visual: Visual | None) -> None:
    """Refuse a text that does not have one image token for every visual token: `check_counts`."""
    images = visual.images if visual is not None else ()
    made = len(visual.tokens) if visual is not None and images else 0
    check_counts(int(slots.sum()), len(images), made)


def check_counts(wanted: int, views: int, made: int) -> None:
    """Refuse a text that does not have one image token for every visual token.

    Raises:
        ValueError: with both numbers.
    """
    if wanted != made:
        raise ValueError(
            f"the text has {wanted} image tokens, but {views} views of images make {made} "
            "visual tokens: the processor and the model disagree, or a text was cut inside an "
            "image"
        )


def untouched(text: Tensor, visual: Visual) -> Tensor:
    """Return the same numbers with the blank image's path in their graph, gradients zero."""
    return text + visual.tokens[:0].sum().to(text.dtype)
