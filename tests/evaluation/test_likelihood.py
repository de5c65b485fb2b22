from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mllm.evaluation.heldout import blank_image
from mllm.evaluation.likelihood import (
    bootstrap,
    caption_gap,
    category_choice,
    choice,
    derangement,
)
from tests.evaluation.conftest import Seeing, blind, held


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 5))
def test_derangement_is_a_permutation_without_a_label_of_its_own(
    numbers: list[int], seed: int
) -> None:
    labels = [str(number) for number in numbers]
    assume(2 * max(labels.count(label) for label in labels) <= len(labels))
    order = derangement(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    assert all(labels[order[i]] != labels[i] for i in range(len(labels)))


def test_derangement_follows_its_seed() -> None:
    labels = [str(number) for number in range(20)]
    assert derangement(labels, 1) == derangement(labels, 1)
    assert derangement(labels, 1) != derangement(labels, 2)


def test_derangement_refuses_what_cannot_be_shuffled() -> None:
    with pytest.raises(ValueError, match="3 of them share one caption"):
        derangement(["a", "a", "a", "b"])


def test_caption_gap_is_the_difference_of_the_losses() -> None:
    examples = held()
    figure = caption_gap(Seeing(examples, wrong=3.5), examples)
    assert figure.value == pytest.approx(2.5)
    assert (figure.low, figure.high) == (pytest.approx(2.5), pytest.approx(2.5))
    assert figure.parts["right"] == pytest.approx(1.0)
    assert figure.parts["shuffled"] == pytest.approx(3.5)
    assert figure.trials == 10 * 4


def test_caption_gap_of_a_blind_model_is_nothing() -> None:
    assert caption_gap(blind, held()).value == 0.0


def test_the_same_caption_on_two_images_is_never_the_shuffled_one() -> None:
    examples = held(20)  # every colour twice, on different images
    seen: list[tuple[str, bytes]] = []

    def spy(documents: list) -> list[tuple[float, int]]:  # type: ignore[type-arg]
        seen.extend((d.parts[1].text, d.images[0].data) for d in documents)
        return blind(documents)

    caption_gap(spy, examples)
    owner = {example.image.data: example.caption for example in examples}
    assert all(owner[image] == caption for caption, image in seen[:20])
    assert all(owner[image] != caption for caption, image in seen[20:])


def test_choice_finds_what_a_seeing_model_knows() -> None:
    examples = held()
    scorer = Seeing(examples)
    figure = choice(scorer, examples, candidates=8, trials=500)
    assert figure.value == 1.0
    assert figure.trials >= 500
    assert figure.chance == 1 / 8
    assert scorer.calls <= 10 * 10  # a pair is priced once, however often it is drawn


def test_choice_of_a_blind_model_is_at_chance() -> None:
    figure = choice(blind, held(), candidates=8, trials=80)
    assert figure.value == pytest.approx(1 / 8)


def test_choice_of_a_guessing_model_is_near_chance() -> None:
    random = np.random.default_rng(0)

    def guess(documents: list) -> list[tuple[float, int]]:  # type: ignore[type-arg]
        return [(float(random.random()), 1) for _ in documents]

    examples = [
        replace(example, key=str(i), caption=f"caption {chr(97 + i % 26)}{chr(97 + i // 26)}")
        for i, example in enumerate(held(100))
    ]
    figure = choice(guess, examples, candidates=8, trials=1000)
    assert figure.trials == 1000
    assert abs(figure.value - 1 / 8) < 0.05


def test_choice_is_by_the_mean_over_tokens_not_by_the_sum() -> None:
    examples = [replace(e, caption=e.caption + " word" * i) for i, e in enumerate(held())]
    assert choice(Seeing(examples), examples, 8, 50).value == 1.0


def test_choice_needs_distinct_captions() -> None:
    with pytest.raises(ValueError, match="3 distinct captions"):
        choice(blind, held(3), candidates=8)


def test_category_choice_compares_with_the_blank_image() -> None:
    examples = held(10, ("Warm", "Cold"))
    figure = category_choice(Seeing(examples), examples, "Which?", ["Warm", "Cold", "Tepid"])
    assert figure.parts["right"] == 1.0
    assert figure.parts["blank"] == pytest.approx(1 / 3)  # all alike: a tie is shared
    assert figure.value == pytest.approx(2 / 3)
    assert figure.parts["categories"] == {"Cold": 5, "Tepid": 0, "Warm": 5}


def test_category_choice_really_shows_the_blank_image() -> None:
    shown: set[bytes] = set()

    def spy(documents: list) -> list[tuple[float, int]]:  # type: ignore[type-arg]
        shown.update(d.images[0].data for d in documents)
        assert all(d.parts[1].text == "Which?" and not d.parts[1].learned for d in documents)
        return [(float(len(d.parts[2].text)), 1) for d in documents]

    examples = held(10, ("Warm", "Cooler"))
    figure = category_choice(spy, examples, "Which?")
    assert blank_image().data in shown
    assert figure.value == 0.0  # the shortest answer every time, image or not
    assert figure.parts["blank"] == 0.5


def test_category_choice_without_categories_is_refused() -> None:
    with pytest.raises(ValueError, match="two categories"):
        category_choice(blind, held(), "Which?")


def test_bootstrap_holds_the_mean_and_narrows_with_more_groups() -> None:
    random = np.random.default_rng(3)
    values = random.random(400).tolist()
    groups = [[i] for i in range(400)]
    low, high = bootstrap(values, [1] * 400, groups)
    assert low < float(np.mean(values)) < high
    few = bootstrap(values[:20], [1] * 20, groups[:20])
    assert few[1] - few[0] > 2 * (high - low)


def test_bootstrap_resamples_whole_groups() -> None:
    values = list(itertools.chain(*([v] * 50 for v in (0.0, 1.0, 0.0, 1.0))))
    together = bootstrap(values, [1] * 200, [list(range(i, i + 50)) for i in range(0, 200, 50)])
    apart = bootstrap(values, [1] * 200, [[i] for i in range(200)])
    assert together[1] - together[0] > 3 * (apart[1] - apart[0])
    assert math.isclose(together[0], 0.0)
    assert math.isclose(together[1], 1.0)
