"""Connectors by name."""

from mllm.models.connectors.average_pool import AveragePool
from mllm.models.connectors.base import Connector
from mllm.models.connectors.c_abstractor import CAbstractor
from mllm.models.connectors.gemma3 import Gemma3Projector
from mllm.models.connectors.linear import Linear
from mllm.models.connectors.mlp import Mlp
from mllm.models.connectors.patch_merger import PatchMerger
from mllm.models.connectors.pixel_shuffle import PixelShuffle
from mllm.models.connectors.pretrained import PretrainedConnector
from mllm.models.connectors.q_former import QFormer
from mllm.models.connectors.resampler import Resampler

CONNECTORS: dict[str, type[Connector]] = {
    "average_pool": AveragePool,
    "c_abstractor": CAbstractor,
    "gemma3": Gemma3Projector,
    "linear": Linear,
    "mlp": Mlp,
    "patch_merger": PatchMerger,
    "pixel_shuffle": PixelShuffle,
    "q_former": QFormer,
    "resampler": Resampler,
}

__all__ = ["CONNECTORS", "Connector", "PixelShuffle", "PretrainedConnector"]
