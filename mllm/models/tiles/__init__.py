"""Images cut into tiles: more pixels for an encoder that takes squares of one size.

Each rule is somebody's published one, followed to the pixel, so that what was trained with it goes
on with it, and what is trained here can be exported. Reading order: base.py (what every one is),
then dynamic.py, any_resolution.py and split.py.
"""

from __future__ import annotations

from typing import Any

from mllm import parts
from mllm.models.errors import check_options, choose
from mllm.models.geometry import Geometry, ImageGeometry
from mllm.models.regions import REGION_TOKEN
from mllm.models.tiles.any_resolution import AnyResolution
from mllm.models.tiles.base import Spec, TiledGeometry
from mllm.models.tiles.dynamic import DynamicTiles
from mllm.models.tiles.split import SplitTiles
from mllm.parts.option import problems

ALWAYS = ("tiling", *parts.IMAGES)
"""Options of an `images:` section whatever the tiling."""

TILINGS: dict[str, type[TiledGeometry]] = {
    "any_resolution": AnyResolution,
    "dynamic": DynamicTiles,
    "split": SplitTiles,
}


def check_images(spec: Spec) -> None:
    """Refuse an `images:` section that makes no sense.

    Raises:
        ValueError: an unknown tiling or option, or a bad value.
    """
    if (name := spec.get("tiling")) is not None:
        choose(TILINGS, str(name), "tiling").check(spec)
    else:
        check_options(spec, ALWAYS, "images (give images.tiling for others)")
        for _, problem in problems(parts.IMAGES, spec):
            raise ValueError(f"images: {problem}")


def special_tokens(spec: Spec) -> tuple[str, ...]:
    """Return the tokens that an `images:` section needs: of its marks, and of regions."""
    kind = TILINGS.get(str(spec.get("tiling")))
    marks = kind.special_tokens(spec) if kind else ()
    return (*marks, REGION_TOKEN) if spec.get("regions") == "feature" else marks


def changed_images(spec: Spec, changes: Spec) -> dict[str, Any]:
    """Return a saved `images:` section with options changed.

    Args:
        spec: the saved section.
        changes: options; another `tiling` drops those of the saved one, `none` cuts nothing.
    """
    tiling = changes.get("tiling", spec.get("tiling"))
    kept = spec if tiling == spec.get("tiling") else {k: spec[k] for k in ALWAYS if k in spec}
    result = {**kept, **changes}
    if tiling in (None, "none"):
        result.pop("tiling", None)
    return result


def tiled(geometry: Geometry, spec: Spec) -> Geometry:
    """Return how images become views: as the encoder's geometry says, or cut into tiles of it.

    Args:
        geometry: the encoder's.
        spec: the `images:` section: `tiling` and its options, if images are cut.

    Raises:
        ValueError: as `check_images`, or an encoder that takes images as they are.
    """
    check_images(spec)
    if spec.get("tiling") is None:
        return geometry
    if not isinstance(geometry, ImageGeometry):
        raise ValueError(
            f"tiling {spec['tiling']}: this encoder takes images of any size as they are, so there "
            "is nothing to cut; leave images out"
        )
    return TILINGS[spec["tiling"]](geometry, spec)


__all__ = ["ALWAYS", "TILINGS", "AnyResolution", "DynamicTiles", "SplitTiles", "TiledGeometry"]
__all__ += ["changed_images", "check_images", "special_tokens", "tiled"]
