"""Image preprocessing as transformers' image processors are told it, without torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.models.geometry import RESAMPLING_NAMES, ImageGeometry


def tiling(images: Mapping[str, Any], name: str) -> str:
    """Return how an `images:` section cuts images, "none" for not at all.

    Args:
        images: the section.
        name: the class that is written, for messages.

    Raises:
        ValueError: it asks for more than a class of transformers can do.
    """
    if images.get("regions") == "feature":
        raise ValueError(
            f"{name}: it has no features of regions in the text (images.regions: feature)"
        )
    return str(images.get("tiling", "none"))


def image_processor(geometry: ImageGeometry, name: str) -> dict[str, Any]:
    """Return the options of an image processor that makes the same pixels.

    Args:
        geometry: how an image becomes a square.
        name: the class that is written, for messages.

    Raises:
        ValueError: a rule that transformers' image processors do not have.
    """
    if geometry.resize == "pad":
        raise ValueError(
            f"{name}: images are padded to squares here, which its image processor does not do in "
            "the same way; train with resize: squash or crop"
        )
    side, crops = geometry.image_size, geometry.resize == "crop"
    square = {"height": side, "width": side}
    return {
        "do_resize": True,
        "size": {"shortest_edge": geometry.short_edge or side} if crops else square,
        "do_center_crop": crops,
        "crop_size": square,
        "resample": RESAMPLING_NAMES.index(geometry.resampling),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(geometry.mean),
        "image_std": list(geometry.std),
        "do_convert_rgb": True,
    }
