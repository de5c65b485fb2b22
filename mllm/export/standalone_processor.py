"""The processor of an exported folder: texts and images to what its model takes.

See `standalone`, with which this becomes one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData

from mllm.export.standalone_images import image_layout
from mllm.export.standalone_square import (
    MllmImageProcessor,
    image_geometry,
    image_layouts,
    image_rows,
)
from mllm.models.geometry import Geometry, Layout


class MllmProcessor(ProcessorMixin):
    """Texts and images to what the model takes.

    A text has the image token once for every image. A text with any other special token, images'
    marks left aside, was written by the chat template and is tokenised as it is; before any other
    comes what the tokenizer begins a text with. `add_special_tokens` decides otherwise.

    Args:
        image_processor, tokenizer, chat_template: as in transformers.
        image_token: the placeholder.
        image_text: what is tokenised for an image; holds the image token once.
        image_marks: special tokens that stand around an image in a text, raw or not.
    """

    def __init__(
        self,
        image_processor: MllmImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: Any = None,
        image_token: str = "<image>",
        image_text: str = "<image>",
        image_marks: Sequence[str] = (),
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.image_text = image_token, image_text
        self.image_marks = list(image_marks)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(image_token)
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        self._template_tokens = special - {image_token, *image_marks}
        plain, begun = (self.tokenizer("a", add_special_tokens=add) for add in (False, True))
        self._tokenizer_begins = plain["input_ids"] != begun["input_ids"]

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Return input_ids, attention_mask, and of images what the image processor returns."""
        if text is not None and self._tokenizer_begins:
            nested = kwargs["text_kwargs"] = dict(kwargs.get("text_kwargs") or {})
            chosen = nested.pop("add_special_tokens", kwargs.get("add_special_tokens"))
            texts = [text] if isinstance(text, str) else text
            begins = {self._begins(one, chosen) for one in texts}
            if len(begins) > 1:
                raise ValueError(
                    "some of the texts are to get a begin token and others are not: process those "
                    "of the chat template and raw ones apart"
                )
            kwargs["add_special_tokens"] = True in begins
        return super().__call__(images=images, text=text, **kwargs)  # type: ignore[no-any-return]

    def _begins(self, text: str, chosen: bool | None) -> bool:
        """Whether a text gets the begin token; `chosen` by the caller, or None."""
        if text.startswith(self.tokenizer.bos_token or "\0"):
            return False
        raw = not any(token in text for token in self._template_tokens)
        return raw if chosen is None else chosen

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a template writes all special tokens that there are to be."""
        given = kwargs.pop("processor_kwargs", None) or {}
        return super().apply_chat_template(  # type: ignore[misc]
            *args, processor_kwargs={"add_special_tokens": False, **given}, **kwargs
        )

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for an image: its image tokens, and marks between them."""
        sizes = image_inputs["original_sizes"].tolist()
        layouts = image_layouts(self._geometry, self.image_processor.connector, sizes)
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
        """Return tokens and rows of pixels of images of these (height, width); vLLM asks for it."""
        if image_sizes is None:
            return MultiModalData()
        connector = self.image_processor.connector
        layouts = [
            image_layout(self._geometry, connector, int(height), int(width))
            for height, width in image_sizes
        ]
        texts = [self._written(layout) for layout in layouts]
        return MultiModalData(
            num_image_tokens=[len(self.tokenizer.tokenize(text)) for text in texts],
            num_image_patches=[image_rows(layout) for layout in layouts],
        )
