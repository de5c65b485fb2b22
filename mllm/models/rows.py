"""How rows of ids become one tensor: padding and truncation, under the names of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm.models.expansion import Expanded

_NESTED = ("text_kwargs", "images_kwargs", "common_kwargs")
_ENDLESS = 10**15  # a tokenizer's `model_max_length` where it has none
_PADDING: dict[bool | str, str] = {
    True: "longest",
    "longest": "longest",
    False: "no",
    "do_not_pad": "no",
    "max_length": "max_length",
}
_TRUNCATION: dict[bool | str | None, bool] = {
    True: True,
    "longest_first": True,
    "only_first": True,
    None: False,
    False: False,
    "do_not_truncate": False,
}


@dataclass(frozen=True, slots=True)
class Rows:
    """What a caller wants of rows.

    Attributes:
        padding: True or "longest", "max_length", or False: rows must be of one length then.
        truncation: whether rows are cut to `max_length`, or to what the tokenizer says.
        max_length: tokens, those of images included.
        padding_side: "left" or "right"; None: the tokenizer's.
        pad_to_multiple_of: what the length is a multiple of.
        return_attention_mask: whether it is returned.

    Raises:
        ValueError: a value that is none of these, or a `max_length` that nothing asks for.
    """

    padding: bool | str = True
    truncation: bool | str | None = None
    max_length: int | None = None
    padding_side: str | None = None
    pad_to_multiple_of: int | None = None
    return_attention_mask: bool = True

    def __post_init__(self) -> None:
        _check("padding", self.padding, [*_PADDING])
        _check("truncation", self.truncation, [*_TRUNCATION])
        if self.padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r} is neither 'left' nor 'right'")
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} is no number of tokens")
        if self.max_length and not (self.truncates or self.padding == "max_length"):
            raise ValueError(
                "max_length says nothing without truncation=True or padding='max_length'"
            )

    @property
    def truncates(self) -> bool:
        """Whether rows are cut."""
        return _TRUNCATION[self.truncation]

    def batch(
        self, rows: Sequence[Expanded], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """Return input_ids [B, T] and attention_mask [B, T] of rows.

        Raises:
            ValueError: an image would be cut, or rows of different lengths are not to be padded.
        """
        limit = self.max_length
        if limit is None and tokenizer.model_max_length < _ENDLESS:
            limit = tokenizer.model_max_length
        if self.truncates and limit is not None:
            rows = [_cut(row, limit) for row in rows]
        length = self._length([len(row.ids) for row in rows], limit)
        left = (self.padding_side or tokenizer.padding_side) == "left"
        pad = tokenizer.pad_token_id
        pad = tokenizer.eos_token_id if pad is None else pad
        ids = np.full((len(rows), length), pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, target, seen in zip(rows, ids, mask, strict=True):
            place = slice(length - len(row.ids), None) if left else slice(len(row.ids))
            target[place], seen[place] = row.ids, 1
        result = {"input_ids": torch.from_numpy(ids)}
        if self.return_attention_mask:
            result["attention_mask"] = torch.from_numpy(mask)
        return result

    def _length(self, lengths: list[int], limit: int | None) -> int:
        """T, of rows of these lengths."""
        way, longest = _PADDING[self.padding], max(lengths)
        if way == "no":
            if min(lengths) != longest:
                raise ValueError(
                    "rows of different lengths make no tensor: leave padding=False out"
                )
            return longest
        if way == "max_length":
            if limit is None:
                raise ValueError("padding='max_length' needs max_length: the tokenizer has none")
            longest = max(longest, limit)
        return longest + -longest % (self.pad_to_multiple_of or 1)


def _check(name: str, value: object, known: list[Any]) -> None:
    if not isinstance(value, str | bool | None) or value not in known:
        raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, known))}")


def _cut(row: Expanded, limit: int) -> Expanded:
    """A row's first tokens."""
    if any(slot.start + slot.length > limit for slot in row.slots):
        raise ValueError(
            f"max_length {limit} would cut an image: the row has {len(row.ids)} tokens, its last "
            f"image ends at {row.slots[-1].start + row.slots[-1].length}"
        )
    return replace(row, ids=row.ids[:limit])


TAKEN = (*(one.name for one in fields(Rows)), "add_special_tokens")
"""The arguments of a call that say something of texts."""


def spread(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments with those of `text_kwargs` and its like among them.

    What is None, and a flag that is False, asks for nothing and is left out; a word about images
    is kept whatever it says.
    """
    flat: dict[str, Any] = {}
    for name, value in kwargs.items():
        flat |= dict(value or {}) if name in _NESTED else {name: value}
    return {name: value for name, value in flat.items() if not _asks_nothing(name, value)}


def _asks_nothing(name: str, value: Any) -> bool:
    off = value is False and name not in TAKEN and not name.startswith("do_")
    return value is None or off


def taken(kwargs: dict[str, Any]) -> Rows:
    """Take what concerns rows out of a call's arguments."""
    own = {name: kwargs.pop(name) for name in TAKEN[:-1] if name in kwargs}
    return Rows(**own)
