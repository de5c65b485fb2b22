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
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from mllm.models.checks import read_config
from mllm.models.composites import writing
from mllm.models.composites.base import Composite
from mllm.models.composites.folder import (
    Names,
    body_and_head,
    build,
    check_language,
    read_weights,
    save,
)
from mllm.models.composites.text import check_token, named_token, read_tokenizer
from mllm.models.config import MultimodalConfig
from mllm.models.connectors.gemma3 import Gemma3Projector
from mllm.models.encoders.siglip import SiglipEncoder
from mllm.models.families import LogitsRule, logits_rule
from mllm.models.geometry import ImageGeometry
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.models.template import ImageText
from mllm.parts.option import chosen

_OURS, _THEIRS = "connector.second.weight", "model.multi_modal_projector.mm_input_projection_weight"
"""The matrix: ours as `nn.Linear` has it, theirs the other way round."""


def read(
    path: str | Path, dtype: torch.dtype | str, weights: bool = True
) -> tuple[MultimodalModel, Processor]:
    """From its folder to our model."""
    config: Any = read_config("model", path)
    text = copy.deepcopy(config.text_config)
    check_language(text, path)
    if logits_rule(text) != LogitsRule():
        raise ValueError(
            f"{path}: final_logit_softcapping is set, which the class with images does not apply"
        )
    spec = SiglipEncoder.spec_from_folder(path, layer=-1)
    _check_pooling(spec["geometry"]["cells"], config.mm_tokens_per_image, str(path))
    tokenizer, token = read_tokenizer(path, config.image_token_id, asked_id=config.boi_token_index)
    check_token(token, named_token(tokenizer, "image_token", path), path)
    start, end = (named_token(tokenizer, name, path) for name in ("boi_token", "eoi_token"))
    connector = {
        "name": "gemma3",
        "visual_tokens": config.mm_tokens_per_image,
        "eps": config.vision_config.layer_norm_eps,
    }
    geometry = ImageGeometry.from_dict(spec["geometry"])
    image_text = ImageText(start, f"\n\n{start}{token}{end}\n\n")
    processor = Processor(tokenizer, geometry, connector, token, {}, image_text)
    saved = read_weights(path, Gemma3ForConditionalGeneration, dtype, weights)
    text.tie_word_embeddings = saved.tied
    ours = MultimodalConfig(
        encoder={"name": "siglip", **spec},
        connector=connector,
        text_config=text,
        image_token=token,
        image_token_id=config.image_token_id,
        origin=GEMMA3.name,
        bidirectional_images=True,
    )
    saved.weights[_OURS] = saved.weights.pop(_THEIRS).T.contiguous()
    return build(ours, processor, saved, _names(text)), processor


def write(model: MultimodalModel, processor: Processor, folder: Path) -> None:
    """From our model to its folder."""
    _check(model)
    named = _named_tokens(processor)
    tokenizer: Any = processor.tokenizer
    square, tokens = model.encoder.square, writing.tokens_of_view(model)
    config = Gemma3Config(
        vision_config=writing.vision_values(model),
        text_config=writing.text_values(model),
        mm_tokens_per_image=tokens,
        image_token_index=processor.image_token_id,
        boi_token_index=tokenizer.convert_tokens_to_ids(named["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(named["eoi_token"]),
        tie_word_embeddings=writing.embedding_is_output(model),
    )
    weights: dict[str, Tensor] = model.state_dict()
    weights[_THEIRS] = weights.pop(_OURS).T.contiguous()
    names = _names(model.config.text_config)
    save(Gemma3ForConditionalGeneration, config, model, names, folder, weights)
    seen = {
        **writing.pixels_of(square, "gemma3"),
        "image_processor_type": "Gemma3ImageProcessor",
    }
    writing.write_processor(
        processor, named, "Gemma3Processor", seen, folder, image_seq_length=tokens
    )


def _names(text: Any) -> Names:
    return [
        ("encoder.vision.", "model.vision_tower."),
        ("connector.norm.", "model.multi_modal_projector.mm_soft_emb_norm."),
        *body_and_head(text, Gemma3ForConditionalGeneration),
    ]


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
    _check_pooling(
        model.encoder.square.cells, Gemma3Projector.number(spec, "visual_tokens"), "gemma3"
    )
    eps, own = (
        chosen(Gemma3Projector.OPTIONS, spec, "eps"),
        writing.vision_values(model)["layer_norm_eps"],
    )
    if eps != own:
        raise ValueError(
            f"gemma3 cannot hold the connector's eps {eps}: it is that of the tower there, {own}"
        )
    writing.check_tiling(model, "gemma3", "none")
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
    writing.check_begin(processor, "gemma3")
    asked, written, _ = processor.template.image_text
    before, after = written.split(processor.image_token)
    start, end = before.removeprefix("\n\n"), after.removesuffix("\n\n")
    vocabulary = processor.tokenizer.get_vocab()
    fits = before == f"\n\n{start}" and after == f"{end}\n\n" and asked == start
    if not fits or not all(
        processor.template.is_special(vocabulary.get(t, -1)) for t in (start, end)
    ):
        raise ValueError(
            f"gemma3 cannot hold {written!r} for an image: its processor writes an empty line, a "
            "start token, the image, an end token and an empty line for the start token"
        )
    return {"image_token": processor.image_token, "boi_token": start, "eoi_token": end}


GEMMA3 = Composite("gemma3", read, write)
