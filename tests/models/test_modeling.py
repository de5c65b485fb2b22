"""The assembled model: counts, frozen parts, dummy images, generation, saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import mllm  # noqa: F401  (registers the Auto classes)
from data_packing.document import Document, Text
from data_packing.pack import Pack, collate, join_views
from mllm.models.assemble import load
from mllm.models.config import MultimodalConfig
from mllm.models.fusion import FUSIONS
from mllm.models.images import Images
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.conftest import chat, documents, open_gates, picture, save_language_model

ENCODERS = ("clip", "siglip", "efficientnet_lite")
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def packed(processor: Processor, chosen: list[Document] | None = None) -> Pack:
    return collate([processor.encode(one) for one in chosen or documents()], 0)


def run(model: MultimodalModel, pack: Pack) -> torch.Tensor:
    return model.hidden_states(pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens)


# -- image tokens and features ---------------------------------------------------------------------


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_mismatch_of_tokens_and_features_says_the_counts(
    build: Callable[..., Any], images: int
) -> None:
    model, processor = build("clip", "average_pool")
    pack = packed(processor, [chat(1), chat(2)])
    views = {
        "pixels": pack.pixels[: 3 * 32 * 32].repeat(images),
        "sizes": pack.sizes[:1].repeat(images, 1),
    }
    with pytest.raises(
        ValueError, match=rf"8 image tokens, but {images} views .* {4 * images} vis"
    ):
        run(model, replace(pack, **views))
    with pytest.raises(ValueError, match="8 image tokens, but 0 views"):
        model.hidden_states(pack.input_ids)
    with pytest.raises(ValueError, match="pixels and sizes go together"):
        model.hidden_states(pack.input_ids, pack.pixels)


def test_visual_tokens_stand_where_the_image_was(build: Callable[..., Any]) -> None:
    model, processor = build("clip", "average_pool")
    sample = processor.encode(documents()[1])
    ids = torch.from_numpy(sample.input_ids)[None]
    views = join_views(sample.pixels)
    embeds = model._fuse(ids, Images(*views)).embeds[0]
    tokens = model.image_features(*views).unflatten(0, (len(sample.slots), -1))
    for slot, wanted in zip(sample.slots, tokens, strict=True):
        torch.testing.assert_close(embeds[slot.start : slot.start + slot.length], wanted)
    text = ids[0] != processor.image_token_id
    torch.testing.assert_close(embeds[text], model.get_input_embeddings()(ids[0][text]))


def test_bad_bounds_are_refused(build: Callable[..., Any]) -> None:
    model, processor = build()
    pack = packed(processor)
    tokens = len(pack.input_ids)
    for bounds in ([0, 5], [1, tokens], [0, 9, 9, tokens], [0]):
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            run(model, replace(pack, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)))
    with pytest.raises(ValueError, match="one row"):
        model.hidden_states(
            pack.input_ids[None],
            pack.pixels,
            pack.sizes,
            cu_seqlens=pack.cu_seqlens,
            attention_mask=torch.ones(1, tokens),
        )


# -- what every rank runs, and what nothing trains -------------------------------------------------


@every_fusion
@pytest.mark.parametrize("frozen", [True, False])
def test_a_pack_without_images_runs_the_vision_path(
    build: Callable[..., Any], frozen: bool, fusion: str
) -> None:
    model, processor = build("clip", "average_pool", fusion=fusion)
    open_gates(model)
    model.encoder.requires_grad_(not frozen)
    model.train()
    ran: list[str] = []
    for name in ("encoder", "connector"):
        part = getattr(model, name)
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    text = documents()[3]
    pack = packed(processor, [text])
    assert len(pack.pixels) == len(pack.sizes) == 0
    hidden = run(model, pack)
    assert ran == ["encoder", "connector"]
    (hidden.sum() + hidden.square().sum()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in grads:
        if name.startswith(("encoder", "connector", "fusion")):
            assert not grads[name].any(), name
    assert any(name.startswith("connector") for name in grads)
    assert any(name.startswith("encoder") for name in grads) != frozen
    assert {f"fusion.{name}" for name, _ in model.fusion.named_parameters()} <= grads.keys()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(model, pack), hidden.detach())
        ran.clear()
        model.hidden_states(pack.input_ids)
    assert ran == []


def test_hidden_states_are_given_and_attentions_refused(build: Callable[..., Any]) -> None:
    model, _ = build()
    ids = torch.arange(5, 12)[None]
    assert model(input_ids=ids).hidden_states is None
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    last = model.hidden_states(ids)
    assert len(states) == 3
    torch.testing.assert_close(states[-1], last)
    model.config.output_hidden_states = True
    assert len(model(input_ids=ids).hidden_states) == 3
    with pytest.raises(ValueError, match="output_attentions: attention keeps no weights here"):
        model(input_ids=ids, output_attentions=True)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_frozen_encoder_builds_no_graph_and_does_not_move(
    build: Callable[..., Any], encoder: str
) -> None:
    model, processor = build(encoder, "average_pool")
    model.train()
    model.encoder.requires_grad_(False)  # after train(), as a recipe may do it
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    seen: list[bool] = []
    model.encoder.register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad))
    run(model, packed(processor)).square().sum().backward()
    assert seen == [False]
    assert not any(module.training for module in model.encoder.modules())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    first = next(iter(model.connector.parameters()))
    assert first.grad is not None
    assert first.grad.any()


def test_batch_norm_statistics_stay_when_the_encoder_trains(build: Callable[..., Any]) -> None:
    model, processor = build("efficientnet_lite", "average_pool")
    model.train()
    norms = [m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    before = [norm.running_mean.clone() for norm in norms]
    run(model, packed(processor)).square().sum().backward()
    assert model.encoder.training
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert norm.weight.grad is not None


@every_fusion
def test_no_weight_is_read_outside_its_own_forward(build: Callable[..., Any], fusion: str) -> None:
    """As under ZeRO-3: outside its module's forward a weight is an empty tensor."""
    model, processor = build("clip", "average_pool", fusion=fusion)
    open_gates(model)
    pack = packed(processor)
    with torch.no_grad():
        expected = model.lm_head(run(model, pack))
    full = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter]

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(run(model, pack)), expected)


