"""The image half of a `Processor`, for those who ask transformers for it alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import BaseImageProcessor, BatchFeature

from data_packing.images import decode
from data_packing.pack import join_views
from mllm.models.geometry import Geometry
from mllm.models.messages import all_images


class MultimodalImageProcessor(BaseImageProcessor):
    """Images to the views that the encoder sees.

    Args:
        geometry: how an image becomes views.
    """

    model_input_names: ClassVar[list[str]] = ["pixels", "sizes"]  # type: ignore[misc]

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def fetch_images(self, images: Any) -> Any:
        """Return images as they are: they are opened where they are used."""
        return images

    def preprocess(  # type: ignore[override]
        self, images: Any, return_tensors: Any = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Return the views of images; see `messages.image_of` for what an image may be.

        Args:
            images: one, several, or lists of them.
            return_tensors: "pt".
            kwargs: refused: how an image is prepared is part of the model.

        Returns:
            pixels uint8 [P], all views one after another, and sizes int32 [V, 2] of each.

        Raises:
            ValueError: an image that cannot be read, or an argument.
        """
        check_images_kwargs(kwargs)
        if return_tensors not in (None, "pt"):
            raise ValueError(f"images become tensors of torch ('pt'), not {return_tensors!r}")
        opened = all_images(images)
        if not opened:
            raise ValueError("no image is given")
        views = [view for image in opened for view in self.geometry.views(decode(image.data))]
        pixels, sizes = join_views(views)
        return BatchFeature({"pixels": pixels, "sizes": sizes})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        name = type(self).__name__
        return {"image_processor_type": name, "geometry": self.geometry.to_dict()}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a folder has one processor, with its tokenizer and the rule for images' tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an image processor is saved with its processor: processor.save_pretrained"
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> Self:
        """Load the image processor of a stage's folder; arguments as `Processor.from_pretrained`.

        Raises:
            ValueError: as `Processor.from_pretrained`.
        """
        from mllm.models.processor import Processor

        found: Any = Processor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        assert isinstance(found.image_processor, cls)
        return found.image_processor


def check_images_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments about images.

    Raises:
        ValueError: there is one.
    """
    if kwargs:
        raise ValueError(
            f"the processor takes no argument {min(kwargs)!r}; how an image is prepared is part of "
            "the model"
        )
