"""Every family of language models: packed alone, together, generated, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from data_packing.pack import Pack, collate
from mllm.models import attention
from mllm.models.assemble import load
from mllm.models.families import OutputLayer, causal_class
from mllm.models.images import Images
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from mllm.objectives.language_modeling import LanguageModeling
from tests.models.conftest import documents
from tests.models.families import FAMILIES, save_family
from tests.models.test_packed_equals_unpacked import assert_packed_is_unpacked, logits_of

Parts = tuple[MultimodalModel, Processor, Path]
MOE = {"deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "granitemoe"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(root / name, config) for name, config in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def parts(
    request: pytest.FixtureRequest, build: Callable[..., Any], saved: dict[str, Path]
) -> Parts:
    model, processor = build("clip", "mlp", saved[request.param])
    return model, processor, saved[request.param]


def text_rows() -> torch.Tensor:
    """Two rows of 20 tokens that are nobody's special ones."""
    return torch.randint(3, 290, (2, 20), generator=torch.Generator().manual_seed(0))


def two_documents() -> tuple[torch.Tensor, torch.Tensor]:
    """Packs [1, 26] of documents of 6 and 20 tokens whose first ones differ."""
    rows = text_rows()
    second = rows[1]
    return torch.cat([rows[0, :6], second])[None], torch.cat([rows[0, 6:12], second])[None]


CU_SEQLENS = torch.tensor([0, 6, 26], dtype=torch.int32)


def test_packed_equals_unpacked(parts: Parts) -> None:
    model, processor, _ = parts
    model.train()
    assert_packed_is_unpacked(model, processor)


@torch.no_grad()
def test_a_document_is_what_the_family_makes_of_it_alone(parts: Parts) -> None:
    """No leak, positions that restart, windows, caps, sinks and scales: against transformers."""
    model, _, folder = parts
    one, other = two_documents()
    first = model.lm_head(model.hidden_states(one, cu_seqlens=CU_SEQLENS))[0]
    second = model.lm_head(model.hidden_states(other, cu_seqlens=CU_SEQLENS))[0]
    assert (first[:6] - second[:6]).abs().max() > 1e-3
    slack = 1e-6 if model.config.text_config.model_type in MOE else 0.0  # experts share matrices
    torch.testing.assert_close(first[6:], second[6:], rtol=0, atol=slack * 10)
    reference = eager(folder)
    own = reference(input_ids=one[:, 6:], use_cache=False).logits[0]
    torch.testing.assert_close(first[6:, : own.shape[1]], own, rtol=0, atol=1e-5)


