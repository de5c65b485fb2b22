from __future__ import annotations

import warnings
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_packing.loss_weights import RULES, Weighting
from data_packing.pack import Pack, collate
from data_packing.sample import IGNORED, Sample

EXPECTED = {"token": lambda n: 1.0, "sample": lambda n: 1 / n, "sqrt": lambda n: 1 / sqrt(n)}
"""Learned tokens of a document -> what one of them counts."""


def sample(learned: list[bool]) -> Sample:
    """A document with as many tokens; its labels say which are learned."""
    ids = np.arange(len(learned), dtype=np.int64)
    return Sample(ids, np.where(learned, ids, IGNORED))


def pack_of(documents: list[list[bool]], rule: str, across: bool = False) -> Pack:
    weighting = Weighting(rule)
    return collate([sample(one) for one in documents], 0, across, weighting=weighting)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("across", [False, True])
@given(documents=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=6))
def test_a_token_counts_what_its_own_document_says(
    rule: str, across: bool, documents: list[list[bool]]
) -> None:
    pack = pack_of(documents, rule, across)
    expected: list[float] = []
    for number, learned in enumerate(documents):
        segment = number == 0 or not across
        counted = [False, *learned[1:]] if segment else learned  # nothing predicts a first token
        expected += [EXPECTED[rule](sum(counted)) if one else 0.0 for one in counted]
    assert pack.weights.dtype == torch.float32
    assert pack.weights.shape == (1, len(pack.labels))
    assert pack.weights[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(pack.weights[0] != 0, pack.labels != IGNORED)


def test_with_sample_every_document_that_teaches_counts_one() -> None:
    pack = pack_of([[True] * 8, [False] * 5, [True] * 3, [True]], "sample")
    parts = pack.weights[0].split(pack.cu_seqlens.diff().tolist())
    assert [float(part.sum()) for part in parts] == pytest.approx([1, 0, 1, 0])


@pytest.mark.parametrize("rule", RULES)
def test_documents_without_a_learned_token_weigh_nothing(rule: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a division by zero
        pack = pack_of([[False, False], [True]], rule)
    assert pack.weights.tolist() == [[0, 0, 0]]


def test_every_objective_has_its_row() -> None:
    uses = ((1, 1, 1), (0, 1, 0))
    documents = [sample([True] * 2), sample([True] * 5), sample([True] * 2)]
    pack = collate(documents, 0, weighting=Weighting("sqrt", uses), sources=[1, 0, 1])
    alone = [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0]
    assert pack.weights.tolist() == [alone, [0, 1, 0, 0.5, 0.5, 0.5, 0.5, 0, 1], alone]
    assert pack.weights.is_contiguous()
    assert Pack.empty(3).weights.shape == (3, 0)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="'square': expected one of token, sample, sqrt"):
        Weighting("square")
    for uses in (((),), ((1,), (1, 0)), ((2,),)):
        with pytest.raises(ValueError, match="a row of 0 and 1 per source"):
            Weighting("token", uses)
