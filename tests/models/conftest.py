"""Tiny random parts with a real tokenizer: what every test of the model is made of."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from data_packing.document import Document, Image
from mllm import cli
from mllm.models.assemble import assemble
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.encoder_folders import SAVERS
from tests.models.native_folders import NATIVE

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small helper<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "the cat sat on a red chair while system user assistant helper looked at the picture of "
    "a small green parrot\nWhat is this? It is a dog. Which room does it belong to?\n\n"
)
SMALL: dict[str, dict[str, Any]] = {
    "average_pool": {"visual_tokens": 4},
    "c_abstractor": {"visual_tokens": 4, "hidden": 8, "depth": 1},
    "gemma3": {"visual_tokens": 4},
    "q_former": {"visual_tokens": 3, "hidden": 8, "heads": 2, "depth": 2, "inner": 8},
    "resampler": {"visual_tokens": 5, "depth": 2, "heads": 2, "head_width": 4},
}
"""Connector → the options of a tiny one, where a test gives none."""
SMALL_FUSION: dict[str, dict[str, Any]] = {
    "cross_attention": {"name": "cross_attention", "every": 1, "inner": 16},
    "deepstack": {"name": "deepstack", "layers": [0, 1]},
    "in_sequence": {"name": "in_sequence"},
}
"""Fusion → one for a language model of two layers."""

Parts = tuple[MultimodalModel, Processor]


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 4 + ["\n\n"] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
    )


def llama_config(**changes: Any) -> LlamaConfig:
    """A Llama of two layers with grouped heads and tied embeddings."""
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**values, **changes})


def save_language_model(folder: Path, chat_template: str | None = CHATML, **changes: Any) -> Path:
    """A language model's folder as one finds it on disk."""
    torch.manual_seed(1)
    LlamaForCausalLM(llama_config(**changes)).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """A CLIP vision tower of three layers: 4 x 4 patches of 8 pixels."""
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def save_siglip(folder: Path) -> Path:
    """A SigLIP vision tower of three layers: 4 x 4 patches of 8 pixels."""
    torch.manual_seed(3)
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    values = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def save_efficientnet(folder: Path) -> Path:
    """The real EfficientNet-Lite0 class with random weights, through the package's own format."""
    from efficientnet_lite_pytorch import EfficientNet

    from mllm.models.encoders.efficientnet_lite import convert_package_weights

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(4)
    torch.save(EfficientNet.from_name("efficientnet-lite0").state_dict(), folder / "lite0.pth")
    convert_package_weights(folder / "lite0.pth", folder)
    (folder / "lite0.pth").unlink()
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of parts by name."""
    from tests.models.llava_folders import save_blip2  # which is made of this module's parts

    root = tmp_path_factory.mktemp("parts")
    return {
        "llama": save_language_model(root / "llama"),
        "blip2": save_blip2(root / "blip2"),
        "clip": save_clip(root / "clip"),
        "siglip": save_siglip(root / "siglip"),
        "efficientnet_lite": save_efficientnet(root / "efficientnet_lite"),
        **{name: save(root / name) for name, save in (SAVERS | NATIVE).items()},
    }


@pytest.fixture
def build(folders: dict[str, Path]) -> Callable[..., Parts]:
    """Assemble a fresh model: build("clip", "average_pool", visual_tokens=4)."""

    def made(
        encoder: str = "clip",
        connector: str = "mlp",
        language_model: Path | None = None,
        dtype: torch.dtype = torch.float32,
        encoder_options: dict[str, Any] | None = None,
        fusion: str | dict[str, Any] = "in_sequence",
        images: dict[str, Any] | None = None,
        **options: Any,
    ) -> Parts:
        torch.manual_seed(5)
        options = options or SMALL.get(connector, {})
        section: dict[str, Any] = {
            "images": images,
            "encoder": {"name": encoder, "path": folders[encoder], **(encoder_options or {})},
            "connector": {"name": connector, **options},
            "language_model": {"path": language_model or folders["llama"]},
            "fusion": SMALL_FUSION[fusion] if isinstance(fusion, str) else fusion,
        }
        return assemble(section, dtype=dtype)

    return made


Copy = Callable[[str], Path]
RUNNER = CliRunner()


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Copy:
    """A folder to spoil: copy("llama")."""

    def made(name: str) -> Path:
        shutil.copytree(folders[name], tmp_path / name)
        return tmp_path / name

    return made


@pytest.fixture
def refused(folders: dict[str, Path], tmp_path: Path) -> Callable[..., None]:
    """Checks what the command says of a model section and that nothing was written."""

    def check(message: str, **changes: Any) -> None:
        values: dict[str, Any] = {
            "encoder": {"name": "clip", "path": str(folders["clip"])},
            "connector": {"name": "mlp"},
            "language_model": {"path": str(folders["llama"])},
            **changes,
        }
        file, output = tmp_path / "r.yaml", tmp_path / "out" / "start"
        model = {key: value for key, value in values.items() if value is not None}
        file.write_text(json.dumps({"model": model}))
        error = RUNNER.invoke(cli.app, ["assemble", str(file), "--output", str(output)]).exception
        assert isinstance(error, ValueError)
        assert message in str(error)
        assert "\n" not in str(error)
        assert not output.exists()

    return check


def change(file: Path, **values: Any) -> None:
    """Change or, by None, remove keys of a JSON file."""
    both = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in both.items() if value is not None}))


def language(folder: Path) -> dict[str, Any]:
    return {"language_model": {"path": str(folder)}}


def encoder(folder: Path, name: str = "clip") -> dict[str, Any]:
    return {"encoder": {"name": name, "path": str(folder)}}


def open_gates(model: MultimodalModel) -> MultimodalModel:
    """Move every gate of a fusion off zero, as training does."""
    with torch.no_grad():
        for name, gate in model.fusion.named_parameters():
            if name.endswith("_gate"):
                gate.fill_(0.7 if "attention" in name else -0.5)
    return model


def picture(seed: int, height: int = 40, width: int = 56) -> Image:
    """A PNG of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = PillowImage.fromarray(small).resize((width, height), PillowImage.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.from_bytes(buffer.getvalue())


def chat(seed: int, question: str = "What is this?", answer: str = "It is a dog.") -> Document:
    """A conversation about one picture."""
    return Document.conversation(
        [("user", [picture(seed), "\n" + question]), ("assistant", answer)], "chat", str(seed)
    )


def documents() -> list[Document]:
    """One of each kind: caption, page with two images, chat, text alone."""
    page = Document(
        (
            *Document.caption(picture(1), "the cat sat on a red chair").parts,
            *Document.caption(picture(2, 30, 30), "a small green parrot").parts,
        ),
        "pages",
        "1",
    )
    text = Document.conversation([("user", "Which room?"), ("assistant", "the red room")])
    return [Document.caption(picture(3), "a red chair"), page, chat(4), text]
