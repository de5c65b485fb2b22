"""The processors of an exported folder, and how an image becomes views and tokens there.

See `standalone`, with which this becomes one file. V views of all images, S side of a view.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.request import urlopen

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import (
    BaseImageProcessor,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from data_packing.images import FORMATS, to_rgb
from mllm.models.connectors import CONNECTORS
from mllm.models.geometry import Geometry, ImageGeometry, Layout
from mllm.models.tiles import tiled


def image_geometry(square: dict[str, Any], images: dict[str, Any]) -> Geometry:
    """Return how an image becomes views: `square` and `images` as the configuration has them."""
    # tiles
    if images:
        return tiled(ImageGeometry.from_dict(square), images)
    # end
    return ImageGeometry.from_dict(square)


def image_layout(geometry: Geometry, connector: dict[str, Any], height: int, width: int) -> Layout:
    """Return the views and the visual tokens of an image of this size in pixels."""
    output_grid = partial(CONNECTORS[connector["name"]].output_grid, connector)
    return geometry.layout(height, width, output_grid)


def image_layouts(
    geometry: Geometry, connector: dict[str, Any], original_sizes: Sequence[Sequence[int]]
) -> list[Layout]:
    """Return the layout of every image, of a row (height, width) of its pixels for each view."""
    layouts: list[Layout] = []
    view = 0
    while view < len(original_sizes):
        height, width = original_sizes[view]
        layouts.append(image_layout(geometry, connector, int(height), int(width)))
        view += len(layouts[-1].sizes)
    if view != len(original_sizes):
        raise ValueError(f"original_sizes has {len(original_sizes)} rows, not whole images")
    return layouts


def open_image(source: str) -> Image.Image:
    """Open a path, a URL or base64 (`data:image/png;base64,...`)."""
    if source.startswith(("http://", "https://")):
        with urlopen(source) as answer:
            data = answer.read()
    elif source.startswith("data:"):
        data = base64.b64decode(source.partition(",")[2])
    else:
        data = Path(source).read_bytes()
    return Image.open(io.BytesIO(data), formats=FORMATS)


def pixels_of(image: Any) -> NDArray[np.uint8]:
    """Return a Pillow image, array or tensor as uint8 [H, W, 3], upright, on white."""
    if not isinstance(image, Image.Image):
        image = to_pil_image(image)
    return np.array(to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)


class MllmImageProcessor(BaseImageProcessor):
    """Images to normalised views, exactly as the model was trained; needs Pillow, no torchvision.

    Args:
        geometry: what the encoder wants to see, see `ImageGeometry`.
        images: how images are cut into tiles; empty for not at all.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "original_sizes"]  # type: ignore[misc]

    def __init__(
        self,
        geometry: dict[str, Any] | None = None,
        images: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.geometry, self.images = dict(geometry or {}), dict(images or {})

    @property
    def size(self) -> dict[str, int]:
        """Height and width of an image that becomes as many views as any; vLLM asks for it."""
        side = self.geometry["image_size"]
        # tiles
        rule = image_geometry(self.geometry, self.images)
        sides = [side * count for count in range(1, 1 + max(12, self.images.get("tiles") or 0))]
        sizes = [(height, width) for height in sides for width in sides]
        height, width = max(sizes, key=lambda size: len(rule.view_sizes(*size)))
        return {"height": height, "width": width}
        # end
        return {"height": side, "width": side}

    def fetch_images(self, images: Any) -> Any:
        """Open paths, URLs and base64, in lists too; leave what is an image already."""
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        return open_image(images) if isinstance(images, str) else images

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Return the views of images (Pillow, arrays, tensors, paths or URLs).

        Other arguments that transformers passes are not used: how an image is prepared is part of
        the model.

        Returns:
            pixel_values [V, 3, S, S], the views of all images in order, and original_sizes [V, 2],
            (height, width) of the image that each view was made of.
        """
        rule = image_geometry(self.geometry, self.images)
        views, sizes = [], []
        for image in make_flat_list_of_images(self.fetch_images(images)):  # type: ignore[union-attr]
            pixels = pixels_of(image)
            made = rule.views(pixels)
            views += made
            sizes += [pixels.shape[:2]] * len(made)
        batch = torch.from_numpy(np.stack(views)).float() / 255
        batch = (batch - torch.tensor(rule.mean)) / torch.tensor(rule.std)
        data = {
            "pixel_values": batch.permute(0, 3, 1, 2).contiguous(),
            "original_sizes": torch.tensor(sizes),
        }
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))


class MllmProcessor(ProcessorMixin):
    """Texts and images to what the model takes.

    A text has the image token once for every image. A text with any other special token was
    written by the chat template and is tokenised as it is; before any other comes what the
    tokenizer begins a text with. `add_special_tokens` decides otherwise.

    Args:
        image_processor, tokenizer, chat_template: as in transformers.
        connector: the connector's `name` and options, which say how many tokens an image takes.
        image_token: the placeholder.
        image_text: what is tokenised for an image; holds the image token once.
    """

    def __init__(
        self,
        image_processor: MllmImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: Any = None,
        connector: dict[str, Any] | None = None,
        image_token: str = "<image>",
        image_text: str = "<image>",
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.connector = dict(connector or {})
        self.image_token, self.image_text = image_token, image_text
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(image_token)
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self._template_tokens = special.union(self.tokenizer.all_special_tokens) - {image_token}

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Return input_ids, attention_mask, and of images what the image processor returns."""
        chosen = "add_special_tokens" in {**kwargs, **(kwargs.get("text_kwargs") or {})}
        if text is not None and not chosen:
            texts = [text] if isinstance(text, str) else text
            templated = any(token in one for one in texts for token in self._template_tokens)
            kwargs["add_special_tokens"] = not templated
        return super().__call__(images=images, text=text, **kwargs)  # type: ignore[no-any-return]

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a template writes all special tokens that there are to be."""
        given = kwargs.pop("processor_kwargs", None) or {}
        return super().apply_chat_template(  # type: ignore[misc]
            *args, processor_kwargs={"add_special_tokens": False, **given}, **kwargs
        )

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for an image: its image tokens, and marks between them."""
        sizes = image_inputs["original_sizes"].tolist()
        layouts = image_layouts(self._geometry, self.connector, sizes)
        return self._written(layouts[image_idx])

    def _written(self, layout: Layout) -> str:
        pieces = [
            self.image_token * piece if isinstance(piece, int) else piece
            for piece in layout.writing
        ]
        return self.image_text.replace(self.image_token, "".join(pieces))

    @property
    def _geometry(self) -> Geometry:
        return image_geometry(self.image_processor.geometry, self.image_processor.images)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return the tokens and views of images of these (height, width); vLLM asks for it."""
        if image_sizes is None:
            return MultiModalData()
        layouts = [
            image_layout(self._geometry, self.connector, int(height), int(width))
            for height, width in image_sizes
        ]
        texts = [self._written(layout) for layout in layouts]
        return MultiModalData(
            num_image_tokens=[len(self.tokenizer.tokenize(text)) for text in texts],
            num_image_patches=[len(layout.sizes) for layout in layouts],
        )
