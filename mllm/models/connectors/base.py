"""What every connector is: features of the encoder in, visual tokens of the language model out.

Shapes: V views, C cells of all views, Dv features of a cell, M visual tokens of a view (each may
have another number), D hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mllm.models.errors import check_options
from mllm.parts.option import Option, chosen, problems


class Connector(nn.Module, ABC):
    """From features [C, Dv] of views, each a grid, to their visual tokens [sum M, D].

    It is called once per micro-step, and so is each part of it that has weights, whatever the views
    are: where weights are sharded every call gathers them, and all ranks must call as often. So
    weights are applied to all cells or tokens at once; only what has none goes from view to view.

    Args:
        spec: its options by name; stored in the model's config.json.
        features: Dv.
        width: D, the language model's hidden size.

    Attributes:
        OPTIONS: what a recipe may set, by name; declared in mllm/parts/connectors.py.
        RELOADABLE: the options that may change when saved weights are loaded.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    RELOADABLE: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.RELOADABLE = tuple(name for name, option in cls.OPTIONS.items() if option.reloadable)

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__()
        self.check(spec)
        self.spec = dict(spec)

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse options that make no sense.

        Raises:
            ValueError: an unknown option, a bad value or none where one is needed.
        """
        options = {name: value for name, value in spec.items() if name != "name"}
        check_options(options, cls.OPTIONS, f"the connector {cls.__name__}")
        for _, problem in problems(cls.OPTIONS, options):
            raise ValueError(f"connector {spec.get('name', cls.__name__)}: {problem}")

    @classmethod
    def number(cls, spec: Mapping[str, Any], name: str, otherwise: int = 0) -> int:
        """Return a whole number of the options, its default (else `otherwise`) if not given."""
        value = chosen(cls.OPTIONS, spec, name)
        return otherwise if value is None else int(value)

    @classmethod
    def check_side(cls, spec: Mapping[str, Any], cells: int) -> None:
        """Refuse options for which the longest side of any view has too few cells.

        Raises:
            ValueError: saying what is possible.
        """

    @classmethod
    @abstractmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of the visual tokens, without building the module.

        Raises:
            ValueError: the options do not fit the grid.
        """

    @classmethod
    def reads_text(cls, spec: Mapping[str, Any]) -> bool:
        """Return whether it is also given what is asked about each view; see `QFormer.forward`."""
        return False

    @abstractmethod
    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Map the cells [C, Dv] of views to their tokens [sum M, D].

        Args:
            features: one view after another, row by row of its grid.
            grids: (rows, columns) of each view; C is the sum of their products.
        """

    @abstractmethod
    def last_linear(self) -> nn.Linear:
        """Return the last linear layer, which a closed-form start solves for."""

    def input_norm(self) -> nn.LayerNorm | None:
        """Return the norm that the encoder's features pass first, if there is one."""
        return None

    def tokens_per_image(self, grid: tuple[int, int]) -> int:
        """Return M for a view with this feature grid."""
        rows, columns = self.output_grid(self.spec, grid)
        return rows * columns
