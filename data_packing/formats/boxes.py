"""Boxes that a record gives for marks in its texts, in the layout of ms-swift.

`<bbox>` in a text stands for the next box of `objects.bbox`, `<ref-object>` for the next name of
`objects.ref`. A box is left, top, right, bottom, in pixels of its image (`bbox_type: real`, the
default) or as fractions of it (`norm1`). `objects.image_id` says which image each box is of,
counted from 0; here that must be the last one before the mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from data_packing.document import Box, DocumentError, Image, Part, Text
from data_packing.formats.common import shown

_MARKS = re.compile(r"<(bbox|ref-object)>")


class Boxes:
    """The boxes of one record, dealt to the marks of its texts in order.

    Args:
        record: the row; without `objects` its texts stay as they are.

    Raises:
        DocumentError: `objects` is not of the layout.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        objects = record.get("objects")
        if isinstance(objects, str):
            objects = _from_json(objects)
        self.given = bool(objects)
        objects = objects or {}
        if not isinstance(objects, dict):
            raise DocumentError(f'"objects" must be an object, not {shown(repr(objects))}')
        self.boxes, self.names = _list(objects, "bbox"), _list(objects, "ref")
        self.owners = _list(objects, "image_id")
        self.kind = objects.get("bbox_type") or "real"
        if self.kind not in ("real", "norm1"):
            raise DocumentError(
                f'"objects": bbox_type {shown(repr(self.kind))}; known: real, norm1'
            )
        if self.owners and len(self.owners) != len(self.boxes):
            raise DocumentError('"objects": image_id must have a number for every bbox')
        self._used = self._named = 0

    def place(self, parts: Iterator[Part]) -> Iterator[Part]:
        """Put boxes and names into the texts of a document's parts.

        Raises:
            DocumentError: marks and boxes differ in number, or a box is none of its image.
        """
        image, number = None, -1
        for part in parts:
            if isinstance(part, Image):
                image, number = part, number + 1
                yield part
            elif self.given:
                yield from self._marked(part, image, number)
            else:
                yield part
        for what, used, there in (
            ("bbox", self._used, self.boxes),
            ("ref-object", self._named, self.names),
        ):
            if used != len(there):
                raise DocumentError(f'{used} <{what}> in the text but {len(there)} in "objects"')

    def _marked(self, text: Text, image: Image | None, number: int) -> Iterator[Text]:
        words = ""
        for place, piece in enumerate(_MARKS.split(text.text)):
            if place % 2 == 0:
                words += piece
            elif piece == "ref-object":
                words += self._name()
            else:
                if words:
                    yield Text(words, text.role, text.learned)
                yield Text("", text.role, text.learned, box=self._box(image, number))
                words = ""
        if words or not text.text:
            yield Text(words, text.role, text.learned)

    def _name(self) -> str:
        self._named += 1
        if self._named > len(self.names):
            raise DocumentError(f"more <ref-object> in the text than the {len(self.names)} names")
        return str(self.names[self._named - 1])

    def _box(self, image: Image | None, number: int) -> Box:
        self._used += 1
        if self._used > len(self.boxes):
            raise DocumentError(f"more <bbox> in the text than the {len(self.boxes)} boxes")
        place, value = f"box {self._used}", self.boxes[self._used - 1]
        if image is None:
            raise DocumentError(f"{place} stands before the first image")
        owner = self.owners[self._used - 1] if self.owners else number
        if owner != number:
            raise DocumentError(
                f"{place} is of image {owner}, but image {number} is the last before it"
            )
        if not isinstance(value, list | tuple) or len(value) != 4 or not all(map(_number, value)):
            raise DocumentError(f"{place} must be four numbers, not {shown(repr(value))}")
        left, top, right, bottom = map(float, value)
        if self.kind == "real":
            left, right = left / image.width, right / image.width
            top, bottom = top / image.height, bottom / image.height
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise DocumentError(
                f"{place}, {shown(repr(value))}, is no left, top, right, bottom inside its image "
                f"of {image.width}x{image.height}"
            )
        return left, top, right, bottom


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(objects: dict[str, Any], name: str) -> list[Any]:
    value = objects.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DocumentError(f'"objects": {name} must be a list, not {shown(repr(value))}')
    return value


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DocumentError(f'"objects" is no JSON: {error}') from error
