"""What a folder's preprocessor file says about images, in the terms of our geometries.

Nothing is guessed: a file that is missing, incomplete, or does not make what the encoder takes is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from transformers import Qwen2VLImageProcessorPil, Siglip2ImageProcessorPil
from transformers.utils.hub import cached_file

from mllm.models.errors import loading, read_json
from mllm.models.geometry import RESAMPLING_NAMES, ImageGeometry
from mllm.models.native import LIMITS, NativeGeometry

_NAME = "preprocessor_config.json"
_WHOLE_NAME = "processor_config.json"  # a processor of text and images, saved in one file


def read_file(path: str | Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a folder or hub id.

    Raises:
        ValueError: missing, unreadable, or not a JSON object.
    """
    if Path(path).is_dir():
        return read_json(Path(path) / name)
    with loading(name, path):
        return read_json(Path(str(cached_file(path, name))))


def read_preprocessor(path: str | Path) -> dict[str, Any]:
    """Read preprocessor_config.json, or the image part of processor_config.json where it is alone.

    Raises:
        ValueError: neither is there, or the file is damaged.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / _NAME).exists() and (folder / _WHOLE_NAME).exists():
        whole = read_json(folder / _WHOLE_NAME)
        if isinstance(found := whole.get("image_processor"), dict):
            return found
        raise ValueError(
            f"{folder / _WHOLE_NAME} describes no image_processor; add the checkpoint's {_NAME}"
        )
    if folder.is_dir() and not (folder / _NAME).exists():
        raise ValueError(
            f"{folder} has no {_NAME}, which says how images are prepared; copy it from the "
            "encoder's checkpoint"
        )
    return read_file(path, _NAME)


def square(value: Any, what: str) -> int:
    """Return the side of a size: a number, [side, side], or {"height": side, "width": side}.

    Raises:
        ValueError: a rectangle, or no size at all.
    """
    pair = value
    if isinstance(value, Mapping):
        pair = [value.get("height"), value.get("width")]
    elif not isinstance(value, (list, tuple)):
        pair = [value, value]
    if len(pair) != 2 or any(type(side) is not int or side < 1 for side in pair):
        raise ValueError(f"{what} is {value!r}, which is no square of whole pixels")
    if pair[0] != pair[1]:
        raise ValueError(f"{what} is {value!r}: only squares are supported")
    return int(pair[0])


def read_geometry(
    seen: Mapping[str, Any],
    path: str | Path,
    cells: Callable[[int], int],
    takes: int | None = None,
    resize: str | None = None,
) -> ImageGeometry:
    """Turn a preprocessor file of transformers into a geometry.

    Args:
        seen: the file.
        path: where it came from, for messages.
        cells: image side in pixels -> rows of the feature grid.
        takes: the only side that the encoder takes; None if its positions fit any.
        resize: a rule to use instead of the file's.

    Raises:
        ValueError: something is missing, makes rectangles, or contradicts the encoder.
    """
    where = f"{path}: the preprocessor file"
    for key, needed in (("do_resize", True), ("do_pad", False)):
        if bool(_given(seen, key, needed)) is not needed:
            raise ValueError(
                f"{where} has {key}: {seen[key]!r}, which does not make squares of one size; "
                f"set it to {str(needed).lower()}"
            )
    rule, side, short_edge = _shape(seen, where)
    if takes is not None and side != takes:
        raise ValueError(
            f"{path}: the preprocessor makes {side} pixels, the encoder takes {takes}; "
            "take both files from one checkpoint"
        )
    if cells(side) < 1:
        raise ValueError(f"{where} makes {side} pixels, less than one patch of the encoder")
    mean, std = normalisation(seen, where)
    return ImageGeometry(
        image_size=side,
        cells=cells(side),
        mean=mean,
        std=std,
        resize=resize or rule,
        resampling=resampling(seen, where),
        short_edge=short_edge if (resize or rule) == "crop" else 0,
    )


_NATIVE: dict[str, type[Any]] = {
    "Qwen2VLImageProcessor": Qwen2VLImageProcessorPil,
    "Siglip2ImageProcessor": Siglip2ImageProcessorPil,
}
"""Image processors of native resolution. Their files leave values out that the class has."""


def read_native(
    seen: Mapping[str, Any],
    path: str | Path,
    kind: str,
    patch: int,
    merge: int,
    limits: Mapping[str, Any],
) -> NativeGeometry:
    """Turn the file of an image processor of native resolution into a geometry.

    Args:
        seen: the file.
        path: where it came from, for messages.
        kind: the class that it must be written by, without its ending.
        patch, merge: what the encoder takes.
        limits: bounds to use instead of the file's: names of `native.LIMITS`.

    Raises:
        ValueError: another class, something is missing, or contradicts the encoder.
    """
    where = f"{path}: the preprocessor file"
    named = str(seen.get("image_processor_type"))
    if named.removesuffix("Fast").removesuffix("Pil") != kind:
        raise ValueError(
            f"{where} is one of {named}, but the encoder was trained with {kind}; take both files "
            "from one checkpoint"
        )
    try:
        whole = _NATIVE[kind](**seen).to_dict()
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if not _given(whole, "do_resize", True):
        raise ValueError(f"{where} has do_resize: false, so sides are not whole patches")
    for name, found, takes in (
        ("patch_size", whole["patch_size"], patch),
        ("merge_size", whole.get("merge_size", 1), merge),
    ):
        if found != takes:
            raise ValueError(
                f"{where} has {name} {found}, the encoder takes {takes}; take both files from one "
                "checkpoint"
            )
    mean, std = normalisation(whole, where)
    bounds, chosen = _bounds(whole, where), resampling(whole, where)
    try:
        geometry = NativeGeometry(patch, merge, mean, std, **bounds, resampling=chosen)
    except ValueError as error:
        raise ValueError(f"{where} makes no sense: {error}; copy the checkpoint's own") from error
    return geometry.within({name: limits[name] for name in LIMITS if limits.get(name) is not None})


def _bounds(whole: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The bounds of views, by the names of `native.LIMITS`."""
    if "max_num_patches" in whole:
        return {"max_patches": whole["max_num_patches"]}
    size = whole["size"]
    if not size.get("shortest_edge") or not size.get("longest_edge"):
        raise ValueError(f"{where} has size {dict(size)}, which has no shortest and longest edge")
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def _given(seen: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of the file; null means the default, as in transformers."""
    value = seen.get(key)
    return default if value is None else value


def _shape(seen: Mapping[str, Any], where: str) -> tuple[str, int, int]:
    """Return (rule, side of the square, short edge before cutting)."""
    size, crop_size = seen.get("size"), seen.get("crop_size")
    if size is None:
        raise ValueError(f"{where} gives no size; copy the checkpoint's own file")
    crops = bool(_given(seen, "do_center_crop", crop_size is not None))
    if crops and crop_size is None:
        raise ValueError(f"{where} has do_center_crop but no crop_size; add one or switch it off")
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else (size if crops else None)
    if not crops:
        if edge is not None:
            raise ValueError(
                f"{where} scales the short edge to {edge} and cuts nothing, so it makes "
                "rectangles; give crop_size, or size as height and width"
            )
        return "squash", square(size, f"{where}'s size"), 0
    side = square(crop_size, f"{where}'s crop_size")
    if edge is None:
        if square(size, f"{where}'s size") != side:
            raise ValueError(
                f"{where} squashes to {size} and then cuts {crop_size}; make the two equal"
            )
        return "squash", side, 0
    if square(edge, f"{where}'s short edge") < side:
        raise ValueError(f"{where} scales the short edge to {edge} and cannot cut {side} of it")
    return "crop", side, edge


def resampling(seen: Mapping[str, Any], where: str) -> str:
    """Return the name of the filter that a preprocessor file gives by Pillow's number.

    Raises:
        ValueError: none, or no such number.
    """
    resample: Any = seen.get("resample")
    known = isinstance(resample, int) and not isinstance(resample, bool)
    if not known or not 0 <= resample < len(RESAMPLING_NAMES):
        names = ", ".join(f"{number} {name}" for number, name in enumerate(RESAMPLING_NAMES))
        raise ValueError(f"{where} has resample: {resample!r}; give a filter: {names}")
    return RESAMPLING_NAMES[resample]


Colour = tuple[float, float, float]


def normalisation(seen: Mapping[str, Any], where: str) -> tuple[Colour, Colour]:
    """Mean and deviation of pixels in [0, 1]; another rescale factor is folded into them."""
    scale = 255.0 * (
        float(_given(seen, "rescale_factor", 1 / 255)) if _given(seen, "do_rescale", True) else 1.0
    )
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if _given(seen, "do_normalize", True):
        mean, std = _colour(seen, "image_mean", where), _colour(seen, "image_std", where)
    if scale <= 0 or min(std) <= 0:
        raise ValueError(f"{where} divides by zero: check image_std and rescale_factor")
    if isclose(scale, 1.0, rel_tol=1e-6):
        return mean, std
    return _divided(mean, scale), _divided(std, scale)


def _divided(colour: Colour, by: float) -> Colour:
    red, green, blue = colour
    return red / by, green / by, blue / by


def _colour(seen: Mapping[str, Any], key: str, where: str) -> Colour:
    value = seen.get(key)
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 3
        or not all(isinstance(one, (int, float)) for one in value)
    ):
        raise ValueError(f"{where} has {key}: {value!r}; three numbers are needed")
    red, green, blue = value
    return float(red), float(green), float(blue)
