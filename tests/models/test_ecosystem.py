"""A saved folder behaves as users of transformers, PEFT and the hub expect."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as PillowImage
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    ProcessorMixin,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from data_packing.document import Document, Image
from mllm.models.assemble import assemble
from mllm.models.config import MultimodalConfig
from mllm.models.images import Images
from mllm.models.modeling import MultimodalModel
from mllm.models.processor import Processor
from tests.models.conftest import save_clip, save_language_model
from tests.models.hub_server import Hub

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tiles; wide enough for kernels that quantise in blocks."""
    root = tmp_path_factory.mktemp("ecosystem")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model, processor = assemble(
        {
            "encoder": {"name": "clip", "path": save_clip(root / "clip")},
            "connector": {"name": "mlp"},
            "language_model": {"path": save_language_model(root / "llama", **sizes)},
            "images": {"tiling": "dynamic", "tiles": 4},
        }
    )
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def processor(saved: Path) -> Processor:
    """Loaded as a user does."""
    loaded = AutoProcessor.from_pretrained(saved)
    assert isinstance(loaded, Processor)
    return loaded


def load(saved: Path, **how: Any) -> MultimodalModel:
    model = AutoModelForImageTextToText.from_pretrained(saved, **how)
    assert isinstance(model, MultimodalModel)
    return model


def photo() -> PillowImage.Image:
    small = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PillowImage.fromarray(small).resize((90, 60), PillowImage.Resampling.BICUBIC)


def png() -> bytes:
    buffer = io.BytesIO()
    photo().save(buffer, "PNG")
    return buffer.getvalue()


def messages(**image: Any) -> list[dict[str, Any]]:
    shown = {"type": "image", **(image or {"image": photo()})}
    return [{"role": "user", "content": [shown, {"type": "text", "text": "What is this?"}]}]


def inputs(processor: Processor) -> Any:
    return processor.apply_chat_template(
        messages(), tokenize=True, return_dict=True, add_generation_prompt=True
    )


def logits(model: Any, given: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given).logits
    return found


def test_auto_classes_load_it(saved: Path, processor: Processor) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert isinstance(config, MultimodalConfig)
    model = load(saved)
    assert model.generate(**inputs(processor), **GREEDY).shape[1] > 4
    assert not [*saved.glob("*.bin"), *saved.glob("*.pt"), *saved.glob("*.pkl")]


