"""BLIP-2's Q-Former: a BERT whose learned queries read the cells (arXiv 2301.12597, section 3.1).

The transformer is transformers' own, and weights have the names of a BLIP-2 folder, so published
ones load as they are. Its queries read the class token where the encoder makes it a cell, as
`blip2` does unless `class_cell: false`; other encoders leave it out. Two things differ: dropout is
off (a random mask would make a packed step differ from an unpacked one), and new queries start at a
normal of 0.02 as in the authors' code (transformers starts them at zero, where queries that are
alike stay alike).

With `text` the queries also read what is asked about the image, as InstructBLIP's do (arXiv
2305.06500, section 2.3): its tokens stand beside the queries in self-attention, and have MLPs of
their own. Unlike there they are not those of a BERT: they are the language model's own embeddings,
through a new projection, so that no second tokenizer and no second vocabulary is needed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2QFormerConfig, Blip2QFormerModel

from mllm.models.checks import read_config
from mllm.models.connectors.cells import sequences
from mllm.models.connectors.pretrained import PretrainedConnector, read_weights
from mllm.models.errors import check_folder
from mllm.parts import CONNECTORS

NAMES = {
    "hidden": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "cross_every": "cross_attention_frequency",
}
"""Option → its name in Blip2QFormerConfig."""

LONGEST_TEXT = 512
"""Tokens of a question that are read; what comes after them is not."""

_TEXT_MLP = re.compile(r"(qformer\.encoder\.layer\.\d+\.)(intermediate|output)\.(.*)")
_KEPT = ("query_tokens", "qformer.", "language_projection.")


class QFormer(PretrainedConnector):
    """`visual_tokens` tokens per view, whatever its grid.

    With `path` it starts from a BLIP-2's weights. The projection is taken over too if it leads to a
    language model of the same width, else it starts anew.
    """

    OPTIONS = CONNECTORS["q_former"].options

    def __init__(self, spec: Mapping[str, Any], features: int, width: int) -> None:
        super().__init__(spec, features, width)
        sizes: dict[str, Any] = {name: self.number(spec, option) for option, name in NAMES.items()}
        config = Blip2QFormerConfig(
            **sizes,
            encoder_hidden_size=features,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            use_qformer_text_input=self.reads_text(spec),
        )
        queries = self.number(spec, "visual_tokens")
        self.query_tokens = nn.Parameter(torch.empty(1, queries, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        self.qformer = Blip2QFormerModel._from_config(config, attn_implementation="sdpa")
        self.language_projection = nn.Linear(config.hidden_size, width)
        if self.reads_text(spec):
            self.text_projection = nn.Linear(width, config.hidden_size)
            self.text_positions = nn.Embedding(LONGEST_TEXT, config.hidden_size)
            nn.init.normal_(self.text_positions.weight, std=config.initializer_range)

    @classmethod
    def check(cls, spec: Mapping[str, Any]) -> None:
        """Refuse sizes beside a path, and heads that do not divide the width."""
        super().check(spec)
        given = [name for name in ("visual_tokens", *NAMES) if spec.get(name) is not None]
        if spec.get("path") is not None and given:
            raise ValueError(
                f"connector q_former: path brings its own {given[0]}; leave out {', '.join(given)}"
            )
        hidden, heads = cls.number(spec, "hidden"), cls.number(spec, "heads")
        if hidden % heads:
            raise ValueError(
                f"connector q_former: hidden {hidden} cannot be divided among {heads} heads"
            )

    @classmethod
    def output_grid(cls, spec: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int]:
        """Return one row of all queries."""
        return (1, cls.number(spec, "visual_tokens"))

    @classmethod
    def reads_text(cls, spec: Mapping[str, Any]) -> bool:
        """Return whether the option `text` says so."""
        return bool(spec.get("text"))

    def forward(
        self,
        features: Tensor,
        grids: Sequence[tuple[int, int]],
        text: Tensor | None = None,
        said: Tensor | None = None,
    ) -> Tensor:
        """Map [C, Dv] to [V x Q, D].

        Args:
            features, grids: as `Connector.forward`.
            text: [V, L, D], token embeddings of what is asked about each view.
            said: bool [V, L], where `text` holds a token.
        """
        padding = sequences(grids, features.device)
        mask = padding.mask()
        queries, sees = self.query_tokens.expand(len(grids), -1, -1), None
        count = queries.shape[1]
        if text is not None and said is not None:
            text, said = text[:, :LONGEST_TEXT], said[:, :LONGEST_TEXT]
            places = torch.arange(text.shape[1], device=text.device)
            words = self.text_projection(text) + self.text_positions(places)
            queries = torch.cat([queries, words], dim=1)
            sees = torch.cat([said.new_ones(len(grids), count), said], dim=1).long()
        states: Tensor = self.qformer(
            query_embeds=queries,
            query_length=count,
            attention_mask=sees,
            encoder_hidden_states=padding.spread(features).flatten(1, 2),
            encoder_attention_mask=None if mask is None else mask.long(),
        ).last_hidden_state
        tokens: Tensor = self.language_projection(states[:, :count].flatten(0, 1))
        return tokens

    def last_linear(self) -> nn.Linear:
        """Return the projection to the language model's width."""
        return self.language_projection

    @classmethod
    def spec_from_folder(cls, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Return the spec with the sizes of the folder's config.json instead of its path."""
        cls.check(spec)
        path = spec["path"]
        check_folder(path, "connector q_former")
        config = read_config("connector", path)
        if not isinstance(config, Blip2Config):
            raise ValueError(f"{path} holds a {config.model_type!r} model, not a BLIP-2")
        bert = config.qformer_config
        plain = Blip2QFormerConfig()
        for name in ("hidden_act", "layer_norm_eps"):
            if getattr(bert, name) != getattr(plain, name):
                raise ValueError(
                    f"{path}: a Q-Former with {name} {getattr(bert, name)} is not supported, only "
                    f"{getattr(plain, name)}"
                )
        sizes = {option: getattr(bert, name) for option, name in NAMES.items()}
        kept = {name: value for name, value in spec.items() if name != "path"}
        return {**kept, "visual_tokens": config.num_query_tokens, **sizes}

    def load_weights(self, path: str | Path) -> None:
        """Load queries, Q-Former and, if it fits, the projection."""
        found, own = read_weights(path, _KEPT), self.state_dict()
        last = "language_projection."
        kept = {name: value for name, value in found.items() if name in own}
        if any(kept[name].shape != own[name].shape for name in kept if name.startswith(last)):
            logging.getLogger(__name__).warning(
                "%s: its projection does not lead to this language model's width, %d; "
                "a new one starts at random",
                path,
                self.language_projection.out_features,
            )
            kept = {name: value for name, value in kept.items() if not name.startswith(last)}
        if self.reads_text(self.spec):
            kept = self._with_text(kept, own)
        for name, value in own.items():
            if name not in kept and not name.startswith(last):
                raise ValueError(f"{path}: the weight {name} is missing")
            if name in kept and kept[name].shape != value.shape:
                raise ValueError(
                    f"{path}: {name} is {list(kept[name].shape)}, but {list(value.shape)} is "
                    "needed: is this the encoder that the Q-Former was trained with?"
                )
        self.load_state_dict(kept, strict=False)

    @staticmethod
    def _with_text(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add what a Q-Former without text lacks: its MLPs start as those of the queries."""
        result = dict(found)
        for name, value in own.items():
            if name not in result and name.startswith("text_"):
                result[name] = value
            elif name not in result and (part := _TEXT_MLP.match(name)):
                twin = f"{part[1]}{part[2]}_query.{part[3]}"
                if twin in result:
                    result[name] = result[twin].clone()
        return result
