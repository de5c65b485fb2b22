"""Gemma 3 with images (Gemma Team 2025, arXiv 2503.19786), `Gemma3ForConditionalGeneration`.

SigLIP with its last norm, the projector `gemma3`, Gemma 3's own language model. The tokens of an
image see each other in both directions. In the text an image stands between `<start_of_image>`,
`<end_of_image>` and empty lines. Its further views of long images (pan and scan) are off by default
there and are not made here.
"""

from __future__ import annotations

import copy
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from mllm.models.composites import writing
from mllm.models.composites.base import Composite
from mllm.models.composites.reading import (
    Looks,
    Whole,
    join,
    read_config,
    read_model,
    read_tokenizer,
    special_text,
)
from mllm.models.connectors.options import whole as number
from mllm.models.encoders.siglip import SiglipEncoder
from mllm.models.families import LogitsRule, logits_rule
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.template import ImageText

_PROJECTOR, _TOWER = "model.multi_modal_projector.", "model.vision_tower."
_NORM, _MATRIX = "mm_soft_emb_norm.weight", "mm_input_projection_weight"


def read(path: str | Path, dtype: torch.dtype | str) -> tuple[MultimodalModel, Processor]:
    """Read their folder; see `Composite`."""
    config: Any = read_config(path, Gemma3Config)
    if logits_rule(config.text_config) != LogitsRule():
        raise ValueError(
            f"{path}: final_logit_softcapping is set, which the class with images does not apply"
        )
    spec = SiglipEncoder.spec_from_folder(path, layer=-1)
    _check_pooling(spec["geometry"]["cells"], config.mm_tokens_per_image, str(path))
    tokenizer = read_tokenizer(path)
    token, start, end = (
        special_text(tokenizer, name, path) for name in ("image_token", "boi_token", "eoi_token")
    )
    looks = Looks(
        encoder={"name": "siglip", **spec},
        connector={
            "name": "gemma3",
            "visual_tokens": config.mm_tokens_per_image,
            "eps": config.vision_config.layer_norm_eps,
        },
        images={},
        image_token=token,
        image_text=ImageText(start, f"\n\n{start}{token}{end}\n\n"),
    )
    theirs = read_model(path, Gemma3ForConditionalGeneration, dtype)
    projector = theirs.model.multi_modal_projector.state_dict()
    parts = Whole(
        origin="gemma3",
        vision=theirs.model.vision_tower,
        body=theirs.model.language_model,
        head=theirs.lm_head,
        connector={
            "norm.weight": projector[_NORM],
            "second.weight": projector[_MATRIX].T.contiguous(),
        },
        generation=theirs.generation_config,
        image_id=config.image_token_id,
    )
    return join(parts, tokenizer, looks, bidirectional_images=True)


def write(model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """Write the folder of their class; see `Composite`."""
    _check(model)
    names = _named_tokens(processor)
    tensors, tied = writing.text_tensors(model, "model.language_model.")
    vision: Any = model.encoder.vision
    tensors |= {_TOWER + name: weight for name, weight in vision.state_dict().items()}
    connector: Any = model.connector
    tensors[_PROJECTOR + _NORM] = connector.norm.weight
    tensors[_PROJECTOR + _MATRIX] = connector.second.weight.T.contiguous()
    tower = copy.deepcopy(vision.config)
    tower._attn_implementation = None
    tower.dtype = model.dtype
    tokens = writing.tokens_of_view(processor)
    tokenizer: Any = processor.tokenizer
    config = Gemma3Config(
        vision_config=tower,
        text_config=writing.text_config(model, tied),
        mm_tokens_per_image=tokens,
        image_token_index=processor.image_token_id,
        boi_token_index=tokenizer.convert_tokens_to_ids(names["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(names["eoi_token"]),
        tie_word_embeddings=tied,
    )
    writing.write_model(Gemma3ForConditionalGeneration, config, tensors, model, folder)
    square = model.encoder.geometry
    seen = {
        **writing.pixels_of(square),
        "image_processor_type": "Gemma3ImageProcessor",
        "size": writing.squares_of(square.image_size),
    }
    writing.write_processor(
        tokenizer, names, "Gemma3Processor", seen, folder, image_seq_length=tokens
    )


def _check(model: MultimodalModel) -> None:
    """Refuse what the class cannot hold.

    Raises:
        ValueError: naming the part and the reason.
    """
    writing.check_encoder(model, "gemma3", "siglip")
    if model.encoder.spec["layer"] != -1:
        raise ValueError(
            f"gemma3 cannot hold encoder layer {model.encoder.spec['layer']}: it normalises after "
            "the last layer, so layer: -1 is needed"
        )
    spec = writing.check_connector(model, "gemma3", "gemma3")
    _check_pooling(model.encoder.geometry.cells, number(spec, "visual_tokens", 256), "gemma3")
    eps, own = model.connector.norm.eps, model.encoder.vision.config.layer_norm_eps
    if eps != own:
        raise ValueError(
            f"gemma3 cannot hold the connector's eps {eps}: it is that of the tower there, {own}"
        )
    writing.check_tiling(model, "gemma3", "")
    if not isinstance(model.config.text_config, Gemma3TextConfig):
        raise ValueError(
            f"gemma3 cannot hold the language model {model.config.text_config.model_type}: its own "
            "is gemma3_text"
        )
    if not model.config.bidirectional_images:
        raise ValueError(
            "gemma3 cannot hold images whose tokens see the past alone: there they see each other "
            "in both directions"
        )
    writing.check_language_model(model, "gemma3")


def _check_pooling(cells: int, tokens: int, where: str) -> None:
    """Refuse a pooling that does not take whole cells.

    Raises:
        ValueError: the side of the tokens does not divide the side of the cells.
    """
    side = isqrt(tokens)
    if side**2 != tokens or cells % side:
        raise ValueError(
            f"{where}: {tokens} tokens of an image cannot be averages of whole squares of its "
            f"{cells} x {cells} cells"
        )


def _named_tokens(processor: Processor) -> dict[str, str]:
    """Return the tokens under the names by which the processor looks them up.

    Raises:
        ValueError: the text of an image is not the one that the processor writes.
    """
    asked, written = processor.template.image_text
    before, after = written.split(processor.image_token)
    start, end = before.removeprefix("\n\n"), after.removesuffix("\n\n")
    vocabulary = processor.tokenizer.get_vocab()
    fits = before == f"\n\n{start}" and after == f"{end}\n\n" and asked == start
    if not fits or not all(processor.template.is_special(vocabulary.get(t, -1)) for t in (start, end)):
        raise ValueError(
            f"gemma3 cannot hold {written!r} for an image: its processor writes an empty line, a "
            "start token, the image, an end token and an empty line for the start token"
        )
    return {"image_token": processor.image_token, "boi_token": start, "eoi_token": end}


GEMMA3 = Composite("gemma3", read, write)
