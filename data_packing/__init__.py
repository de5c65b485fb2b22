"""From files to packs: reading, sharding, indexing, planning, packing and loading.

Reading order: document.py, formats/, sample.py, shards.py, costing.py, index.py, corpus.py,
mixture.py, packing.py, balance.py, plan.py, account.py, loss_weights.py, pack.py, loader.py,
workers.py.
Nothing here knows the model. It is handed `cost(document)` for the index and `encode(document)` for
the loader. Only pack.py, loader.py and workers.py import torch; everything that plans runs without
it. For people who look at data: info.py, lint.py and preview.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_packing.balance import PackCost
    from data_packing.document import Document, Image, Text
    from data_packing.images import DocumentError
    from data_packing.index import Index, build_index
    from data_packing.ledger import Ledger, Refusal
    from data_packing.loader import Loader
    from data_packing.loss_weights import Weighting
    from data_packing.pack import Pack, collate
    from data_packing.packing import pack_lengths
    from data_packing.plan import Plan
    from data_packing.planned import Cursor
    from data_packing.sample import Cost, ImageSlot, Sample
    from data_packing.sharding import write_shards

_HOMES = {
    "Cost": "sample",
    "Cursor": "planned",
    "Document": "document",
    "DocumentError": "images",
    "Image": "document",
    "ImageSlot": "sample",
    "Index": "index",
    "Ledger": "ledger",
    "Loader": "loader",
    "Pack": "pack",
    "PackCost": "balance",
    "Plan": "plan",
    "Refusal": "ledger",
    "Sample": "sample",
    "Text": "document",
    "Weighting": "loss_weights",
    "build_index": "index",
    "collate": "pack",
    "pack_lengths": "packing",
    "write_shards": "sharding",
}

__all__ = [
    "Cost",
    "Cursor",
    "Document",
    "DocumentError",
    "Image",
    "ImageSlot",
    "Index",
    "Ledger",
    "Loader",
    "Pack",
    "PackCost",
    "Plan",
    "Refusal",
    "Sample",
    "Text",
    "Weighting",
    "build_index",
    "collate",
    "pack_lengths",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for (keeps torch out)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'data_packing' has no attribute {name!r}")
    return getattr(import_module(f"data_packing.{_HOMES[name]}"), name)
