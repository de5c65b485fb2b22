"""What holds for every composite: read, packed, trained, written, and loaded without us."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from data_packing.document import Document
from data_packing.pack import collate, join_views
from data_packing.sample import Sample
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.turns import turns_of
from tests import outside
from tests.models.composite_folders import messages_of, own_inputs
from tests.models.conftest import picture
from tests.models.own_processors import own_processor

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def conversations() -> list[Document]:
    """Several images of other sizes in two turns; one image at the very beginning; none."""
    many = Document.conversation(
        [
            ("user", [picture(1), "\nWhat is this?", picture(2, 100, 30), " the cat"]),
            ("assistant", "a red chair"),
            ("user", [picture(3, 32, 32), "Which room?"]),
            ("assistant", "It is a dog."),
        ]
    )
    one = Document.conversation([("user", ["Look: ", picture(4, 7, 90)]), ("assistant", "parrot")])
    text = Document.conversation([("user", "Which room?"), ("assistant", "the red room")])
    return [many, one, text]


def inputs_of(sample: Sample) -> dict[str, Any]:
    """One sample as arguments of our model."""
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(sample.input_ids)[None]}
    if sample.pixels:
        inputs["pixels"], inputs["sizes"] = join_views(sample.pixels)
    return inputs


@torch.no_grad()
def logits_of(model: MultimodalModel, processor: Processor, document: Document) -> Tensor:
    """Logits [T, W] of a document alone."""
    logits: Tensor = model(**inputs_of(processor.encode(document))).logits[0]
    return logits


@torch.no_grad()
def check_read(name: str, folder: Path, model: MultimodalModel, processor: Processor) -> None:
    """The same ids as their processor, the same logits as their model."""
    own, theirs = own_processor(str(folder), name), AutoModelForImageTextToText
    their_model = theirs.from_pretrained(folder).eval()
    assert their_model.config.model_type == name
    for document in conversations():
        inputs = own_inputs(own, document)
        assert processor.encode(document).input_ids.tolist() == inputs["input_ids"][0].tolist()
        expected = their_model(**inputs).logits[0]
        torch.testing.assert_close(logits_of(model, processor, document), expected, **CLOSE)


def check_packed(model: MultimodalModel, processor: Processor) -> None:
    """A pack gives each document the logits that it has alone, in any order."""
    documents = conversations()
    samples = [processor.encode(document) for document in (*documents, *reversed(documents))]
    pack = collate(samples, 0)
    with torch.no_grad():
        packed = model(
            input_ids=pack.input_ids,
            pixels=pack.pixels,
            sizes=pack.sizes,
            cu_seqlens=pack.cu_seqlens,
        ).logits[0]
    alone = [logits_of(model, processor, document) for document in documents]
    torch.testing.assert_close(packed, torch.cat([*alone, *reversed(alone)]), **CLOSE)


def train_a_step(model: MultimodalModel, processor: Processor) -> None:
    """One packed step of plain descent over everything; every part moves."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    pack = collate([processor.encode(document) for document in conversations()], 0)
    model.train()
    loss = model(
        input_ids=pack.input_ids,
        pixels=pack.pixels,
        sizes=pack.sizes,
        cu_seqlens=pack.cu_seqlens,
        labels=pack.labels,
    ).loss
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.01 * weight.grad
                weight.grad = None
    model.eval()
    moved = {n.partition(".")[0] for n, w in model.named_parameters() if not w.equal(before[n])}
    assert moved == {"encoder", "connector", "language_model"}


def ask_classes(
    folders: Mapping[str, tuple[Path, str, list[dict[str, Any]]]],
    scratch: Path,
    together: bool = False,
    adapter: bool = False,
) -> dict[str, dict[str, Any]]:
    """What a process that cannot import us makes of folders: see `answer` in outside_classes.py."""
    requests = {
        key: {
            "folder": str(folder),
            "kind": kind,
            "documents": documents,
            "together": together,
            "adapter": adapter,
        }
        for key, (folder, kind, documents) in folders.items()
    }
    found = outside.ask(Path(__file__).with_name("outside_classes.py"), requests, scratch)
    for key, answer in found.items():
        assert "error" not in answer, f"{key}: {answer['error']}"
    return found


def load_alone(
    folders: dict[str, tuple[Path, str]], scratch: Path, together: int = 0
) -> dict[str, dict[str, Any]]:
    """What such a process makes of the conversations.

    Args:
        folders: key → folder and its `model_type`.
        scratch: for files.
        together: ask about so many of them, and about these as one batch too; 0: all, each alone.
    """
    documents = []
    for number, document in enumerate(conversations()[: together or None]):
        messages, pictures = messages_of(document)
        paths = [str(scratch / f"{number}-{i}.png") for i in range(len(pictures))]
        for path, image in zip(paths, pictures, strict=True):
            image.save(path)
        documents.append({"messages": messages, "images": paths})
    these = {key: (folder, kind, documents) for key, (folder, kind) in folders.items()}
    return ask_classes(these, scratch, bool(together))


def check_alone(
    found: dict[str, dict[str, Any]], key: str, model: MultimodalModel, processor: Processor
) -> None:
    """The other process had our ids and logits, and wrote what we write."""
    for document, there in zip(conversations(), found[key]["documents"], strict=True):
        assert there["ids"].tolist() == processor.encode(document).input_ids.tolist()
        expected = logits_of(model, processor, document)
        torch.testing.assert_close(there["logits"], expected, **CLOSE)
        asked = processor.prompt(Document(document.parts[:-1]))
        wrote = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
        assert there["new"].tolist() == wrote[asked["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def check_answers(
    found: dict[str, Any], documents: list[Document], model: MultimodalModel, processor: Processor
) -> None:
    """The other process had the ids and logits of our prompts, and wrote what we write."""
    for document, there in zip(documents, found["documents"], strict=True):
        mine = processor.prompt(document)
        assert there["ids"].tolist() == mine["input_ids"][0].tolist()
        logits = model.eval()(**mine).logits[0]
        torch.testing.assert_close(there["logits"], logits, rtol=0, atol=1e-5)
        new = model.generate(**mine, max_new_tokens=8, do_sample=False)[0]
        assert there["new"].tolist() == new[mine["input_ids"].shape[1] :].tolist()


def messages_in_files(document: Document, scratch: Path) -> list[dict[str, Any]]:
    """A conversation as transformers' users write it, images as files."""
    images = iter(document.images)
    result = []
    for turn in turns_of(document):
        parts: list[dict[str, Any]] = turn.as_parts()
        for part in parts:
            if part["type"] == "image":
                data = next(images).data
                part["path"] = str(scratch / f"{abs(hash(data))}.png")
                Path(part["path"]).write_bytes(data)
        result.append({"role": turn.role, "content": parts})
    return result


def same_weights(first: MultimodalModel, second: MultimodalModel) -> bool:
    """Whether two models have the same weights, bit by bit."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