def eager(folder: Path) -> Any:
    kind = causal_class(AutoConfig.from_pretrained(folder))
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def test_generation_is_that_of_the_text_model(parts: Parts) -> None:
    """In a batch whose second row is padded on the left, past the window."""
    model, _, folder = parts
    rows = text_rows()
    mask = torch.ones_like(rows)
    mask[1, :9] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 2,
        "output_logits": True,
        "return_dict_in_generate": True,
        "suppress_tokens": None,
    }
    ours = model.generate(rows, **options)
    theirs = eager(folder).generate(rows, **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for mine, own in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(mine[:, : own.shape[1]], own, rtol=0, atol=1e-5)


def test_every_layer_gets_the_bounds(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = parts
    seen: list[Any] = []
    plain = attention.attend_in_documents

    def spy(*args: Any) -> Any:
        seen.append(args[3])
        return plain(*args)

    monkeypatch.setattr(attention, "attend_in_documents", spy)
    model.hidden_states(two_documents()[0], cu_seqlens=CU_SEQLENS)
    assert len(seen) == model.config.text_config.num_hidden_layers
    assert all(bounds is CU_SEQLENS for bounds in seen)


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(parts: Parts, tmp_path: Path) -> None:
    model, processor, _ = parts
    pack = packed(processor)
    expected = logits_of(model, pack)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert torch.equal(logits_of(again, pack), expected)


def packed(processor: Processor) -> Pack:
    return collate([processor.encode(document) for document in documents()], 0)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_training_sees_the_logits_of_the_family(
    build: Callable[..., Any], saved: dict[str, Path], family: str
) -> None:
    """The objective calls the head itself; scale and soft cap are there as in forward."""
    model, processor = build("clip", "mlp", saved[family])
    assert isinstance(model.lm_head, OutputLayer)
    assert not isinstance(model.get_output_embeddings(), OutputLayer)
    pack = packed(processor)
    bounds = pack.cu_seqlens
    hidden = model.hidden_states(pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=bounds)
    weights = (pack.labels >= 0).float()
    rows = model.get_input_embeddings().num_embeddings
    objective = LanguageModeling(len(weights), rows)
    found = objective(hidden[0], pack.labels, weights, model.lm_head)
    output = model(pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=bounds, labels=pack.labels)
    torch.testing.assert_close(found / weights[1:].sum(), output.loss)
    raw = objective(hidden[0], pack.labels, weights, model.get_output_embeddings())
    assert (raw - found).abs() > 1


@pytest.mark.parametrize(("family", "scale"), [("gemma", 32**0.5), ("gemma3_text", 32**0.5)])
def test_visual_tokens_are_not_scaled_as_words_are(
    build: Callable[..., Any], saved: dict[str, Path], family: str, scale: float
) -> None:
    """As in PaliGemma and Gemma 3: the embedding scales words, features enter as they are."""
    model, processor = build("clip", "mlp", saved[family])
    pack = packed(processor)
    embeds = model._fuse(pack.input_ids[None], Images(pack.pixels, pack.sizes)).embeds[0]
    image = pack.input_ids == processor.image_token_id
    words = model.get_input_embeddings().weight[pack.input_ids[~image]] * scale
    torch.testing.assert_close(embeds[~image], words)
    features = model.image_features(pack.pixels, pack.sizes)
    torch.testing.assert_close(embeds[image], features)


@torch.no_grad()
def test_granite_scales_words_and_visual_tokens_alike(
    build: Callable[..., Any], saved: dict[str, Path]
) -> None:
    """As in transformers' own multimodal Granite: the body multiplies whatever enters it."""
    model, processor = build("clip", "mlp", saved["granite"])
    pack = packed(processor)
    entered: list[torch.Tensor] = []
    body = model.language_model.base_model
    body.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    logits_of(model, pack)
    embeds = model._fuse(pack.input_ids[None], Images(pack.pixels, pack.sizes)).embeds
    torch.testing.assert_close(entered[0], embeds * 12.0)


@pytest.mark.parametrize("family", sorted(MOE))
def test_experts_are_chosen_inside_one_module(
    build: Callable[..., Any], saved: dict[str, Path], family: str
) -> None:
    """Whatever the tokens, the same modules run in the same order: sharded weights are gathered
    by module, and ranks that call different ones would wait for each other for ever."""
    model, _ = build("clip", "mlp", saved[family])
    called: list[str] = []
    for name, module in model.language_model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    orders = []
    for ids in (*two_documents(), torch.full((1, 26), 7)):
        called.clear()
        model.hidden_states(ids, cu_seqlens=CU_SEQLENS)
        orders.append(list(called))
    assert orders[0] == orders[1] == orders[2]
    assert any(name.endswith("experts") for name in orders[0])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_losses_are_not_added(
    build: Callable[..., Any], saved: dict[str, Path], family: str
) -> None:
    model, processor = build("clip", "mlp", saved[family])
    pack = packed(processor)

    def loss() -> torch.Tensor:
        output = model(
            pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens, labels=pack.labels
        )
        return output.loss

    plain = loss()
    text = model.language_model.config
    text.output_router_logits, text.router_aux_loss_coef = True, 10.0
    assert torch.equal(loss(), plain)
