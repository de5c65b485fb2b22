"""Connectors: token counts, views of different grids, options, and calls of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mllm.models.connectors import CONNECTORS, Connector

Grid = tuple[int, int]
BERT = {"hidden": 8, "heads": 2, "inner": 12}
SPECS: dict[str, list[dict[str, Any]]] = {
    "average_pool": [{"visual_tokens": 1}, {"visual_tokens": 4}, {"visual_tokens": 9, "hidden": 5}],
    "c_abstractor": [
        {"visual_tokens": 4, "hidden": 10, "depth": 2, "positions": 4},
        {"visual_tokens": 1, "hidden": 6, "depth": 1, "positions": 3},
    ],
    "gemma3": [{"visual_tokens": 1}, {"visual_tokens": 9, "eps": 1e-5}],
    "linear": [{}],
    "mlp": [{}, {"hidden": 5}],
    "patch_merger": [
        {},
        {"factor": 3, "norm": "rms"},
        {"norm_after": True, "hidden": 5},
    ],
    "pixel_shuffle": [
        *({}, {"factor": 3, "layers": 1}, {"factor": 4, "hidden": 5}),
        {"layers": 1, "bias": False},
    ],
    "q_former": [
        {"visual_tokens": 3, "depth": 3, **BERT},
        {"visual_tokens": 5, "depth": 2, "cross_every": 1, **BERT},
    ],
    "resampler": [
        {"visual_tokens": 5, "depth": 2, "heads": 2, "head_width": 4},
        {"visual_tokens": 1, "hidden": 12, "depth": 1, "heads": 3, "head_width": 2},
    ],
}
CASES = [(name, spec) for name, specs in SPECS.items() for spec in specs]
GRIDS = st.lists(st.tuples(st.integers(3, 9), st.integers(3, 9)), min_size=1, max_size=4)


def made(name: str, spec: dict[str, Any]) -> Connector:
    """A connector of 6 features to width 8, with weights that are large enough to be seen."""
    torch.manual_seed(3)
    connector = CONNECTORS[name]({"name": name, **spec}, 6, 8)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return connector


def cells(grids: Sequence[Grid], seed: int = 0) -> Tensor:
    """Features [C, 6] of the views."""
    return torch.randn(
        sum(r * c for r, c in grids), 6, generator=torch.Generator().manual_seed(seed)
    )


def tokens_of(connector: Connector, grids: Sequence[Grid]) -> list[int]:
    """How many tokens each view makes."""
    return [connector.tokens_per_image(grid) for grid in grids]


def gradients(connector: nn.Module) -> dict[str, Tensor]:
    """All gradients by name; every weight must have one."""
    found = {}
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def test_every_connector_is_tried() -> None:
    assert set(SPECS) == set(CONNECTORS)


@pytest.mark.parametrize(("name", "spec"), CASES)
@settings(max_examples=15, deadline=None)
@given(grids=GRIDS)
def test_tokens_are_as_many_as_promised(name: str, spec: dict[str, Any], grids: list[Grid]) -> None:
    connector = made(name, spec)
    tokens = connector(cells(grids), grids)
    promised = [CONNECTORS[name].output_grid(spec, grid) for grid in grids]
    assert tokens.shape == (sum(rows * columns for rows, columns in promised), 8)
    assert connector.last_linear().out_features == 8


def same(one: Tensor, other: Tensor, digits: float) -> bool:
    """Whether two tensors agree to so much of the largest value in them."""
    return bool((one - other).abs().max() <= digits * max(1.0, float(one.detach().abs().max())))


@pytest.mark.parametrize(("name", "spec"), CASES)
@settings(max_examples=10, deadline=None)
@given(grids=GRIDS)
def test_views_in_one_call_equal_each_alone(
    name: str, spec: dict[str, Any], grids: list[Grid]
) -> None:
    # in fp64, where a layer norm of nearly equal channels does not blow up the rounding
    check_alone(made(name, spec), grids, torch.float64, 1e-11)


@pytest.mark.parametrize("grids", [[(4, 4), (6, 7), (3, 9), (4, 4)], [(5, 5)] * 3])
@pytest.mark.parametrize(("name", "spec"), CASES)
def test_views_in_one_call_equal_each_alone_in_fp32(
    name: str, spec: dict[str, Any], grids: list[Grid]
) -> None:
    check_alone(made(name, spec), grids, torch.float32, 1e-5)


def check_alone(connector: Connector, grids: list[Grid], dtype: torch.dtype, digits: float) -> None:
    """Tokens and all gradients of the views in one call are those of one call per view."""
    connector = connector.to(dtype).train()
    features = cells(grids).to(dtype).requires_grad_()
    together = connector(features, grids)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (together * weights).sum().backward()
    assert features.grad is not None
    inputs, wanted = features.grad.clone(), gradients(connector)
    features.grad = None
    views = features.split([rows * columns for rows, columns in grids])
    alone = [connector(view, [grid]) for view, grid in zip(views, grids, strict=True)]
    (torch.cat(alone) * weights).sum().backward()
    assert same(torch.cat(alone), together, digits)
    assert same(features.grad, inputs, digits)
    found = gradients(connector)
    assert all(same(found[part], gradient, digits) for part, gradient in wanted.items())


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_a_view_does_not_see_another(name: str, spec: dict[str, Any]) -> None:
    connector, grids = made(name, spec), [(4, 5), (7, 3), (4, 5), (9, 9)]
    features = cells(grids)
    tokens = connector(features, grids).split(tokens_of(connector, grids))
    views = list(features.split([20, 21, 20, 81]))
    views[1] = views[1] + 1000.0 * torch.randn_like(views[1])
    changed = connector(torch.cat(views), grids).split(tokens_of(connector, grids))
    for i, (one, other) in enumerate(zip(tokens, changed, strict=True)):
        assert torch.equal(one, other) == (i != 1)


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_every_cell_is_read(name: str, spec: dict[str, Any]) -> None:
    connector, grids = made(name, spec), [(5, 4), (3, 7)]
    features = cells(grids).requires_grad_()
    tokens = connector(features, grids)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert features.grad is not None
    assert (features.grad.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_weights_are_called_as_often_for_one_view_as_for_many(
    name: str, spec: dict[str, Any]
) -> None:
    connector = made(name, spec)
    calls: Counter[str] = Counter()
    for part, module in connector.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda *_, part=part: calls.update([part]))
    counted = []
    for grids in ([(4, 4)], [(4, 4)] * 3, [(4, 5), (9, 3), (3, 3), (5, 4), (4, 5)]):
        connector(cells(grids), grids)
        counted.append(dict(calls))
        calls.clear()
    assert counted[0] == counted[1] == counted[2]
    missed = {part for part, _ in connector.named_parameters()} - {
        f"{part}.{weight}".lstrip(".")
        for part in counted[0]
        for weight, _ in connector.get_submodule(part).named_parameters(recurse=False)
    }
    assert not missed


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_a_state_dict_brings_the_same_tokens(name: str, spec: dict[str, Any]) -> None:
    connector, grids = made(name, spec), [(4, 5), (3, 3)]
    other = CONNECTORS[name](connector.spec, 6, 8)
    assert not torch.equal(other(cells(grids), grids), connector(cells(grids), grids))
    other.load_state_dict(connector.state_dict())
    assert torch.equal(other(cells(grids), grids), connector(cells(grids), grids))


@pytest.mark.parametrize("name", ["resampler", "q_former"])
def test_fresh_queries_differ(name: str) -> None:
    connector = CONNECTORS[name]({"name": name, **SPECS[name][0]}, 6, 8)
    tokens = connector(cells([(4, 4)]), [(4, 4)])
    assert torch.pdist(tokens).min() > 1e-4


def test_average_pool_averages_cells() -> None:
    connector = made("average_pool", {"visual_tokens": 4})
    features = cells([(4, 4)])
    squares = features.reshape(2, 2, 2, 2, 6).mean(dim=(1, 3)).reshape(4, 6)
    wanted = connector.second(functional.gelu(connector.first(connector.norm(squares))))
    torch.testing.assert_close(connector(features, [(4, 4)]), wanted)


def test_levels_of_a_patch_merger_are_merged_apart() -> None:
    both = CONNECTORS["patch_merger"]({"levels": 2}, 6, 8)
    features, grids = cells([(4, 6)]), [(4, 6)]
    for number, (merger, after) in enumerate([(both.merger, False), (both.inner[0], True)]):
        alone = CONNECTORS["patch_merger"]({"norm_after": after}, 3, 4)
        alone.merger.load_state_dict(merger.state_dict())
        level, wanted = slice(3 * number, 3 * number + 3), slice(4 * number, 4 * number + 4)
        assert torch.equal(both(features, grids)[:, wanted], alone(features[:, level], grids))
    with pytest.raises(ValueError, match="levels 4 divides neither or only one of 6"):
        CONNECTORS["patch_merger"]({"levels": 4}, 6, 8)


@pytest.mark.parametrize("name", ["average_pool", "c_abstractor"])
def test_the_same_weights_serve_another_number_of_tokens(name: str) -> None:
    connector = made(name, SPECS[name][0])
    assert connector.RELOADABLE == ("visual_tokens",)
    other = CONNECTORS[name]({**connector.spec, "visual_tokens": 9}, 6, 8)
    other.load_state_dict(connector.state_dict())
    assert len(other(cells([(4, 5)]), [(4, 5)])) == 9


REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "average_pool": [({"visual_token": 4}, "did you mean 'visual_tokens'")]
    + [({"visual_tokens": bad}, "square number") for bad in (None, 0, -4, 5, 4.0, "4")],
    "c_abstractor": [
        ({"dept": 2}, "did you mean 'depth'"),
        ({"visual_tokens": 10}, "visual_tokens must be a square number"),
        ({"depth": 0}, "depth must be a whole number greater than 0, got 0"),
        ({"hidden": 2.0}, "hidden must be a whole number greater than 0, got 2.0"),
    ],
    "gemma3": [
        ({"visual_token": 4}, "did you mean 'visual_tokens'"),
        ({"visual_tokens": 8}, "visual_tokens must be a square number"),
        ({"eps": 0}, "eps must be a number above 0, got 0"),
    ],
    "linear": [({"hidden": 3}, "unknown option of the connector Linear 'hidden'")],
    "mlp": [({"hiden": 3}, "did you mean 'hidden'")],
    "patch_merger": [
        ({"factor": 0}, "factor must be a whole number"),
        ({"norm": "batch"}, r"norm must be layer \| rms, got 'batch'"),
        ({"norm_after": 1}, "norm_after must be true or false, got 1"),
    ],
    "pixel_shuffle": [
        ({"facto": 2}, "did you mean 'factor'"),
        ({"factor": True}, "factor must be a whole number greater than 0, got True"),
        ({"layers": 3}, "layers must be 1 or 2, got 3"),
        ({"layers": 1, "hidden": 4}, "hidden is the width between two layers"),
        ({"layers": 1, "bias": 0}, "bias must be true or false, got 0"),
        ({"bias": False}, "bias: false needs layers: 1"),
    ],
    "q_former": [
        ({"head": 3}, "did you mean 'heads'"),
        ({"text": 1}, "text must be true or false, got 1"),
        ({"path": "a/b", "depth": 3}, "path brings its own depth; leave out depth"),
        ({"hidden": 10, "heads": 4}, "hidden 10 cannot be divided among 4 heads"),
        ({"inner": -1}, "inner must be a whole number greater than 0, got -1"),
    ],
    "resampler": [
        ({"head_with": 3}, "did you mean 'head_width'"),
        ({"visual_tokens": "64"}, "visual_tokens must be a whole number greater than 0, got '64'"),
    ],
}


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_wrong_options_are_refused(name: str, spec: dict[str, Any], message: str) -> None:
    assert set(REFUSED) == set(CONNECTORS)
    with pytest.raises(ValueError, match=message):
        CONNECTORS[name].check(spec)


@pytest.mark.parametrize("name", ["average_pool", "c_abstractor"])
def test_more_tokens_than_cells_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="5 x 5 grid, but the encoder gives 6 x 4 cells"):
        CONNECTORS[name].output_grid({"visual_tokens": 25}, (6, 4))
    with pytest.raises(ValueError, match="2 x 2 grid, but the encoder gives 3 x 1 cells"):
        made(name, {"visual_tokens": 4})(cells([(4, 4), (3, 1)]), [(4, 4), (3, 1)])
    narrow = made(name, {"visual_tokens": 4})(cells([(4, 4), (9, 1)]), [(4, 4), (9, 1)])
    assert narrow.shape == (8, 8)