def test_messages_are_the_document_that_training_sees(processor: Processor, tmp_path: Path) -> None:
    document = Document.conversation([("user", [Image.from_bytes(png()), "What is this?"])])
    wanted = processor.prompt(document)
    (tmp_path / "a.png").write_bytes(png())
    code = base64.b64encode(png()).decode()
    ways: list[dict[str, Any]] = [
        {"image": photo()},
        {"image": np.array(photo())},
        {"path": tmp_path / "a.png"},
        {"url": f"file://{tmp_path / 'a.png'}"},
        {"url": f"data:image/png;base64,{code}"},
        {"base64": code},
    ]
    for way in ways:
        found = processor.apply_chat_template(
            messages(**way), tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (way, name)
    text = processor.apply_chat_template(messages(), add_generation_prompt=True)
    assert text.count("<image>") == 1
    again = processor(images=photo(), text=text, return_tensors="pt", add_special_tokens=False)
    assert torch.equal(again["input_ids"], wanted["input_ids"])
    ids = processor.apply_chat_template(messages(), tokenize=True, add_generation_prompt=True)
    assert ids == wanted["input_ids"][0].tolist()
    # a whole conversation, its answer included
    told = [*messages(), {"role": "assistant", "content": "It is a dog."}]
    whole = Document.conversation(
        [
            ("user", [Image.from_bytes(png()), "What is this?"]),
            ("assistant", "It is a dog."),
        ]
    )
    ids = processor.apply_chat_template(told, tokenize=True)
    assert ids == processor.encode(whole).input_ids.tolist()


def test_several_conversations_are_padded_on_the_left(processor: Processor) -> None:
    plain = [{"role": "user", "content": "Which room does it belong to?"}]
    both = processor.apply_chat_template(
        [plain, messages()], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    alone = processor.apply_chat_template(
        plain, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    seen = both["attention_mask"][0].bool()
    assert not seen[0]
    assert torch.equal(both["input_ids"][0][seen], alone["input_ids"][0])
    assert "pixels" not in alone
    texts = processor.apply_chat_template([plain, messages()], add_generation_prompt=True)
    rows = processor(text=texts, images=[[], [photo()]], padding=True, add_special_tokens=False)
    assert torch.equal(rows["input_ids"], both["input_ids"])


@pytest.mark.parametrize(
    ("images", "text", "reason"),
    [
        (None, "<image> a", "the texts hold 1 images, but 0 are given"),
        ([], None, "from texts and images"),
        ([[], []], ["<image>", "a"], r"the texts hold \[1, 0\] images, but \[0, 0\] are given"),
        ("nowhere.png", "<image>", "nowhere.png: No such file"),
        (3.5, "<image>", "an image cannot be read from float"),
    ],
)
def test_wrong_calls_are_explained(
    processor: Processor, images: Any, text: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        processor(images=images, text=text)


def test_wrong_messages_are_explained(processor: Processor) -> None:
    how: dict[str, Any] = {"tokenize": True, "return_dict": True}
    content = [{"type": "image"}]
    with pytest.raises(ValueError, match="none of image, path, url, base64"):
        processor.apply_chat_template([{"role": "user", "content": content}], **how)


def test_the_pipeline_of_transformers(saved: Path, processor: Processor) -> None:
    model = load(saved)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    said = pipe(text=messages(), max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
    ids = model.generate(**inputs(processor), **GREEDY)[0, -4:]
    assert said["content"] == processor.decode(ids, skip_special_tokens=True)


def test_everything_loads_by_the_folder_alone(saved: Path, processor: Processor) -> None:
    assert isinstance(processor, ProcessorMixin)
    model = load(saved)
    pipe = pipeline("image-text-to-text", model=str(saved))
    said = pipe(text=messages(), max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
    ids = model.generate(**inputs(processor), **GREEDY)[0, -4:]
    assert said["content"] == processor.decode(ids, skip_special_tokens=True)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == processor.chat_template
    whole = AutoModel.from_pretrained(saved)
    assert torch.equal(logits(whole, inputs(processor)), logits(model, inputs(processor)))


def test_the_image_processor_alone(saved: Path, processor: Processor) -> None:
    alone: Any = processor.image_processor
    if find_spec("torchvision") or version("transformers") >= "5.23":  # 5.17 asks for it
        alone = AutoImageProcessor.from_pretrained(saved)
    seen, wanted = alone([photo(), photo()], return_tensors="pt"), inputs(processor)
    for name in ("pixels", "sizes"):
        assert torch.equal(seen[name], torch.cat([wanted[name]] * 2)), name
    assert set(alone.model_input_names) < set(processor.model_input_names)
    with pytest.raises(ValueError, match="takes no argument 'do_resize'"):
        alone(photo(), do_resize=False)


def test_arguments_of_loading(saved: Path, tmp_path: Path) -> None:
    right = AutoProcessor.from_pretrained(saved, padding_side="right", use_fast=True)
    ids = right(text=["a", "a small green parrot"])["attention_mask"]
    assert ids[0].tolist() == sorted(ids[0].tolist(), reverse=True)
    for unknown, said in (("foo", "argument of the processor 'foo'"), ("max_pixels", "no bounds")):
        with pytest.raises(ValueError, match=said):
            AutoProcessor.from_pretrained(saved, **{unknown: 3})
    half = load(saved, dtype="bfloat16", attn_implementation="eager")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path)
    assert right.save_pretrained(tmp_path) == [str(tmp_path / "processor_config.json")]
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == right.to_dict()
    assert load(tmp_path).dtype == torch.bfloat16


def test_device_maps_and_offloading(saved: Path, processor: Processor, tmp_path: Path) -> None:
    given = inputs(processor)
    wanted = logits(load(saved), given)
    assert torch.equal(logits(load(saved, device_map="auto"), given), wanted)
    room = {"cpu": 1_300_000}  # bytes: the layers of the language model do not fit
    split = load(saved, device_map="auto", max_memory=room, offload_folder=tmp_path)
    places = {str(place) for place in split.hf_device_map.values()}
    assert places == {"cpu", "disk"}
    assert split.hf_device_map["encoder"] == "cpu"
    assert torch.equal(logits(split, given), wanted)
    assert {"ClipEncoder", "Mlp", "LlamaDecoderLayer"} <= set(split._no_split_modules)


def test_four_bits(saved: Path, processor: Processor, tmp_path: Path) -> None:
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = load(saved, quantization_config=how)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    quantised = {name.split(".")[0] for name, kind in kinds.items() if kind == "Linear4bit"}
    assert quantised == {"language_model"}, "only the language model's matrices"
    model.save_pretrained(tmp_path)  # first: bitsandbytes lays weights out anew when they run
    given = inputs(processor)
    near = logits(model, given)
    assert near.isfinite().all()
    assert torch.equal(logits(load(tmp_path), given), near)
    chosen = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["language_model"])
    named = load(saved, quantization_config=chosen)
    assert type(named.connector.get_submodule("first")).__name__ == "Linear4bit"


def test_peft(saved: Path, processor: Processor, tmp_path: Path) -> None:
    given = inputs(processor)
    config = LoraConfig(
        r=2,
        target_modules=r"language_model.*\.(q_proj|v_proj)",
        modules_to_save=["connector"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted: Any = get_peft_model(load(saved), config)
    loss = adapted(**given, labels=given["input_ids"]).loss
    loss.backward()
    grown = {name for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert any("lora_A" in name for name in grown)
    assert any("connector" in name for name in grown)
    assert not any("encoder" in name for name in grown)
    wanted = logits(adapted, given)
    assert not torch.allclose(wanted, logits(load(saved), given))
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(saved), tmp_path / "adapter")
    assert torch.equal(logits(again, given), wanted)
    rows = again.generate(**given, **GREEDY)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, given), wanted, rtol=0, atol=1e-4)
    assert torch.equal(merged.generate(**given, **GREEDY), rows)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged"), given), wanted, atol=1e-4, rtol=0)


def test_embeddings_stand_in_for_ids(saved: Path, processor: Processor) -> None:
    model, given = load(saved), inputs(processor)
    with torch.no_grad():
        embeds = model._fuse(given["input_ids"], Images(given["pixels"], given["sizes"])).embeds
        found = model(inputs_embeds=embeds, attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(found, logits(model, given))
    with pytest.raises(ValueError, match="one of them"):
        model(inputs_embeds=embeds, input_ids=given["input_ids"])


THERE_AND_BACK = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
import mllm
from mllm.cli import app, main
from mllm.models.assemble import load
from tests.models.test_ecosystem import inputs, logits

torch.set_num_threads(1)
root = Path(sys.argv[1])
AutoModelForImageTextToText.from_pretrained(root / "saved").push_to_hub("me/tiny", token="hf_x")
AutoProcessor.from_pretrained(root / "saved").push_to_hub("me/tiny", token="hf_x")
processor = AutoProcessor.from_pretrained("me/tiny", revision="main")
model = AutoModelForImageTextToText.from_pretrained("me/tiny")
found = {"ids": inputs(processor)["input_ids"], "logits": logits(model, inputs(processor))}
model, processor = load(Path("me/tiny"))
found["loaded"] = logits(model, inputs(processor))
torch.save(found, root / "found.pt")
app(["export", "me/tiny", f"{root}/exported", "--to", "transformers"], standalone_mode=False)
ask = ["--question", "What is this?", "--image", f"{root}/a.png", "--max-new-tokens", "3"]
app(["chat", "me/tiny", *ask], standalone_mode=False)
sys.argv = ["mllm", "chat", "me/nothing", "--question", "What?"]
main()
"""


def test_a_stage_goes_to_a_hub_and_comes_back(
    saved: Path, processor: Processor, tmp_path: Path
) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "saved").symlink_to(saved)
    hub = type("Here", (Hub,), {"root": tmp_path / "hub"})
    with ThreadingHTTPServer(("127.0.0.1", 0), hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        env = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

        done = subprocess.run(
            [sys.executable, "-c", THERE_AND_BACK, str(tmp_path)],
            env={**os.environ, **env, "HF_HOME": str(tmp_path / "fresh")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        server.shutdown()
    assert done.returncode == 2, done.stderr[-2000:]
    arrived = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json"} <= arrived
    found = torch.load(tmp_path / "found.pt")
    given = inputs(processor)
    assert torch.equal(found["ids"], given["input_ids"])
    for name in ("logits", "loaded"):
        assert torch.equal(found[name], logits(load(saved), given))
    assert (tmp_path / "exported" / "modeling_mllm.py").is_file()
    assert "me/nothing" in done.stderr.strip().splitlines()[-1]
