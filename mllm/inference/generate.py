"""Answers from a stage's folder, whole or as a stream of text."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from data_packing.document import Document

__all__ = ["Generator", "choose_device", "load"]


def load(folder: str | Path, device: str | None = None) -> tuple[Any, Any]:
    """Load the model and the processor that a stage saved, in the precision it was saved in.

    Args:
        folder: a stage's folder.
        device: "cpu", "cuda", "cuda:1", …; the first GPU if there is one, if not given.

    Returns:
        The model in eval mode on the device, and its processor.

    Raises:
        ValueError: no such folder, a stage that is not finished, no model in it, damaged files, or
            a device that is not there.
    """
    from mllm.models.assemble import load as load_model

    folder = Path(folder)
    _check_finished(folder)
    place = choose_device(device)
    model, processor = load_model(folder)
    model.to(place)  # type: ignore[arg-type]
    return model.eval(), processor


def _check_finished(folder: Path) -> None:
    """Tell a stage that is not whole, whatever files it has, and a folder without a model."""
    from mllm.training.run_folder import RunFolder

    if not folder.is_dir():
        return
    run = RunFolder(folder)
    if run.begun() is not None and run.finished() is None:
        raise ValueError(
            f"{folder}: this stage is not finished, so it has no model yet. Run the same "
            "`mllm train` command again; it goes on where it stopped."
        )
    if (folder / "config.json").is_file():
        return
    stages = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if stages:
        raise ValueError(
            f"{folder} holds no model itself; give one of its stages: "
            + ", ".join(str(folder / name) for name in stages)
        )


def choose_device(name: str | None) -> torch.device:
    """The device of this name; without one the first GPU if there is any.

    Raises:
        ValueError: no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: try cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: this machine has no GPU that torch can use; try cpu")
    return device


class _Closed(StoppingCriteria):
    """Ends a generation that nobody listens to any more."""

    def __init__(self, closed: threading.Event) -> None:
        self.closed = closed

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        done = torch.full((len(input_ids),), self.closed.is_set(), device=input_ids.device)
        return done  # type: ignore[return-value]


@dataclass(slots=True)
class Generator:
    """A model that answers.

    Attributes:
        model: a MultimodalModel.
        processor: its Processor; the prompt's ids are those of training.
    """

    model: Any
    processor: Any

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | None = None) -> Self:
        """Load a stage's folder; errors as `load`."""
        return cls(*load(folder, device))

    def answer(
        self, document: Document, max_new_tokens: int = 128, temperature: float = 0.0
    ) -> str:
        """Return the whole answer to a document that ends with the user's turn.

        A raw document (an image, or text to go on from) is continued instead. Arguments and errors
        as `stream`.
        """
        return "".join(self.stream(document, max_new_tokens, temperature)).strip()

    def answers(self, documents: Sequence[Document], max_new_tokens: int = 32) -> list[str]:
        """Return the likeliest answers to several documents, generated together.

        Raises:
            DocumentError: one of them cannot be used.
        """
        inputs = {k: v.to(self.model.device) for k, v in self.processor.prompts(documents).items()}
        end = self.processor.tokenizer.eos_token_id  # fills up; what ends a turn the model knows
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                do_sample=False,
                top_p=None,
                top_k=None,
                max_new_tokens=max_new_tokens,
                pad_token_id=end,
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def stream(
        self, document: Document, max_new_tokens: int = 128, temperature: float = 0.0
    ) -> Iterator[str]:
        """Yield the answer piece by piece as it is generated.

        Args:
            document: ends with the user's turn, or is a raw document to be continued.
            max_new_tokens: the longest answer.
            temperature: 0 takes the likeliest token every time; above, tokens are drawn.

        Raises:
            DocumentError: the document cannot be used.
            ValueError: a negative temperature or a length below 1.
        """
        if temperature < 0 or max_new_tokens < 1:
            raise ValueError(
                f"temperature {temperature} and max_new_tokens {max_new_tokens}: "
                "the first must be 0 or more, the second 1 or more"
            )
        inputs = {
            name: tensor.to(self.model.device)
            for name, tensor in self.processor.prompt(document).items()
        }
        return self._stream(inputs, max_new_tokens, temperature)

    def _stream(
        self, inputs: dict[str, Any], max_new_tokens: int, temperature: float
    ) -> Iterator[str]:
        tokenizer = self.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed, failure = threading.Event(), []
        draw = {"temperature": temperature} if temperature else {"top_p": None, "top_k": None}

        def work() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **inputs,
                        **draw,
                        do_sample=temperature > 0,
                        max_new_tokens=max_new_tokens,
                        pad_token_id=tokenizer.eos_token_id,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_Closed(closed)]),
                    )
            except BaseException as error:
                failure.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            closed.set()
            thread.join()
        if failure:
            raise failure[0]
