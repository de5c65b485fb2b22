"""How likely a model finds documents: the sum of -log p over each document's learned tokens.

Documents go through the model packed, as in training. Neighbours that show the same images and
begin alike (one question, many answers) are laid out as a tree: the shared beginning once, then
every ending, each of which sees the beginning and itself. A choice among twelve answers so costs
one beginning, not twelve.

T tokens of a row, D hidden width, V vocabulary, U distinct positions that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_packing.document import Document, Image
from data_packing.pack import join_orders, join_questions, join_views
from data_packing.packing import pack_lengths
from data_packing.sample import IGNORED, Sample
from mllm.evaluation.heldout import blank_image
from mllm.evaluation.likelihood import Scorer

__all__ = ["score", "scorer", "text_loss"]

BATCH_TOKENS = 1024
"""A row's mask is T x T, so longer rows stop being cheaper."""
READ_AT_ONCE = 256
"""Positions whose logits exist at a time: 256 x 49,152 fp32 are 50 MB."""

Progress = Callable[[int], None]


@dataclass(slots=True)
class Tree:
    """Documents with one beginning: `shared` tokens of `samples[0]`, then each one's own end."""

    numbers: list[int]
    samples: list[Sample]
    shared: int

    @property
    def length(self) -> int:
        return self.shared + sum(len(s.input_ids) - self.shared for s in self.samples)


