"""A language model's folder or file, its tokenizer, and the rows that are added to it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GemmaConfig, Olmo2Config, PreTrainedConfig

from data_packing.document import DocumentError
from data_packing.pack import collate
from mllm.models import errors
from mllm.models.assemble import load
from mllm.models.language import load_language_model
from tests.models.conftest import chat, documents, llama_config, make_tokenizer
from tests.models.families import GATED, GEMMA
from tests.models.gguf_files import llama, write_llama


def save(folder: Path, config: PreTrainedConfig, *tokens: str) -> Path:
    """A language model whose tokenizer has more special tokens."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = make_tokenizer()
    added: Any = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [300, 320, 384])
def test_a_vocabulary_that_differs_from_the_tokenizer(
    build: Callable[..., Any], tmp_path: Path, tied: bool, rows: int
) -> None:
    """Rows for 300 words and the image token: padded to 64s, or there already and left alone."""
    config = llama_config(vocab_size=rows, tie_word_embeddings=tied)
    folder = save(tmp_path / "lm", config)
    before = AutoModelForCausalLM.from_pretrained(folder)
    model, processor = build("clip", "mlp", folder)
    assert processor.image_token_id == len(make_tokenizer()) == 300
    wanted = 320 if rows == 300 else rows
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert (layers[0].weight is layers[1].weight) == tied
    originals = [before.get_input_embeddings(), before.get_output_embeddings()]
    for layer, original in zip(layers, originals, strict=True):
        assert layer.weight.shape == (wanted, 32)
        assert torch.equal(layer.weight[:rows], original.weight)
        if rows == 300:
            mean = original.weight.mean(dim=0).expand(20, 32)
            torch.testing.assert_close(layer.weight[rows:], mean)
    assert model.config.text_config.vocab_size == wanted
    never = list(range(300, 320)) if rows == 300 else [300]
    assert model.generation_config.suppress_tokens == never


def test_an_image_token_that_is_there_is_kept(build: Callable[..., Any], tmp_path: Path) -> None:
    folder = save(tmp_path / "lm", llama_config(vocab_size=320), "<other>", "<image>", "<more>")
    model, processor = build("clip", "mlp", folder)
    assert processor.image_token_id == 301
    assert len(processor.tokenizer) == 303
    assert model.get_input_embeddings().num_embeddings == 320
    sample = processor.encode(chat(1))
    assert (sample.input_ids == 301).sum() == 16


def test_an_image_token_that_is_a_word_becomes_special(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "lm", llama_config(vocab_size=320))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=False)])
    tokenizer.save_pretrained(folder)
    model, processor = build("clip", "mlp", folder)
    assert model.config.image_token_id == processor.image_token_id == 300
    assert len(processor.tokenizer) == 301
    with pytest.raises(DocumentError, match="contains the special token '<image>'"):
        processor.encode(chat(1, question="What is <image>?"))


def test_a_tokenizer_longer_than_the_embedding_gets_its_rows(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "lm", llama_config(), *(f"<t{number}>" for number in range(30)))
    model, processor = build("clip", "mlp", folder)
    assert processor.image_token_id == 330
    assert model.get_input_embeddings().num_embeddings == 384
    assert model.generation_config.suppress_tokens[-1] == 383


def test_assembled_twice_is_added_once(build: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = build("clip", "mlp")
    model.save_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "one")
    again, reloaded = load(tmp_path / "one")
    assert reloaded.image_token_id == processor.image_token_id
    assert len(reloaded.tokenizer) == len(processor.tokenizer)
    embedding, other = again.get_input_embeddings(), model.get_input_embeddings()
    assert torch.equal(embedding.weight, other.weight)


def test_new_rows_of_a_scaled_embedding(build: Callable[..., Any], tmp_path: Path) -> None:
    """Resizing keeps Gemma's scale, and the mean is of what is stored, so of what comes out."""
    model, _ = build("clip", "mlp", save(tmp_path / "lm", GemmaConfig(**GEMMA)))
    embedding = model.get_input_embeddings()
    rows = embedding(torch.arange(320))
    torch.testing.assert_close(rows, embedding.weight * 32**0.5)
    torch.testing.assert_close(rows[300], rows[:300].mean(dim=0))


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny.gguf", llama())


def test_a_gguf_file_is_a_language_model(build: Callable[..., Any], gguf_file: Path) -> None:
    loaded, tokenizer = load_language_model(gguf_file)
    text = "the cat sat on a red chair"
    assert tokenizer(text).input_ids == make_tokenizer()(text).input_ids
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, llama()(ids).logits)
    model, processor = build("clip", "mlp", gguf_file)
    pack = collate([processor.encode(document) for document in documents()], 0)
    hidden = model.hidden_states(
        pack.input_ids, pack.pixels, pack.sizes, cu_seqlens=pack.cu_seqlens
    )
    assert hidden.isfinite().all()


def test_gguf_files_that_cannot_be_used(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        load_language_model(gguf_file.with_name("other.gguf"))
    whole = gguf_file.read_bytes()
    for size in (len(whole) - 9, len(whole) // 2, 500, 10, 0):
        gguf_file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tiny\.gguf: the file is damaged or cut short \("):
            load_language_model(gguf_file)
    errors.check_language_model(gguf_file, "model.language_model.path")
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install .mllm\[gguf\]"):
        load_language_model(gguf_file)
    assert find_spec("gguf")


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    config = Olmo2Config(**GATED, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    state = {k: v for k, v in model.state_dict().items() if "lm_head" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 weights are missing, lm_head\.weight first"):
        load_language_model(tmp_path)
