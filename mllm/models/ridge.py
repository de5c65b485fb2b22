"""A closed-form start for the connector: its last linear layer by ridge regression.

The features that reach the last layer, averaged over an image's visual tokens, are mapped to the
mean embedding of the words that follow the image. Around it two things that make the first steps
steady: the features that enter the connector are centred (the bias of its LayerNorm), and the
visual tokens get the size of the embedding table's rows. The rest stays as it was drawn.
It touches weights directly, so it runs before DeepSpeed, on one rank; the caller broadcasts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_packing.document import Document, DocumentError
from data_packing.pack import join_views
from data_packing.sample import IGNORED, Sample
from data_packing.wording import counted
from mllm.models.connectors.base import Connector
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor

if TYPE_CHECKING:
    from data_packing.index import Index

_FEWEST = 8
STRENGTH = 1.0
"""Between 0.1 and 10 it makes little difference to the quick start once the sizes are right."""

_CENTRED = 128  # images whose mean is taken out
_LONGEST = 64  # learned tokens: the mean embedding of a page says nothing about its image


@dataclass(frozen=True, slots=True)
class RidgeReport:
    """What the start was solved from.

    Attributes:
        examples: image and text pairs.
        explained: share of the targets' variance that the solution explains on them.
    """

    examples: int
    explained: float


def solve(inputs: Tensor, targets: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Solve min |X W' + b - Y|² + s |W|² with s = strength x mean diagonal of the centred X'X.

    Args:
        inputs: X [n, H]; targets: Y [n, D]; any float type, solved in fp64.

    Returns:
        weight [D, H] and bias [D], as `nn.Linear` has them, fp64.
    """
    x, y = inputs.double(), targets.double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    gram = (x - mean_x).T @ (x - mean_x)
    penalty = strength * gram.diagonal().mean()
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, (x - mean_x).T @ (y - mean_y)).T
    return weight, mean_y - weight @ mean_x


