"""Images cut into tiles: more pixels for an encoder that takes squares of one size.

Each rule is somebody's published one, followed to the pixel, so that what was trained with it goes
on with it, and what is trained here can be exported:

- `dynamic`: InternVL 1.5 (Chen et al. 2024, arXiv 2404.16821, section 3.1);
- `any_resolution`: LLaVA-NeXT (Liu et al. 2024, llava-vl.github.io/blog/2024-01-30-llava-next);
- `split`: Idefics3 and SmolVLM (Laurençon et al. 2024, arXiv 2408.12637, section 3.2).

Legend: S is the side of the encoder's square, M the visual tokens of a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm import parts
from mllm.models.errors import check_options, choose
from mllm.models.geometry import Geometry, ImageGeometry, Layout, OutputGrid, Size, Span
from mllm.models.regions import REGION_TOKEN
from mllm.parts.option import Option, chosen, problems

Spec = Mapping[str, Any]
ALWAYS = ("tiling", *parts.IMAGES)
"""Options of an `images:` section whatever the tiling."""

WHOLE: Span = (0.0, 0.0, 1.0, 1.0)


class TiledGeometry(Geometry):
    """An image as several squares.

    Args:
        square: what the encoder wants to see.
        spec: the options by name.

    Attributes:
        OPTIONS: what a recipe may set beside `tiling`; declared in mllm/parts/tilings.py.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}

    def __init__(self, square: ImageGeometry, spec: Spec) -> None:
        self.square, self.spec = square, dict(spec)
        self.side = square.image_size
        self.mean, self.std = square.mean, square.std

    @classmethod
    def check(cls, spec: Spec) -> None:
        """Refuse options that make no sense.

        Raises:
            ValueError: an unknown option or a bad value.
        """
        options = {name: value for name, value in spec.items() if name != "tiling"}
        check_options(options, cls.OPTIONS, f"the tiling {spec['tiling']}")
        for _, problem in problems(cls.OPTIONS, options):
            raise ValueError(f"tiling {spec['tiling']}: {problem}")

    def _option(self, name: str) -> Any:
        return chosen(self.OPTIONS, self.spec, name)

    @classmethod
    def special_tokens(cls, spec: Spec) -> tuple[str, ...]:
        """Return the tokens that marks are made of, which a tokenizer must have."""
        return ()

    @property
    def smallest(self) -> Size:
        """The encoder's square."""
        return self.square.smallest

    def view_sizes(self, height: int, width: int) -> tuple[Size, ...]:
        """Return as many squares as the image makes."""
        return (self.smallest,) * self.count(height, width)

    def count(self, height: int, width: int) -> int:
        """Return how many views an image of this size makes."""
        raise NotImplementedError

    def grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the features of a square."""
        return self.square.grid(height, width)

    def spans(self, height: int, width: int) -> list[Span]:
        """Return what each tile shows, and the whole image for a view beside them."""
        rows, columns = self.tile_grid(height, width)
        tiles = [
            (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)
            for r in range(rows)
            for c in range(columns)
        ]
        return tiles + [WHOLE] * (self.count(height, width) - len(tiles))

    def tile_grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the tiles of an image of this size."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return what the encoder's geometry is; the tiling is stored beside it."""
        return self.square.to_dict()

    def _scaled(self, image: Image.Image, rows: int, columns: int) -> Image.Image:
        """Scale to so many squares, whatever the aspect."""
        return self.square.scaled(image, columns * self.side, rows * self.side)

    def _cut(self, canvas: Image.Image) -> list[NDArray[np.uint8]]:
        """Cut a canvas of whole squares, row by row."""
        side, array = self.side, np.array(canvas, dtype=np.uint8)
        rows, columns = array.shape[0] // side, array.shape[1] // side
        return [
            np.ascontiguousarray(array[r * side : (r + 1) * side, c * side : (c + 1) * side])
            for r in range(rows)
            for c in range(columns)
        ]


class DynamicTiles(TiledGeometry):
    """The grid whose aspect is nearest to the image's, and a thumbnail after its tiles.

    Of grids of one aspect the larger is taken while the image has more than half its pixels. An
    image of one tile has no thumbnail.
    """

    OPTIONS = parts.TILINGS["dynamic"].options

    @classmethod
    def check(cls, spec: Spec) -> None:
        """Refuse more tiles at least than at most."""
        super().check(spec)
        if chosen(cls.OPTIONS, spec, "min_tiles") > chosen(cls.OPTIONS, spec, "tiles"):
            raise ValueError(
                f"tiling dynamic: min_tiles {chosen(cls.OPTIONS, spec, 'min_tiles')} is more than "
                f"tiles {chosen(cls.OPTIONS, spec, 'tiles')}"
            )

    def tile_grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the tiles of an image of this size."""
        most, fewest = self._option("tiles"), self._option("min_tiles")
        grids = [
            (rows, columns)
            for columns in range(1, most + 1)
            for rows in range(1, most + 1)
            if fewest <= rows * columns <= most
        ]
        best, least = (1, 1), float("inf")
        for rows, columns in sorted(grids, key=prod):
            off = abs(width / height - columns / rows)
            large = height * width > 0.5 * self.side**2 * rows * columns
            if off < least or (off == least and large):
                best, least = (rows, columns), off
        return best

    def count(self, height: int, width: int) -> int:
        """Return the tiles and, if there are several, the thumbnail."""
        tiles = prod(self.tile_grid(height, width))
        return tiles + (tiles > 1 and self._option("thumbnail"))

    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Cut the image, scaled to its grid; the thumbnail comes last."""
        image = Image.fromarray(pixels)
        tiles = self._cut(self._scaled(image, *self.tile_grid(*pixels.shape[:2])))
        if len(tiles) > 1 and self._option("thumbnail"):
            tiles.append(np.array(self._scaled(image, 1, 1)))
        return tiles