@dataclass(slots=True)
class Row:
    """Trees side by side as one sequence.

    Attributes:
        ids, positions: of every token; positions restart with every tree and every ending.
        tree, branch: which tree a token is in, and which ending (-1: the shared beginning).
        pixels: uint8 [H, W, 3] of every view.
        shown: samples whose images are shown.
        reads: (position whose logits are read, token expected there, document).
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tree: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    shown: list[Sample] = field(default_factory=list)
    reads: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, tree: Tree) -> None:
        """Lay a tree out at the end of the row."""
        start, number = len(self.ids), self.tree[-1] + 1 if self.tree else 0
        self.pixels += tree.samples[0].pixels
        self.shown.append(tree.samples[0])
        self._extend(tree.samples[0].input_ids[: tree.shared], 0, number, -1)
        for branch, (document, sample) in enumerate(zip(tree.numbers, tree.samples, strict=True)):
            own = len(self.ids)
            self._extend(sample.input_ids[tree.shared :], tree.shared, number, branch)
            for at in np.flatnonzero(sample.labels[1:] != IGNORED).tolist():
                where = start + at if at < tree.shared else own + at - tree.shared
                self.reads.append((where, int(sample.labels[at + 1]), document))

    def _extend(self, ids: np.ndarray, position: int, tree: int, branch: int) -> None:
        self.ids += ids.tolist()
        self.positions += range(position, position + len(ids))
        self.tree += [tree] * len(ids)
        self.branch += [branch] * len(ids)

    @property
    def branches(self) -> bool:
        """Whether some tree has an ending of its own: then bounds alone do not describe the row."""
        return max(self.branch) >= 0

    def bounds(self) -> Tensor:
        """int32 [n+1], where trees begin and the last one ends."""
        starts = [at for at, tree in enumerate(self.tree) if at == 0 or self.tree[at - 1] != tree]
        return torch.tensor([*starts, len(self.tree)], dtype=torch.int32)

    def mask(self) -> Tensor:
        """bool [1, 1, T, T]: a token sees what came before it in its beginning and its ending."""
        tree, branch = torch.tensor(self.tree), torch.tensor(self.branch)
        same = (tree[:, None] == tree) & ((branch == -1) | (branch[:, None] == branch))
        return (same & torch.ones(len(tree), len(tree), dtype=torch.bool).tril())[None, None]


def scorer(
    model: Any,
    processor: Any,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Scorer:
    """A function from documents to (NLL, learned tokens), as `mllm.evaluation.likelihood` takes."""
    return partial(score, model, processor, batch_tokens=batch_tokens, progress=progress)


@torch.inference_mode()
def score(
    model: Any,
    processor: Any,
    documents: Sequence[Document],
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[tuple[float, int]]:
    """Return (sum of -log p in nats, number of learned tokens) of every document, in order.

    Args:
        model: a MultimodalModel.
        processor: its Processor.
        documents: raw documents or conversations; put those with the same images together.
        batch_tokens: tokens per forward pass; a longer document gets a pass of its own.
        progress: called with the number of documents that a pass has finished.

    Raises:
        DocumentError: a document cannot be encoded.
        ValueError: a document has nothing to learn.
    """
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    trees = plant(processor, documents, share=not _windowed(model))
    lengths = [tree.length for tree in trees]
    capacity = max([batch_tokens, *lengths])
    result = torch.zeros(len(documents), dtype=torch.float64)
    counts = [0] * len(documents)
    for pack in pack_lengths(lengths, capacity):
        row = Row()
        for number in pack:
            row.add(trees[number])
        nll = read(model, row, device)
        for (_, _, document), value in zip(row.reads, nll.tolist(), strict=True):
            result[document] += value
            counts[document] += 1
        if progress:
            progress(sum(len(trees[number].numbers) for number in pack))
    model.train(was_training)
    if 0 in counts:
        raise ValueError(f"document {counts.index(0) + 1} of {len(counts)} has no learned token")
    return list(zip(result.tolist(), counts, strict=True))


def plant(processor: Any, documents: Sequence[Document], share: bool = True) -> list[Tree]:
    """Encode documents; neighbours with the same images that agree beyond them share a tree.

    Raises:
        DocumentError: a document cannot be encoded.
    """
    trees: list[Tree] = []
    before: Document | None = None
    for number, document in enumerate(documents):
        same = share and before is not None and _shows(document) == _shows(before)
        if same and document.images:
            tree = trees[-1]
            first = tree.samples[0]
            sample = processor.encode(_unseen(document))
            shared = min(tree.shared, _common(first.input_ids, sample.input_ids))
            seen = shared >= first.slots[-1].start + first.slots[-1].length
            if seen and _asked_alike(first, sample):
                tree.numbers.append(number)
                tree.samples.append(sample)
                tree.shared = shared
                continue
        sample = processor.encode(document)
        trees.append(Tree([number], [sample], len(sample.input_ids)))
        before = document
    return trees


def _shows(document: Document) -> list[bytes]:
    return [image.data for image in document.images]


def _asked_alike(one: Sample, other: Sample) -> bool:
    """Whether images that a model looks at with a question are asked the same."""
    return [*map(list, one.asked)] == [*map(list, other.asked)]


def _unseen(document: Document) -> Document:
    """The document with a dot of the same nominal size for every image: its ids, not its pixels."""
    dot = blank_image(1).data
    parts = (replace(p, data=dot) if isinstance(p, Image) else p for p in document.parts)
    return replace(document, parts=tuple(parts))


def _windowed(model: Any) -> bool:
    """Whether some layer sees a window only; the mask of a tree knows nothing of windows."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types:
        return "sliding_attention" in types
    return bool(getattr(config, "sliding_window", None))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def read(model: Any, row: Row, device: torch.device) -> Tensor:
    """-log p [len(row.reads)] in fp32, one forward pass."""
    pixels, sizes = join_views(row.pixels) if row.pixels else (None, None)
    order, bags = join_orders(row.shown)
    if row.branches:
        mask, documents = row.mask().to(device), row.bounds().to(device)
        sight = {"attention_mask": mask, "documents": documents, "use_cache": False}
    else:
        sight = {"cu_seqlens": row.bounds().to(device)}
    hidden_BTD = model.hidden_states(
        input_ids=torch.tensor([row.ids], device=device),
        pixels=pixels.to(device) if pixels is not None else None,
        sizes=sizes,
        order=order.to(device),
        bags=bags.to(device),
        asked=join_questions([one for sample in row.shown for one in sample.asked]).to(device),
        position_ids=torch.tensor([row.positions], device=device),
        **sight,
    )
    where = torch.tensor([at for at, _, _ in row.reads], device=device)
    targets = torch.tensor([token for _, token, _ in row.reads], device=device)
    distinct_U, back = torch.unique(where, return_inverse=True)
    nll = torch.empty(len(row.reads), device=device)
    for start in range(0, len(distinct_U), READ_AT_ONCE):
        some = distinct_U[start : start + READ_AT_ONCE]
        logits_UV = model.lm_head(hidden_BTD[0, some]).float()
        mine = torch.nonzero((back >= start) & (back < start + len(some))).squeeze(1)
        line = back[mine] - start
        nll[mine] = logits_UV.logsumexp(1)[line] - logits_UV[line, targets[mine]]
    return nll.cpu()


@torch.inference_mode()
def text_loss(
    language_model: Any, tokenizer: Any, text: str, window: int = 256, max_tokens: int | None = None
) -> tuple[float, list[tuple[float, int]]]:
    """NLL per token of plain text, in windows that each start afresh.

    Works for any causal language model of transformers, so the model before and after training is
    measured alike.

    Args:
        language_model: a *ForCausalLM.
        tokenizer: its tokenizer; no special tokens are added.
        window: tokens scored a pass; each also gets the token before them.
        max_tokens: score no more than these from the beginning; None: all.

    Returns:
        Nats per token, and (nll, tokens) of every window.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = ids if max_tokens is None else ids[: max_tokens + 1]
    device = language_model.get_input_embeddings().weight.device
    was_training = language_model.training
    language_model.eval()
    rows: list[tuple[float, int]] = []
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[start : start + window + 1]], device=device)
        logits = language_model(input_ids=piece[:, :-1], use_cache=False).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum")
        rows.append((float(nll), piece.shape[1] - 1))
    language_model.train(was_training)
    if not rows:
        raise ValueError("the text is too short to measure: fewer than two tokens")
    return sum(nll for nll, _ in rows) / sum(n for _, n in rows), rows
