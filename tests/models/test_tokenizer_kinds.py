"""One rule for every kind of tokenizer, with a chat template and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_packing.document import Document
from data_packing.sample import IGNORED
from mllm.models.geometry import ImageGeometry
from mllm.models.processor import Processor
from tests.models.conftest import WORDS, chat, make_tokenizer, picture

TURNS = (
    "{% for m in messages %}{{ START + m['role'] + '\n' + m['content'] + END + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ START + 'assistant\n' }}{% endif %}"
)


def template(start: str, end: str) -> str:
    return TURNS.replace("START", repr(start)).replace("END", repr(end))


def byte_level(chat_template: str | None) -> PreTrainedTokenizerFast:
    return make_tokenizer(chat_template and template("<|im_start|>", "<|im_end|>"))


def unigram(chat_template: str | None) -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: spaces are part of words, unknown characters become bytes."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>")
    trained.train_from_iterator([WORDS] * 4, trainer)
    specials = [(word, 0.0) for word in ("<unk>", "<s>", "</s>")]
    fallback = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    words = {word: -5.0 for word in trained.get_vocab() if word != "<unk>" and "\n" not in word}
    pieces = [*specials, *fallback, *words.items()]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template and template("<s>", "</s>"),
    )


def word_piece(chat_template: str | None) -> PreTrainedTokenizerFast:
    """As BERT's: lower case, white space is dropped."""
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        chat_template=chat_template and template("[CLS]", "[SEP]"),
    )


Kind = Callable[[str | None], PreTrainedTokenizerFast]
KINDS: list[Kind] = [byte_level, unigram, word_piece]


def processor(kind: Kind, chat_template: str | None = "yes") -> Processor:
    tokenizer = kind(chat_template)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    geometry = ImageGeometry(32, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Processor(tokenizer, geometry, {"name": "average_pool", "visual_tokens": 4})


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_learned_with_its_end(kind: Kind) -> None:
    made = processor(kind)
    sample = made.encode(chat(1, answer="it is a dog."))
    learned = sample.labels[sample.labels != IGNORED]
    assert learned[-1] == made.tokenizer.eos_token_id
    assert made.decode(learned[:-1]).strip() == "it is a dog."
    assert (sample.input_ids == made.image_token_id).sum() == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_how_training_begins(kind: Kind) -> None:
    made = processor(kind)
    whole = made.encode(chat(1)).input_ids.tolist()
    question = Document.conversation([("user", [picture(1), "\nWhat is this?"])])
    prompt = made.prompt(question)["input_ids"][0].tolist()
    assert whole[: len(prompt)] == prompt
    assert len(prompt) < len(whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a small green parrot", "Überraschung: 猫 \n\n sat"])
def test_the_cost_is_the_length(kind: Kind, text: str) -> None:
    made = processor(kind)
    for document in (Document.caption(picture(1), text), chat(1, answer=text)):
        ids = made.encode(document).input_ids
        cost = made.cost(document)
        counted = cost.overhead + sum(tokens for tokens, _ in cost.pieces)
        assert counted == (ids != made.image_token_id).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_chat_template_captions_are_written_and_conversations_refused(
    kind: Kind,
) -> None:
    """Nothing is made up: a template that the model never saw would be wrong in silence."""
    made = processor(kind, None)
    sample = made.encode(Document.caption(picture(1), "a small green parrot"))
    learned = sample.labels[sample.labels != IGNORED]
    assert made.decode(learned, skip_special_tokens=True).strip() == "a small green parrot"
    with pytest.raises(ValueError, match="no chat template") as refused:
        made.encode(chat(1))
    assert "chat_template.jinja" in str(refused.value)
    assert "\n" not in str(refused.value)
