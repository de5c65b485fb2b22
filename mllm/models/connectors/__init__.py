"""Connectors by name."""

from mllm.models.connectors.average_pool import AveragePool
from mllm.models.connectors.base import Connector
from mllm.models.connectors.mlp import Mlp

CONNECTORS: dict[str, type[Connector]] = {"average_pool": AveragePool, "mlp": Mlp}

__all__ = ["CONNECTORS", "Connector"]
