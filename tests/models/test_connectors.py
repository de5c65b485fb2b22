"""Connectors: shapes, token counts and options."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mllm.models.connectors import CONNECTORS

SPECS = {
    "mlp": [{}, {"hidden": 5}],
    "average_pool": [{"visual_tokens": 1}, {"visual_tokens": 4}, {"visual_tokens": 9, "hidden": 5}],
}


@pytest.mark.parametrize(
    ("name", "spec"), [(name, spec) for name, specs in SPECS.items() for spec in specs]
)
def test_tokens_are_as_many_as_promised(name: str, spec: dict[str, int]) -> None:
    assert set(SPECS) == set(CONNECTORS)
    connector = CONNECTORS[name]({"name": name, **spec}, 6, 8)
    features = torch.randn(3, 20, 6)
    tokens = connector(features, (4, 5))
    assert tokens.shape == (3, connector.tokens_per_image((4, 5)), 8)
    rows, columns = CONNECTORS[name].output_grid(spec, (4, 5))
    assert rows * columns == tokens.shape[1]
    assert connector.last_linear().out_features == 8
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in connector.parameters())


def test_average_pool_averages_cells() -> None:
    connector = CONNECTORS["average_pool"]({"visual_tokens": 4}, 6, 8)
    features = torch.randn(1, 16, 6)
    squares = features.reshape(2, 2, 2, 2, 6).mean(dim=(1, 3)).reshape(1, 4, 6)
    wanted = connector.second(functional.gelu(connector.first(connector.norm(squares))))
    torch.testing.assert_close(connector(features, (4, 4)), wanted)


def test_wrong_options_are_refused() -> None:
    for tokens in (None, 0, -4, 5, 4.0, "4"):
        with pytest.raises(ValueError, match="square number"):
            CONNECTORS["average_pool"].check({"visual_tokens": tokens})
    with pytest.raises(ValueError, match="did you mean 'hidden'"):
        CONNECTORS["mlp"].check({"hiden": 3})
    with pytest.raises(ValueError, match="5 x 5 grid, but the encoder gives 4 x 4 cells"):
        CONNECTORS["average_pool"].output_grid({"visual_tokens": 25}, (4, 4))