@torch.no_grad()
def fit(
    model: MultimodalModel,
    samples: Sequence[Sample],
    strength: float = STRENGTH,
    batch: int = 32,
) -> RidgeReport:
    """Set the last linear layer of the connector from samples of one image and a short text.

    Args:
        samples: each with one image; the learned tokens that are words are its text.
        strength: of the penalty, see `solve`.
        batch: images that are encoded at a time.

    Raises:
        ValueError: fewer than 8 samples, or a last layer without bias.
    """
    last = model.connector.last_linear()
    if last.bias is None:
        raise ValueError(
            "init: ridge needs a bias in the connector's last layer, and this one has none: set "
            "connector.init: random"
        )
    if len(samples) < _FEWEST:
        raise ValueError(
            f"init: ridge found {counted(len(samples), 'document')} of one image and a short text; "
            f"it needs at least {_FEWEST}: put captions among the sources or set connector.init: "
            "random"
        )
    was_training = model.training
    model.eval()
    batches = [samples[at : at + batch] for at in range(0, len(samples), batch)]
    _centre(model, batches[: max(1, _CENTRED // batch)])
    inputs, second = _moments(model, batches)
    targets = torch.cat([_targets(model, group) for group in batches])
    weight, bias = solve(inputs, targets, strength)
    residual = targets.double() - (inputs.double() @ weight.T + bias)
    spread = targets.double() - targets.double().mean(dim=0)
    centre, mean = inputs.double().mean(dim=0), targets.double().mean(dim=0)
    weight *= _scale(model, second - torch.outer(centre, centre), weight, mean)
    last.weight.copy_(weight)
    last.bias.copy_(mean - weight @ centre)
    model.train(was_training)
    return RidgeReport(len(samples), float(1 - residual.square().sum() / spread.square().sum()))


def _centre(model: MultimodalModel, batches: Sequence[Sequence[Sample]]) -> None:
    """Take the features' mean out of what the connector's LayerNorm hands on.

    The features of a network that ends in a ReLU share a large mean. Through it every step of Adam
    moves all visual tokens the same way, further than they differ: the loss leaves its path.
    """
    connector: Connector = model.connector
    norm = connector.input_norm()
    if norm is None:
        return
    mean = torch.cat([_reaching(model, norm, group, after=True) for group in batches])
    norm.bias.sub_(mean.mean(dim=0))


def _moments(model: MultimodalModel, batches: Sequence[Sequence[Sample]]) -> tuple[Tensor, Tensor]:
    """Of what reaches the last layer: each image's mean [n, H], and all tokens' h h' [H, H].

    The tokens themselves are not kept: a thousand images of 576 wide ones are gigabytes.
    """
    last = model.connector.last_linear()
    means: list[Tensor] = []
    second = torch.zeros(last.in_features, last.in_features, device=model.device).double()
    tokens = 0
    for group in batches:
        hidden = _reaching(model, last, group)
        counts = [sum(model.tokens_per_view(_views([sample])[1])) for sample in group]
        means += [one.mean(dim=0) for one in hidden.split(counts)]
        second += hidden.T @ hidden
        tokens += len(hidden)
    return torch.stack(means), second / tokens


def _scale(model: MultimodalModel, covariance: Tensor, weight: Tensor, mean: Tensor) -> float:
    """How far to stretch visual tokens around their mean to the rms of an embedding.

    A penalty shrinks what it explains; the language model's first norm would undo that and pass
    back gradients that are larger by as much.
    """
    spread = ((weight @ covariance) * weight).sum().item()
    wanted = _mean_square(model.get_input_embeddings()) - mean.square().sum().item()
    return (wanted / spread) ** 0.5 if wanted > 0 and spread > 0 else 1.0


def _mean_square(embedding: nn.Module) -> float:
    """Mean squared length of what the embedding gives for a word: some scale what they store."""
    assert isinstance(embedding, nn.Embedding)
    ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    total = 0.0
    for some in ids.split(4096):
        total += float(embedding(some).float().square().sum())
    return total / len(ids)


def warm_start(
    model: MultimodalModel,
    processor: Processor,
    indexes: Sequence[Index],
    seed: int,
    limit: int = 1024,
) -> RidgeReport:
    """Pick documents of one image and a short text from the sources, and `fit`.

    Args:
        indexes: the sources of the stage.
        seed: of the choice.
        limit: how many documents at most.

    Raises:
        ValueError: hardly any such document.
    """
    captions: list[Sample] = []
    conversations: list[Document] = []
    for document in _documents(indexes, seed):
        if len(captions) == limit:
            break
        if document.is_conversation:
            conversations.append(document)
        else:
            captions += _usable(model, processor, document)
    if len(captions) < _FEWEST:  # answers often say little about the image; better than nothing
        for document in conversations[: limit - len(captions)]:
            captions += _usable(model, processor, document)
    threads = torch.get_num_threads()
    torch.set_num_threads(_cores())  # the other ranks only wait
    try:
        return fit(model, captions)
    finally:
        torch.set_num_threads(threads)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _usable(model: MultimodalModel, processor: Processor, document: Document) -> list[Sample]:
    """The document's sample if its text is short and it can be encoded, else nothing."""
    try:
        sample = processor.encode(document)
    except DocumentError:
        return []  # the loader refuses it by name when it is planned
    return [sample] if 0 < len(_words(model, sample)) <= _LONGEST else []


def _documents(indexes: Sequence[Index], seed: int) -> Iterator[Document]:
    """Documents with one image, of all sources, in a random order."""
    places: list[tuple[int, int]] = []
    for source, index in enumerate(indexes):
        images = np.diff(index.piece_image_start[index.piece_start])
        places += [(source, int(number)) for number in np.flatnonzero(images == 1)]
    for at in np.random.default_rng(seed).permutation(len(places)):
        source, number = places[at]
        try:
            yield indexes[source].read(number)
        except DocumentError:
            continue


def _words(model: MultimodalModel, sample: Sample) -> NDArray[np.int64]:
    """The learned tokens without those that end a text or a turn."""
    learned = sample.labels[sample.labels != IGNORED]
    ends = model.generation_config.eos_token_id
    words: NDArray[np.int64] = learned[~np.isin(learned, ends)]
    return words


def _reaching(
    model: MultimodalModel, layer: nn.Module, samples: Sequence[Sample], after: bool = False
) -> Tensor:
    """What reaches a layer of the connector, or leaves it: [rows, H] in fp32, view by view."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        caught.append((result if after else arguments[0]).float().flatten(0, -2))

    hook = layer.register_forward_hook(catch)
    pixels, sizes = _views(samples)
    try:
        with _fast(model.device):
            model.image_features(pixels.to(model.device), sizes)
    finally:
        hook.remove()
    return caught[0]


def _views(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Pixels [B] and sizes [V, 2] of all views of the samples."""
    return join_views([view for sample in samples for view in sample.pixels])


def _targets(model: MultimodalModel, samples: Sequence[Sample]) -> Tensor:
    """Mean embedding [n, D] of each sample's words."""
    embed = model.get_input_embeddings()
    words = [torch.from_numpy(_words(model, sample)).to(model.device) for sample in samples]
    return torch.stack([embed(ids).float().mean(dim=0) for ids in words])


def _fast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where the device computes it natively; a warm start needs no more digits."""
    native = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16) if native else nullcontext()
