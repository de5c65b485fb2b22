"""Connectors: shapes, token counts and options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mllm.models.connectors import CONNECTORS, Connector

SPECS = {
    "mlp": [{}, {"hidden": 5}],
    "average_pool": [{"visual_tokens": 1}, {"visual_tokens": 4}, {"visual_tokens": 9, "hidden": 5}],
}


EACH = pytest.mark.parametrize(
    ("name", "spec"), [(name, spec) for name, specs in SPECS.items() for spec in specs]
)
RAGGED = [(4, 5), (3, 3), (6, 4), (4, 5), (3, 7), (3, 3)]


def gradients(connector: Connector, features: Tensor) -> list[Tensor]:
    """Of the features, then of every weight; they start anew."""
    assert features.grad is not None
    found = [features.grad, *(weight.grad for weight in connector.parameters())]
    features.grad = None
    connector.zero_grad()
    return found


@EACH
def test_views_of_different_grids_are_as_each_alone(name: str, spec: dict[str, int]) -> None:
    connector = CONNECTORS[name]({"name": name, **spec}, 6, 8)
    cells = [rows * columns for rows, columns in RAGGED]
    features = torch.randn(sum(cells), 6, requires_grad=True)
    counts = [connector.tokens_per_image(grid) for grid in RAGGED]
    weights = torch.randn(sum(counts), 8)

    together = connector(features, RAGGED)
    assert together.shape == (sum(counts), 8)
    (together * weights).sum().backward()
    found = gradients(connector, features)

    views = zip(features.split(cells), RAGGED, strict=True)
    alone = torch.cat([connector(view, [grid]) for view, grid in views])
    (alone * weights).sum().backward()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    for one, other in zip(found, gradients(connector, features), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@EACH
def test_weights_run_once_whatever_the_views_are(name: str, spec: dict[str, int]) -> None:
    connector = CONNECTORS[name]({"name": name, **spec}, 6, 8)
    calls: list[str] = []
    for part, module in connector.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, part=part: calls.append(part))
    seen = []
    for grids in ([(4, 4)], [(4, 4)] * 5, RAGGED):
        connector(torch.randn(sum(rows * columns for rows, columns in grids), 6), grids)
        seen.append([*calls])
        calls.clear()
    assert seen[0]
    assert seen[0] == seen[1] == seen[2]


@EACH
def test_tokens_are_as_many_as_promised(name: str, spec: dict[str, int]) -> None:
    assert set(SPECS) == set(CONNECTORS)
    connector = CONNECTORS[name]({"name": name, **spec}, 6, 8)
    tokens = connector(torch.randn(3 * 20, 6), [(4, 5)] * 3)
    assert tokens.shape == (3 * connector.tokens_per_image((4, 5)), 8)
    rows, columns = CONNECTORS[name].output_grid(spec, (4, 5))
    assert rows * columns == connector.tokens_per_image((4, 5))
    assert connector.last_linear().out_features == 8
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in connector.parameters())


def test_average_pool_averages_cells() -> None:
    connector = CONNECTORS["average_pool"]({"visual_tokens": 4}, 6, 8)
    features = torch.randn(16, 6)
    squares = features.reshape(2, 2, 2, 2, 6).mean(dim=(1, 3)).reshape(4, 6)
    wanted = connector.second(functional.gelu(connector.first(connector.norm(squares))))
    torch.testing.assert_close(connector(features, [(4, 4)]), wanted)


def test_wrong_options_are_refused() -> None:
    for tokens in (None, 0, -4, 5, 4.0, "4"):
        with pytest.raises(ValueError, match="square number"):
            CONNECTORS["average_pool"].check({"visual_tokens": tokens})
    with pytest.raises(ValueError, match="did you mean 'hidden'"):
        CONNECTORS["mlp"].check({"hiden": 3})
    with pytest.raises(ValueError, match="5 x 5 grid, but the encoder gives 4 x 4 cells"):
        CONNECTORS["average_pool"].output_grid({"visual_tokens": 25}, (4, 4))
