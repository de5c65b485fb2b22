"""Talk to a model in the terminal: what `mllm chat` does.

mllm chat outputs/quickstart/3_instruct --image cat.png --question "What is this?"
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_packing.document import Document, DocumentError, Image, Role
from data_packing.video import EXTENSIONS
from mllm.inference.generate import Generator
from mllm.inference.quiet import quiet

__all__ = ["Conversation", "chat"]

HELP = """\
/image PATH   show an image and begin anew
/new          begin anew without an image
/quit         leave (or Ctrl-D)"""


@dataclass(slots=True)
class Conversation:
    """What was said so far, and the images that go with the next question."""

    images: list[Image] = field(default_factory=list)
    turns: list[tuple[Role, list[Image | str]]] = field(default_factory=list)

    def ask(self, question: str) -> Document:
        """The conversation with a question at its end; nothing is remembered yet."""
        return Document.conversation([*self.turns, ("user", [*self.images, question])])

    def remember(self, question: str, answer: str) -> None:
        """Keep a question and its answer for the ones to come."""
        self.turns += [("user", [*self.images, question]), ("assistant", [answer])]
        self.images = []


def chat(
    folder: str | Path,
    images: Sequence[str | Path] = (),
    question: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    device: str | None = None,
) -> None:
    """Answer one question, or talk until the user leaves.

    Args:
        folder: what a stage saved.
        images: shown with the first question.
        question: ask this once and return; without it, questions are read from the terminal.
        max_new_tokens, temperature: of every answer, as `Generator.stream`.
        device: as `mllm.inference.generate.load`.

    Raises:
        ValueError: the folder holds no model, an image cannot be read, or the question cannot be
            asked.
    """
    if question is not None and not question.strip() and not images:
        raise ValueError("--question is empty; ask something, or leave it out to talk")
    shown = [_opened(path) for path in images]
    quiet()
    generator = Generator.from_pretrained(folder, device)

    def answer(document: Document) -> str:
        return _print_stream(generator, document, max_new_tokens, temperature)

    if question is not None:
        answer(Conversation(images=shown).ask(question))
        return
    print(f"{folder}: ask about an image, or /help", file=sys.stderr)
    talk(answer, Conversation(images=shown), _read_line)


def _opened(path: str | Path) -> Image:
    """Read an image.

    Raises:
        DocumentError: it is missing or damaged, or a clip.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() in EXTENSIONS and file.is_file():
        raise DocumentError(
            f"{path} is a clip, and chat takes images: save some of its frames as images and give "
            "each with --image"
        )
    return Image.open(file)


def talk(
    answer: Callable[[Document], str],
    conversation: Conversation,
    read: Callable[[], str | None],
) -> None:
    """The loop of a conversation; what cannot be used is said, and the loop goes on.

    Args:
        answer: prints the answer to a document and returns it.
        conversation: where to begin.
        read: the next line, None at the end.
    """
    while (line := read()) is not None:
        line = line.strip()
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command == "/image":
                image = _opened(rest.strip().strip("'\""))
                conversation = Conversation(images=[image])
                print(f"({image.width} × {image.height} pixels)")
            elif command == "/new":
                conversation = Conversation()
            elif command == "/help":
                print(HELP)
            elif command.startswith("/"):
                print(f"unknown command {command}; there are\n{HELP}")
            elif line:
                conversation.remember(line, answer(conversation.ask(line)))
        except DocumentError as error:
            print(f"cannot use that: {error}")
        except KeyboardInterrupt:
            print()


def _print_stream(
    generator: Generator, document: Document, max_new_tokens: int, temperature: float
) -> str:
    """Print an answer as it comes; Ctrl-C ends the answer, not the conversation."""
    pieces: list[str] = []
    stream = generator.stream(document, max_new_tokens, temperature)
    with contextlib.suppress(KeyboardInterrupt):
        for piece in stream:
            pieces.append(piece)
            print(piece, end="", flush=True)
    stream.close()  # type: ignore[attr-defined]
    print()
    return "".join(pieces).strip()


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return None
