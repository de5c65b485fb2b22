"""The processor of an exported folder: texts and images to what its model takes.

See `standalone`, with which this becomes one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData

from mllm.export.standalone_images import image_layout
from mllm.export.standalone_questions import question_rows, questions_of
from mllm.export.standalone_regions import boxes_of, images_of_regions, region_rows
from mllm.export.standalone_square import (
    MllmImageProcessor,
    image_geometry,
    image_layouts,
    image_rows,
)
from mllm.models.fusion import FUSIONS
from mllm.models.geometry import Geometry, Layout
from mllm.models.regions import REGION_TOKEN


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
        # marked
        image_mark: what the chat template writes for an image; texts may have it instead of the
            image token.
        # end
        # fused
        fusion: the model's, which says how many image tokens an image takes.
        # end
    """

    def __init__(
        self,
        image_processor: MllmImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: Any = None,
        image_token: str = "<image>",
        image_text: str = "<image>",
        image_marks: Sequence[str] = (),
        # marked
        image_mark: str = "<image>",
        # end
        # fused
        fusion: dict[str, Any] | None = None,
        # end
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.image_text = image_token, image_text
        # fused
        self.fusion = dict(fusion or {})
        # end
        self.image_marks = list(image_marks)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(image_token)
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        self._template_tokens = special - {image_token, *image_marks}
        plain, begun = (self.tokenizer("a", add_special_tokens=add) for add in (False, True))
        self._tokenizer_begins = plain["input_ids"] != begun["input_ids"]
        # marked
        self.image_mark = image_mark
        # end

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Return input_ids, attention_mask, and of images what the image processor returns."""
        texts = [text] if isinstance(text, str) else text or []
        # marked
        texts = [one.replace(self.image_mark, self.image_token) for one in texts]
        text = None if text is None else texts
        # end
        if text is not None and self._tokenizer_begins:
            nested = kwargs["text_kwargs"] = dict(kwargs.get("text_kwargs") or {})
            chosen = nested.pop("add_special_tokens", kwargs.get("add_special_tokens"))
            begins = {self._begins(one, chosen) for one in texts}
            if len(begins) > 1:
                raise ValueError(
                    "some of the texts are to get a begin token and others are not: process those "
                    "of the chat template and raw ones apart"
                )
            kwargs["add_special_tokens"] = True in begins
            # before_begin
            if kwargs["add_special_tokens"]:
                kwargs["add_special_tokens"], text = False, [self._begun(one) for one in texts]
            # end
        # regions
        boxes = kwargs.pop("regions", None) or []
        owners = images_of_regions(texts, self.image_token)
        # end
        # asked
        questions = self._questions(images, kwargs.pop("questions", None), texts)
        # end
        found: BatchFeature = super().__call__(images=images, text=text, **kwargs)
        # asked
        if images is not None:
            layouts = self._layouts(found)
            questions = questions or [""] * len(layouts)
            found["asked"] = question_rows(questions, layouts, self.tokenizer)
        # end
        # regions
        if boxes or owners:
            self._add_regions(found, boxes, owners)
        # end
        return found

    def _begins(self, text: str, chosen: bool | None) -> bool:
        """Whether a text gets the begin token; `chosen` by the caller, or None."""
        if text.startswith(self.tokenizer.bos_token or "\0"):
            return False
        return self._is_raw(text) if chosen is None else chosen

    def _is_raw(self, text: str) -> bool:
        """Whether a text was not written by the chat template."""
        return not any(token in text for token in self._template_tokens)

    # before_begin
    def _begun(self, text: str) -> str:
        """Put the begin token before a text that has none, but after the images there."""
        at, begin = 0, self.tokenizer.bos_token
        while text.startswith(self.image_token, at):
            at += len(self.image_token)
        return text if text.startswith(begin, at) else f"{text[:at]}{begin}{text[at:]}"

    # end
    # regions
    def _add_regions(self, found: Any, boxes: Any, owners: list[int]) -> None:
        """Add what the model is told about regions, and put image tokens in their places."""
        sizes = found["original_sizes"].tolist()
        rule, connector = self._geometry, self.image_processor.connector
        layouts = self._layouts(found)
        found["regions"] = region_rows(boxes, owners, layouts, sizes, rule, connector)
        region, image = self.tokenizer.convert_tokens_to_ids(REGION_TOKEN), self.image_token_id
        ids = found["input_ids"]
        if isinstance(ids, list):
            found["input_ids"] = [[image if one == region else one for one in row] for row in ids]
        else:
            ids[ids == region] = image

    # end
    # asked
    def _questions(self, images: Any, questions: Any, texts: Sequence[str]) -> list[str]:
        """Return what is asked about each image; of raw texts with images nothing."""
        if questions is None and images is not None and not all(map(self._is_raw, texts)):
            raise ValueError(
                "this model's connector reads what is asked about an image: hand over the "
                "conversation, apply_chat_template(messages, tokenize=True), or for each image "
                "what is asked about it, questions=[...]"
            )
        return [questions] if isinstance(questions, str) else [*(questions or [])]

    # end
    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a template writes all special tokens that there are to be."""
        given = {"add_special_tokens": False, **(kwargs.pop("processor_kwargs", None) or {})}
        if "padding" in kwargs:  # else transformers takes it instead of `processor_kwargs`
            given["padding"] = kwargs.pop("padding")
        # regions
        conversation, given["regions"] = boxes_of(conversation)
        # end
        # asked
        given["questions"] = questions_of(conversation)
        # end
        kwargs["processor_kwargs"] = given
        return super().apply_chat_template(conversation, *args, **kwargs)  # type: ignore[misc]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for an image: its image tokens, and marks between them."""
        return self._written(self._layouts(image_inputs)[image_idx])

    def _layouts(self, image_inputs: Any) -> list[Layout]:
        """Return the layouts of what the image processor returned."""
        sizes = image_inputs["original_sizes"].tolist()
        return image_layouts(self._geometry, self.image_processor.connector, sizes)

    def _written(self, layout: Layout) -> str:
        # fused
        layout = FUSIONS[self.fusion["name"]].layout(layout)
        # end
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