# -- generation ------------------------------------------------------------------------------------


def answers(model: MultimodalModel, processor: Processor, asked: list[Document]) -> list[str]:
    inputs = processor.prompts(asked)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :])


def questions() -> list[Document]:
    return [
        Document(chat(1).parts[:2]),
        Document((Text("Which room does it belong to?", "user"),)),
        Document((*chat(2).parts[:2], replace(picture(3), role="user"))),
        Document((picture(4),)),
    ]


@every_fusion
def test_left_padded_batches_answer_like_single_prompts(
    build: Callable[..., Any], fusion: str
) -> None:
    model, processor = build("clip", "average_pool", fusion=fusion)
    open_gates(model)
    model.generation_config.eos_token_id = None  # let every row run to the end
    alone = [answers(model, processor, [one])[0] for one in questions()]
    assert answers(model, processor, questions()) == alone
    assert len(set(alone)) > 1

    inputs = processor.prompts(questions())
    batch = model(**inputs).logits
    for row, mask, one in zip(batch, inputs["attention_mask"], questions(), strict=True):
        single = model(**processor.prompt(one)).logits[0]
        torch.testing.assert_close(row[mask == 1], single, rtol=0, atol=1e-5)


@every_fusion
def test_the_image_matters_and_is_encoded_once(build: Callable[..., Any], fusion: str) -> None:
    model, processor = build("clip", "average_pool", fusion=fusion)
    open_gates(model)
    model.generation_config.eos_token_id = None
    calls: list[int] = []
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    one = processor.prompt(Document(chat(1).parts[:2]))
    out = model.generate(**one, max_new_tokens=6, do_sample=False)
    assert len(calls) == 1
    hook.remove()
    slow = model.generate(**one, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(out, slow)
    other = model(**{**one, "pixels": 255 - one["pixels"]}).logits
    assert (model(**one).logits - other).abs().max() > 1e-3


def test_beams_and_several_answers_keep_their_images(build: Callable[..., Any]) -> None:
    model, processor = build("clip", "average_pool")
    asked = [questions()[2], questions()[1], questions()[0]]
    inputs = processor.prompts(asked)
    ids, expanded = model._expand_inputs_for_generation(
        2, **{name: inputs[name] for name in ("input_ids", "pixels", "sizes")}
    )
    views = inputs["pixels"].view(-1, 32, 32, 3)[[0, 1, 0, 1, 2, 2]]
    assert torch.equal(expanded["pixels"], views.flatten())
    assert expanded["sizes"].tolist() == [[32, 32]] * 6
    assert ids.shape[0] == 6
    out = model.generate(**inputs, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert out.shape[0] == 6


@every_fusion
def test_beams_of_rows_with_different_numbers_of_images(
    build: Callable[..., Any], fusion: str
) -> None:
    model, processor = build("clip", "average_pool", fusion=fusion)
    open_gates(model)
    model.generation_config.eos_token_id = None
    asked = [questions()[2], questions()[0]]
    inputs = processor.prompts(asked)
    assert len(inputs["sizes"]) == 3
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    start = inputs["input_ids"].shape[1]
    together = model.generate(**inputs, **beams)[:, start:]
    alone = [processor.prompt(one) for one in asked]
    apart = [model.generate(**one, **beams)[:, one["input_ids"].shape[1] :] for one in alone]
    assert torch.equal(together, torch.cat(apart))
    swapped = {**inputs, "pixels": inputs["pixels"].view(3, -1).roll(1, 0).flatten()}
    assert not torch.equal(model.generate(**swapped, **beams)[:, start:], together)


def test_image_tokens_and_padding_rows_are_never_written(build: Callable[..., Any]) -> None:
    model, processor = build()
    config = model.generation_config
    rows = model.get_input_embeddings().num_embeddings
    assert rows % 64 == 0
    assert set(config.suppress_tokens) == set(range(len(processor.tokenizer) - 1, rows))
    assert processor.tokenizer.eos_token_id in config.eos_token_id


# -- saving and loading ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_is_bit_exact(
    build: Callable[..., Any], tmp_path: Path, encoder: str, dtype: torch.dtype
) -> None:
    model, processor = build(encoder, "average_pool", dtype=dtype)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    same = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MultimodalModel
    assert type(same) is Processor
    assert type(AutoConfig.from_pretrained(tmp_path)) is MultimodalConfig
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert value.dtype == new[name].dtype, name
        assert torch.equal(value, new[name]), name
    assert same.fingerprint == processor.fingerprint
    assert not again.training
    pack, packed_again = packed(processor), packed(same)
    for field in ("input_ids", "labels", "pixels", "sizes"):
        assert torch.equal(getattr(pack, field), getattr(packed_again, field))
    with torch.no_grad():
        assert torch.equal(run(model, pack), run(again, pack))
    assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens


def test_loading_in_another_dtype(build: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = build("efficientnet_lite", "average_pool", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(tmp_path, dtype=torch.float32)
    floats = [value for value in again.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}
    assert again.dtype == torch.float32
    run(again, packed(processor))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(build: Callable[..., Any], tmp_path: Path, tied: bool) -> None:
    folder = save_language_model(tmp_path / "lm", tie_word_embeddings=tied)
    model, processor = build("clip", "mlp", folder)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    for one in (model, again):
        same = one.lm_head.weight is one.get_input_embeddings().weight
        assert same == tied
        assert one.get_input_embeddings().num_embeddings == 320
        assert one.lm_head.weight.shape == (320, 32)
        assert one.config.text_config.vocab_size == 320
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert ("language_model.lm_head.weight" in names) != tied


def test_new_rows_are_the_mean_of_the_old(build: Callable[..., Any], folders: Any) -> None:
    model, _ = build()
    weight = model.get_input_embeddings().weight
    old = load_file(folders["llama"] / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weight[:300], old)
    torch.testing.assert_close(weight[300:], old.mean(0).expand(20, -1))


def test_an_image_token_that_exists_is_kept(build: Callable[..., Any], tmp_path: Path) -> None:
    from tests.models.conftest import make_tokenizer

    folder = save_language_model(tmp_path / "lm", vocab_size=320)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    model, processor = build("clip", "mlp", folder)
    assert processor.image_token_id == len(tokenizer) - 1
    assert model.get_input_embeddings().num_embeddings == 320


def test_visual_tokens_change_at_load(build: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = build("clip", "average_pool", visual_tokens=4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    other, wider = load(tmp_path, connector={"visual_tokens": 16})
    assert torch.equal(model.connector.first.weight, other.connector.first.weight)
    assert processor.image_cost(32, 32) == (4, 16)
    assert wider.image_cost(32, 32) == (16, 16)
    assert wider.fingerprint != processor.fingerprint
    assert wider.text_fingerprint == processor.text_fingerprint
    run(other, packed(wider))
    pack = packed(processor)
    assert other.tokens_per_view(pack.sizes) == [16] * len(pack.sizes)
    assert len(other.image_features(pack.pixels, pack.sizes)) == 16 * len(pack.sizes)
    with pytest.raises(ValueError, match="5 x 5 grid"):
        load(tmp_path, connector={"visual_tokens": 25})
    with pytest.raises(ValueError, match="did you mean 'visual_tokens'"):
        load(tmp_path, connector={"visual_token": 16})
    with pytest.raises(ValueError, match="cannot become"):
        load(tmp_path, connector={"hidden": 7})


def test_damaged_folders_give_one_line(build: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = build()
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut short") as refused:
        load(saved)
    assert "\n" not in str(refused.value)

    weights.unlink()
    with pytest.raises(
        ValueError, match="no file model.safetensors, so there are no weights"
    ) as refused:
        load(saved)
    assert "\n" not in str(refused.value)

    weights.write_bytes(whole)
    values = load_file(weights)
    values.pop("connector.second.bias")
    save_file(values, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, connector\.second\.bias"):
        load(saved)

    (saved / "processor_config.json").write_text('{"geometry": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        Processor.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(saved)


def test_a_wrong_folder_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no folder"):
        MultimodalModel.from_pretrained("outputs/quickstart/1_align")
    with pytest.raises(ValueError, match="holds a 'llama' model"):
        load(folders["llama"])


def test_an_assembled_language_model_computes_what_it_did(
    build: Callable[..., Any], folders: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model, processor = build()
    plain = AutoModelForCausalLM.from_pretrained(folders["llama"], attn_implementation="sdpa")
    ids = processor.prompt(Document((Text("Which room?", "user"),)))["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :300], plain(ids).logits)


def test_image_of_another_size_is_refused(build: Callable[..., Any]) -> None:
    model, _ = build()
    views = [np.zeros((side, side, 3), dtype=np.uint8) for side in (32, 16, 8)]
    line = "^the encoder takes views of 32 x 32 pixels, but 2 of 3 are others, 16 x 16 first$"
    with pytest.raises(ValueError, match=line):
        model.image_features(*join_views(views))
    pixels, sizes = join_views(views[:1])
    with pytest.raises(ValueError, match=r"^2 views of 32 x 32 have 6144 bytes .* got \[3072\]$"):
        model.image_features(pixels, sizes.repeat(2, 1))
