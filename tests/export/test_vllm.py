"""What vLLM's Transformers modelling backend asks of a model, requirement by requirement.

docs/export.md says where each stands in vLLM. vLLM itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor

from mllm.export.transformers import export
from tests.models.families import FAMILIES, save_family

ASSEMBLIES: dict[str, dict[str, Any]] = {
    "one": {},
    "any_resolution": {"images": {"tiling": "any_resolution"}},
    "dynamic": {"images": {"tiling": "dynamic", "tiles": 6}},
    "split": {"images": {"tiling": "split", "longest_edge": 96}},
    "native pixels": {"encoder": "qwen2_5_vl", "connector": "patch_merger"},
    "native patches": {"encoder": "siglip2_naflex", "connector": "pixel_shuffle"},
}
SIZES = ((40, 56), (90, 30), (32, 200))


@pytest.fixture(params=ASSEMBLIES)
def folder(request: pytest.FixtureRequest, build: Callable[..., Any], tmp_path: Path) -> Path:
    model, processor = build(**ASSEMBLIES[request.param])
    export(model, processor, tmp_path / "exported")
    return tmp_path / "exported"


def load(kind: Any, folder: Path, **options: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, **options)


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def test_the_base_model_is_found_and_built_from_the_configuration(folder: Path) -> None:
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    assert list(names) == ["AutoConfig", "AutoModel", "AutoModelForImageTextToText"]
    config = load(AutoConfig, folder)
    assert config is not config.get_text_config()  # how a multimodal model is told
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=True)
    assert model.is_backend_compatible()
    assert model.base_model_prefix == "model"
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.get_decoder() is model.language_model
    assert model.get_encoder(modality="image") is model.vision_tower


def test_weights_are_named_as_the_modules_are(folder: Path) -> None:
    from safetensors import safe_open

    with torch.device("meta"):
        model = AutoModel.from_config(load(AutoConfig, folder), trust_remote_code=True)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    assert saved == {f"model.{name}" for name, _ in model.named_parameters()}  # the head is tied


def test_attention_can_be_replaced_and_gets_what_is_passed_down(folder: Path) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[Any] = []

    def attention(*args: Any, instances: Any = None, **kwargs: Any) -> Any:
        seen.append(instances)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("probe", attention)
    config = load(AutoConfig, folder)
    config.text_config._attn_implementation = "probe"
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    embeds = torch.zeros(1, 5, config.text_config.hidden_size)
    outputs = model(
        input_ids=None,
        inputs_embeds=embeds,
        use_cache=False,
        position_ids=torch.arange(5)[None],
        instances="passed",
        return_dict=False,
    )
    assert isinstance(outputs, tuple)
    assert outputs[0].shape == embeds.shape
    assert seen == ["passed"] * config.text_config.num_hidden_layers


def test_every_image_has_its_replacement_its_rows_and_its_tokens(folder: Path) -> None:
    processor = load(AutoProcessor, folder)
    images, text = pictures(), "<image>a<image>b<image>"
    found = processor(text=text, images=images, return_tensors="pt")
    offsets = processor(text=text, images=images, return_text_replacement_offsets=True)
    replacements = [one["replacement"] for one in offsets["text_replacement_offsets"][0]]
    ids = [processor.tokenizer(one, add_special_tokens=False)["input_ids"] for one in replacements]
    counted = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert list(map(len, ids)) == counted["num_image_tokens"]
    rows = counted["num_image_patches"]
    model = load(AutoModel, folder)
    key, *others = set(found) - {"pixel_values", "input_ids", "attention_mask"}
    assert not others
    assert found[key].shape[1:] == ((3,) if key == "image_grid_thw" else (2,))
    parts = {"pixel_values": found["pixel_values"].split(rows)}  # by the rows of each image
    parts[key] = found[key].split(1 if key == "image_grid_thw" else rows)
    if key == "image_grid_thw":
        assert found[key].prod(-1).tolist() == rows  # which vLLM takes instead
    together = model.get_image_features(
        found["pixel_values"], return_dict=True, **{key: found[key]}
    ).pooler_output
    assert len(together) == len(images)
    for number, (tokens, slot) in enumerate(zip(together, ids, strict=True)):
        mode = int(torch.tensor(slot).mode().values)
        assert mode == processor.image_token_id == model.config.image_token_id
        assert len(tokens) == slot.count(mode)
        alone = model.get_image_features(
            **{name: part[number] for name, part in parts.items()}
        ).pooler_output
        torch.testing.assert_close(alone[0], tokens, rtol=0, atol=1e-5)


def test_ids_of_the_placeholders_expand_to_the_processor_s_ids(folder: Path) -> None:
    """vLLM tokenises the text itself and puts the replacements into the ids."""
    processor = load(AutoProcessor, folder)
    text = "<|im_start|>user\n<image>a <image><image>b<|im_end|>\n"
    found = processor(text=text, images=pictures(), return_text_replacement_offsets=True)
    tokenizer = processor.tokenizer
    replacements = iter(one["replacement"] for one in found["text_replacement_offsets"][0])
    expanded: list[int] = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        image = token == processor.image_token_id
        texts = tokenizer(next(replacements), add_special_tokens=False) if image else None
        expanded += texts["input_ids"] if texts else [token]
    assert expanded == found["input_ids"][0]


def test_no_image_needs_more_tokens_than_the_size_that_is_named(folder: Path) -> None:
    processor = load(AutoProcessor, folder)
    size = processor.image_processor.size
    sides = [*range(1, 400, 23), 1000, 4000]
    tried = [(size["height"], size["width"]), *((one, two) for one in sides for two in sides)]
    most, *others = processor._get_num_multimodal_tokens(image_sizes=tried)["num_image_tokens"]
    assert max(others) <= most


@pytest.mark.parametrize("fusion", ["cross_attention", "deepstack"])
def test_what_it_has_no_way_for_says_so(
    fusion: str, build: Callable[..., Any], tmp_path: Path
) -> None:
    """It hands a model embeddings alone; what it is told decides between refusing and guessing."""
    export(*build(fusion=fusion), tmp_path / "exported")
    model = load(AutoModel, tmp_path / "exported")
    assert not model.is_backend_compatible()


def test_bounds_of_native_resolution_may_change(build: Callable[..., Any], tmp_path: Path) -> None:
    """The model asks for the grid of an image alone, which is told and not guessed."""
    export(*build(**ASSEMBLIES["native pixels"]), tmp_path / "exported")
    processor = load(AutoProcessor, tmp_path / "exported")
    model = load(AutoModel, tmp_path / "exported")
    counts = []
    for most in (2560, 8000):
        processor.image_processor.geometry["max_pixels"] = most
        found = processor(text="<image>a", images=pictures()[1:2], return_tensors="pt")
        assert model(**found).last_hidden_state.shape[:2] == found["input_ids"].shape
        counts.append(found["input_ids"].shape[1])
    assert counts[0] < counts[1]
    with pytest.raises(ValueError, match="need image_grid_thw"):
        model(input_ids=found["input_ids"], pixel_values=found["pixel_values"])
    found["image_grid_thw"][0, 2] += 2
    with pytest.raises(ValueError, match=r"rows, these images have"):
        model(**found)


def test_positions_in_three_directions_are_told_beforehand(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    """It asks with the grids that its cache has, and then hands over embeddings and positions."""
    text = save_family(tmp_path / "family", FAMILIES["qwen2_5_vl_text"])
    parts = {**ASSEMBLIES["native pixels"], "language_model": text}
    export(*build(**parts), tmp_path / "exported")
    model, processor = (load(kind, tmp_path / "exported") for kind in (AutoModel, AutoProcessor))
    assert "mrope_section" in model.config.get_text_config().rope_parameters
    found = processor(text="a<image>b<image>c", images=pictures()[:2], return_tensors="pt")
    ids, grids = found["input_ids"], found["image_grid_thw"]
    types = (ids == processor.image_token_id).int()
    positions, ahead = model.get_rope_index(
        input_ids=ids, image_grid_thw=grids, video_grid_thw=None, mm_token_type_ids=types
    )
    assert positions.shape == (3, *ids.shape)
    assert ahead.tolist() == [[int(positions.max()) + 1 - ids.shape[1]]]
    assert not torch.equal(positions[1], positions[2])
    tokens = torch.cat(
        model.get_image_features(found["pixel_values"], image_grid_thw=grids).pooler_output
    )
    embeds = model.get_input_embeddings()(ids).masked_scatter(types.bool()[..., None], tokens)
    states = model(inputs_embeds=embeds, position_ids=positions, use_cache=False)[0]
    torch.testing.assert_close(states, model(**found)[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="positions of image tokens need image_grid_thw"):
        model.get_rope_index(input_ids=ids)


@pytest.mark.parametrize("name", ["granite", "minicpm3", "cohere", "gemma2", "phi", "llama"])
def test_vllm_s_logits_are_the_family_s(
    name: str, build: Callable[..., Any], tmp_path: Path
) -> None:
    """It reads a scale and a cap from the text configuration and applies them to its own head."""
    model, processor = build(language_model=save_family(tmp_path / "family", FAMILIES[name]))
    export(model, processor, tmp_path / "exported")
    exported = load(AutoConfig, tmp_path / "exported")
    text, numbers = exported.text_config, torch.tensor([-3.0, 0.5, 4.0])
    expected = model.lm_head.rule(numbers) if hasattr(model.lm_head, "rule") else numbers
    cap = getattr(text, "final_logit_softcapping", None)
    seen = numbers if cap is None else torch.tanh(numbers / cap) * cap
    torch.testing.assert_close(seen * getattr(text, "logit_scale", 1.0), expected)