class AnyResolution(TiledGeometry):
    """The grid that keeps most of the image's pixels, and the whole image before its tiles.

    The image is scaled into the grid without changing its aspect, and padded with black. Visual
    tokens of the tiles are put together to one map, rows and columns that show nothing but padding
    are left out, and a newline, a learned row, ends every row of the map. So the connector must
    keep the views' grids.

    Without `grids` and `tiles` the grids are LLaVA-NeXT's. With `tiles` they are all of up to so
    many, as in LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326, section 3.2) but without its
    interpolation of larger ones.
    """

    OPTIONS = parts.TILINGS["any_resolution"].options
    NEWLINE = True

    def __init__(self, square: ImageGeometry, spec: Spec) -> None:
        super().__init__(square, spec)
        given = spec.get("grids") or ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        if most := spec.get("tiles"):
            sides = range(1, most + 1)
            given = [(rows, columns) for rows in sides for columns in sides]
            given = [grid for grid in given if prod(grid) <= most]
        self.grids: tuple[Size, ...] = tuple((rows, columns) for rows, columns in given)

    @classmethod
    def check(cls, spec: Spec) -> None:
        """Refuse two ways to choose grids at once, and grids of too many tiles."""
        super().check(spec)
        if spec.get("grids") is not None and spec.get("tiles") is not None:
            raise ValueError("tiling any_resolution: give grids or tiles, not both")
        most = max(map(prod, spec.get("grids") or ((1, 1),)))
        if most > parts.MOST_TILES:
            raise ValueError(
                f"tiling any_resolution: a grid of {most} tiles is too large; at most "
                f"{parts.MOST_TILES} are possible"
            )

    def tile_grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the tiles of an image of this size."""
        best, most, least_waste = self.grids[0], -1, 0
        for rows, columns in self.grids:
            high, wide = rows * self.side, columns * self.side
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), height * width)
            waste = high * wide - kept
            if kept > most or (kept == most and waste < least_waste):
                best, most, least_waste = (rows, columns), kept, waste
        return best

    def count(self, height: int, width: int) -> int:
        """Return the tiles and the whole image."""
        return 1 + prod(self.tile_grid(height, width))

    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Put the whole image first, then the tiles of the padded one."""
        image = Image.fromarray(pixels)
        rows, columns = self.tile_grid(image.height, image.width)
        high, wide = rows * self.side, columns * self.side
        across, down = wide / image.width, high / image.height
        size = (wide, min(ceil(image.height * across), high))
        if across >= down:
            size = (min(ceil(image.width * down), wide), high)
        canvas = Image.new("RGB", (wide, high))
        place = ((wide - size[0]) // 2, (high - size[1]) // 2)
        canvas.paste(self.square.scaled(image, *size), place)
        return [np.array(self._scaled(image, 1, 1)), *self._cut(canvas)]

    def spans(self, height: int, width: int) -> list[Span]:
        """Return the whole image, then what the tiles show of the padded one."""
        rows, columns = self.tile_grid(height, width)
        scale = min(columns * self.side / width, rows * self.side / height)
        across, down = columns * self.side / width / scale, rows * self.side / height / scale
        left, top = (1 - across) / 2, (1 - down) / 2
        tiles = [
            (
                left + across * c / columns,
                top + down * r / rows,
                left + across * (c + 1) / columns,
                top + down * (r + 1) / rows,
            )
            for r in range(rows)
            for c in range(columns)
        ]
        return [WHOLE, *tiles]

    def layout(self, height: int, width: int, output_grid: OutputGrid) -> Layout:
        """Return the whole image's tokens, then the map of the tiles, row by row with newlines."""
        cells = self.square.grid(self.side, self.side)
        rows, columns = output_grid(cells)
        if rows == 1 and columns > 1:
            raise ValueError(
                "tiling any_resolution puts the visual tokens of tiles together to one map, but "
                f"this connector makes a row of {columns} tokens without places; use tiling dynamic"
            )
        down, across = self.tile_grid(height, width)
        whole = rows * columns
        places = whole + np.arange(down * across * whole, dtype=np.int64)
        tiles = places.reshape(down, across, rows, columns).transpose(0, 2, 1, 3)
        shown = _without_padding(tiles.reshape(down * rows, across * columns), height, width)
        lines = np.concatenate([shown, np.full((len(shown), 1), -1)], axis=1)
        order = np.concatenate([np.arange(whole), lines.reshape(-1)]).astype(np.int64)
        sizes = self.view_sizes(height, width)
        return Layout(
            sizes,
            patches=len(sizes) * prod(cells),
            grid=(1, len(order)),
            writing=(len(order),),
            made=whole * len(sizes),
            order=order,
        )


class SplitTiles(TiledGeometry):
    """The image at its aspect on whole tiles, each named by a mark, and the whole image last.

    The long edge is scaled to `longest_edge` (4 S unless given), then both edges to whole tiles. In
    the text a tile is `<fake_token_around_image><row_1_col_2>` and its tokens, a line of tiles ends
    with a newline, and the whole image is `<global-img>`.
    """

    OPTIONS = parts.TILINGS["split"].options
    MOST: ClassVar[int] = 6
    AROUND: ClassVar[str] = "<fake_token_around_image>"
    WHOLE: ClassVar[str] = "<global-img>"

    def __init__(self, square: ImageGeometry, spec: Spec) -> None:
        super().__init__(square, spec)
        self.longest_edge = int(spec.get("longest_edge") or 4 * self.side)
        if not self.side <= self.longest_edge <= self.MOST * self.side:
            raise ValueError(
                f"tiling split: longest_edge {self.longest_edge} is not between one tile of "
                f"{self.side} pixels and {self.MOST} of them, {self.MOST * self.side}; there are "
                "no marks for more"
            )

    @classmethod
    def special_tokens(cls, spec: Spec) -> tuple[str, ...]:
        """Return the marks around an image, of the whole, and of every tile."""
        sides = range(1, cls.MOST + 1)
        tiles = [f"<row_{row}_col_{column}>" for row in sides for column in sides]
        return (cls.AROUND, cls.WHOLE, *tiles)

    def tile_grid(self, height: int, width: int) -> Size:
        """Return (rows, columns) of the tiles, (0, 0) for an image that is one view."""
        if self.spec.get("whole_only"):
            return (0, 0)
        high, wide = self._on_tiles(*self._long_edge_scaled(height, width))
        if high <= self.side and wide <= self.side:
            return (0, 0)
        return high // self.side, wide // self.side

    def count(self, height: int, width: int) -> int:
        """Return the tiles and the whole image."""
        return 1 + prod(self.tile_grid(height, width))

    def views(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Scale twice, as the rule does, then cut; the whole image comes last."""
        image = Image.fromarray(pixels)
        high, wide = self._long_edge_scaled(image.height, image.width)
        image = self.square.scaled(image, wide, high)
        if self.spec.get("whole_only"):
            return [np.array(self._scaled(image, 1, 1))]
        high, wide = self._on_tiles(high, wide)
        image = self.square.scaled(image, wide, high)
        if high <= self.side and wide <= self.side:
            return [np.array(image)]
        return [*self._cut(image), np.array(self._scaled(image, 1, 1))]

    def layout(self, height: int, width: int, output_grid: OutputGrid) -> Layout:
        """Return the tokens of tiles and whole image between their marks."""
        cells = self.square.grid(self.side, self.side)
        grid = output_grid(cells)
        rows, columns = self.tile_grid(height, width)
        each, ending = prod(grid), ""
        writing: list[int | str] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                writing += [f"{ending}{self.AROUND}<row_{row}_col_{column}>", each]
                ending = ""
            ending = "\n"
        writing += [f"{ending}{ending}{self.AROUND}{self.WHOLE}", each, self.AROUND]
        sizes = self.view_sizes(height, width)
        made = len(sizes) * each
        return Layout(
            sizes,
            patches=len(sizes) * prod(cells),
            grid=grid if len(sizes) == 1 else (1, made),
            writing=tuple(writing),
            made=made,
        )

    def _long_edge_scaled(self, height: int, width: int) -> Size:
        """Scale the long edge to `longest_edge`, the other to an even number."""
        aspect, long = width / height, self.longest_edge
        if width >= height:
            short = int(long / aspect)
            return short + short % 2 or 1, long
        short = int(long * aspect)
        return long, short + short % 2 or 1

    def _on_tiles(self, height: int, width: int) -> Size:
        """Scale up to whole tiles: the long edge, then what the aspect makes of the other."""
        side, aspect = self.side, width / height
        if width >= height:
            wide = ceil(width / side) * side
            return ceil(max(1, int(wide / aspect)) / side) * side, wide
        high = ceil(height / side) * side
        return high, ceil(max(1, int(high * aspect)) / side) * side


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


def _without_padding(cells: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """Leave out rows or columns of a map that show padding around an image of this size.

    Rounding to seven digits before cutting off is the published code's.
    """
    rows, columns = cells.shape
    if width / height > columns / rows:
        pad = (rows - int(round(height * (columns / width), 7))) // 2
        return cells[pad : rows - pad]
    pad = (columns - int(round(width * (rows / height), 7))) // 2
    return cells[:, pad : columns - pad]
