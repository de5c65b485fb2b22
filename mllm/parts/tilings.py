"""What a recipe can say of images: ways to cut them into tiles, of regions and of clips."""

from __future__ import annotations

from mllm.parts.option import FLAG, GRIDS, WHOLE, Option, Part, one_of

IMAGES: dict[str, Option] = {
    "regions": Option(
        one_of("decimals", "thousandths", "feature"), "how a box is written", default="decimals"
    ),
    "clip_tokens": Option(WHOLE, "the most visual tokens of a clip", otherwise="no limit"),
}
"""Options of `model.images` with any tiling, and without one."""

MOST_TILES = 64
"""Of one image: more than anyone publishes, and as many views as a small batch."""

TILINGS: dict[str, Part] = {
    "any_resolution": Part(
        "LLaVA-NeXT's: the whole image, then tiles as one map",
        "models.tiles.any_resolution:AnyResolution",
        "{tiling: any_resolution}",
        {
            **IMAGES,
            "grids": Option(GRIDS, "rows and columns to choose from", otherwise="LLaVA-NeXT"),
            "tiles": Option(
                WHOLE, "instead: all grids of up to so many", otherwise="by grids", most=MOST_TILES
            ),
        },
    ),
    "dynamic": Part(
        "InternVL's: tiles in the nearest aspect, then a thumbnail",
        "models.tiles.dynamic:DynamicTiles",
        "{tiling: dynamic, tiles: 6}",
        {
            **IMAGES,
            "tiles": Option(WHOLE, "the most tiles", default=12, most=MOST_TILES),
            "min_tiles": Option(WHOLE, "the fewest", default=1, most=MOST_TILES),
            "thumbnail": Option(FLAG, "whether the whole image comes too", True),
        },
    ),
    "none": Part("no tiles, whatever the saved model does", "", "{tiling: none}", IMAGES),
    "split": Part(
        "Idefics3's and SmolVLM's: tiles with marks, the whole last",
        "models.tiles.split:SplitTiles",
        "{tiling: split, longest_edge: 1536}",
        {
            **IMAGES,
            "longest_edge": Option(
                WHOLE, "pixels of the long edge; at most 6 tiles", otherwise="4 tiles"
            ),
            "whole_only": Option(FLAG, "scale so, but show the whole image alone", default=False),
        },
    ),
}
"""Name → what it is; the order of `mllm models`."""
