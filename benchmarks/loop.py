"""The plain rival: one process, PyTorch, padded batches, nothing of the stack's training.

A frozen EfficientNet-Lite0, 16 visual tokens through an MLP that a ridge regression starts, and
SmolLM2-135M: three minutes of captions with the language model frozen, then four of captions and
category questions half and half with LoRA. It reads the quick start's shards and held-out split and
is measured by the same functions, so that the stack can be held against it in the same time.

    python -m benchmarks.loop --seed 0 --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from peft import LoraConfig, get_peft_model
from PIL import Image as Pillow
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_packing.document import Document, Text
from data_packing.shards import expand, read_document, read_index
from mllm.evaluation.measure import HeldOutData, measure
from mllm.models.assemble import assemble
from mllm.models.language import load_language_model

VISUAL_TOKENS, WIDTH, FEATURES = 16, 576, 1280


@dataclass(slots=True)
class Example:
    """Token ids before and after the image; the last `learned` of them are learned."""

    before: list[int]
    image: bytes
    after: list[int]
    learned: int


@cache
def pixels(data: bytes, side: int = 224) -> Tensor:
    """uint8 [side, side, 3], transparency over white."""
    image = Pillow.open(BytesIO(data)).convert("RGBA")
    image = Pillow.alpha_composite(Pillow.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.frombuffer(
        bytearray(
            image.resize((side, side), Pillow.Resampling.BILINEAR, reducing_gap=3.0).tobytes()
        ),
        dtype=torch.uint8,
    ).view(side, side, 3)


class Loop(nn.Module):
    """Encoder, connector and language model with their plain training loop."""

    encoder: Any
    connector: Any
    llm: Any

    def __init__(self, data: Path, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        folder = data / "models" / "efficientnet-lite0"
        self.encoder = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        weights = {
            k.removeprefix("model."): v for k, v in load_file(folder / "model.safetensors").items()
        }
        self.encoder.load_state_dict(weights, strict=False)
        self.encoder.to(torch.bfloat16, memory_format=torch.channels_last)
        geometry = json.loads((folder / "preprocessor_config.json").read_text())
        self.mean, self.std = (torch.tensor(geometry[f"image_{k}"]) * 255 for k in ("mean", "std"))
        self.connector = nn.Sequential(
            nn.LayerNorm(FEATURES), nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )
        path = data / "models" / "SmolLM2-135M-Instruct"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.llm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.llm.requires_grad_(False)

    def example(self, document: Document) -> Example:
        """Token ids of a caption, or of one question about an image with its answer."""
        ids = self._ids
        (image,) = document.images
        said = [part for part in document.parts if isinstance(part, Text)]
        end = [self.tokenizer.eos_token_id]
        if not document.is_conversation:
            after = ids(said[0].text) + end
            return Example([], image.data, after, len(after))
        turn = {"role": "user", "content": "<image>" + said[0].text}
        prompt = self.tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True
        )
        before, after = prompt.split("<image>")
        answer = ids(said[1].text) + end
        return Example(ids(before), image.data, ids(after) + answer, len(answer))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def features(self, images: Sequence[bytes]) -> Tensor:
        """[I, 16, 1280] of the frozen encoder."""
        x = (torch.stack([pixels(data) for data in images]).float() - self.mean) / self.std
        x = x.permute(0, 3, 1, 2).to(torch.bfloat16, memory_format=torch.channels_last)
        grid = F.adaptive_avg_pool2d(self.encoder.extract_features(x).float(), 4)
        return grid.flatten(2).transpose(1, 2)

    def losses(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """NLL sums [B] and numbers of learned tokens [B] of one padded batch."""
        embed = self.llm.get_input_embeddings()
        with torch.autocast("cpu", torch.bfloat16):
            visual = self.connector(self.features([e.image for e in examples])).to(torch.bfloat16)
            rows = [
                torch.cat(
                    [
                        embed(torch.tensor(e.before, dtype=torch.long)),
                        visual[i],
                        embed(torch.tensor(e.after)),
                    ]
                )
                for i, e in enumerate(examples)
            ]
            x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            labels = torch.full(x.shape[:2], -100)
            for i, e in enumerate(examples):
                labels[i, len(rows[i]) - e.learned : len(rows[i])] = torch.tensor(
                    e.after[-e.learned :]
                )
            mask = torch.arange(x.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
            logits = self.llm(inputs_embeds=x, attention_mask=mask.long(), use_cache=False).logits
        nll = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2),
            labels[:, 1:],
            ignore_index=-100,
            reduction="none",
        )
        return nll.sum(1), (labels[:, 1:] != -100).sum(1)

    @torch.no_grad()
    def ridge(self, examples: Sequence[Example], strength: float) -> None:
        """Solve the last linear layer for the mean embedding of the caption's tokens."""
        body, last = self.connector[:-1], self.connector[-1]
        x = torch.cat(
            [
                body(self.features([e.image for e in examples[i : i + 32]])).mean(1)
                for i in range(0, len(examples), 32)
            ]
        )
        table = self.llm.get_input_embeddings().weight.float()
        y = torch.stack([table[e.after[:-1]].mean(0) for e in examples])
        mx, my = x.mean(0), y.mean(0)
        a = (x - mx).T @ (x - mx)
        scale = strength * a.diagonal().mean()
        w = torch.linalg.solve(a + scale * torch.eye(len(a)), (x - mx).T @ (y - my)).T
        last.weight.copy_(w)
        last.bias.copy_(my - w @ mx)

    def fit(
        self, kinds: Sequence[Sequence[Example]], rates: dict[str, float], seconds: float
    ) -> dict[str, float]:
        """Train for `seconds` on batches of 16, equal shares of the kinds; cosine by the clock."""
        groups: list[dict[str, Any]] = [
            {
                "params": [
                    p for n, p in self.named_parameters() if p.requires_grad and n.startswith(part)
                ],
                "lr": lr,
                "peak": lr,
            }
            for part, lr in rates.items()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
        queues: list[list[Example]] = [[] for _ in kinds]
        start, seen, loss = time.monotonic(), 0, math.nan
        while (done := (time.monotonic() - start) / seconds) < 1:
            batch = []
            for kind, queue in zip(kinds, queues, strict=True):
                while len(queue) < 16 // len(kinds):
                    queue.extend(self.random.sample(kind, len(kind)))
                batch += [queue.pop(0) for _ in range(16 // len(kinds))]
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(done / 0.03, 0.5 + 0.5 * math.cos(math.pi * done))
            nll, count = self.losses(batch)
            (nll.sum() / count.sum()).backward()
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen, loss = seen + len(batch), (nll.detach().sum() / count.sum()).item()
        return {"samples": seen, "seconds": time.monotonic() - start, "last_loss": loss}

    def add_lora(self, rank: int) -> None:
        """Low-rank adapters on every linear layer of the language model, in fp32."""
        self.llm = get_peft_model(
            self.llm, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        )
        for parameter in self.llm.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @torch.no_grad()
    def as_model(self, data: Path) -> tuple[Any, Any]:
        """The stack's model and processor with these weights, so that both are measured alike."""
        model, processor = assemble(
            {
                "encoder": {
                    "name": "efficientnet_lite",
                    "path": data / "models/efficientnet-lite0",
                },
                "connector": {"name": "average_pool", "visual_tokens": VISUAL_TOKENS},
                "language_model": {"path": data / "models/SmolLM2-135M-Instruct"},
            },
            dtype=torch.bfloat16,
        )
        norm, first, _, second = self.connector
        for name, part in (("norm", norm), ("first", first), ("second", second)):
            getattr(model.connector, name).load_state_dict(part.state_dict())
        merged = self.llm.merge_and_unload() if hasattr(self.llm, "merge_and_unload") else self.llm
        body = {k: v for k, v in merged.state_dict().items() if v.shape[0] != len(self.tokenizer)}
        model.language_model.load_state_dict(body, strict=False)
        return model, processor


def documents(data: Path, name: str) -> list[Document]:
    """All documents of a source's shards."""
    shards = expand(data / "shards" / f"{name}-*.tar")
    return [read_document(s, i) for s in shards for i in range(len(read_index(s)["offset"]))]


def category_questions(pages: Sequence[Document], phrasings: Sequence[str]) -> list[Document]:
    """The turns that ask for the furniture category, each beside its image, on its own."""
    found = []
    for page in pages:
        said = [part for part in page.parts if isinstance(part, Text)]
        for asked, answer in zip(said[::2], said[1::2], strict=True):
            if asked.text.strip() in phrasings:
                turns = [("user", [page.images[0], asked.text.strip()]), ("assistant", answer.text)]
                found.append(Document.conversation(turns, page.source, page.key))  # type: ignore[arg-type]
    return found


def main() -> None:
    """Train, measure, print and write the figures."""
    parser = argparse.ArgumentParser(
        description="The plain single-process rival of the quick start."
    )
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--align-seconds", type=float, default=180.0)
    parser.add_argument("--lora-seconds", type=float, default=240.0)
    parser.add_argument("--align-lr", type=float, default=1e-3)
    parser.add_argument("--connector-lr", type=float, default=3e-4)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--ridge", type=float, default=0.01, help="strength; 0 starts at random")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/loop-SEED.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def original() -> tuple[Any, Any]:
        return load_language_model(
            options.data / "models" / "SmolLM2-135M-Instruct", torch.bfloat16
        )

    loop = Loop(options.data, options.seed)
    held = HeldOutData.read(options.data)
    captions = [
        loop.example(d) for name in ("stamps", "furniture") for d in documents(options.data, name)
    ]
    instruct = documents(options.data, "instruct")
    questions = [loop.example(d) for d in category_questions(instruct, held.questions["category"])]
    print(f"{len(captions)} captions, {len(questions)} category questions", flush=True)
    start = time.monotonic()
    if options.ridge:
        loop.ridge(captions, options.ridge)
    runs: dict[str, Any] = {"ridge_seconds": time.monotonic() - start}
    runs["align"] = loop.fit([captions], {"connector": options.align_lr}, options.align_seconds)
    print("align", runs["align"], flush=True)
    loop.add_lora(options.rank)
    rates = {"connector": options.connector_lr, "llm": options.lora_lr}
    runs["lora"] = loop.fit([captions, questions], rates, options.lora_seconds)
    print("lora", runs["lora"], flush=True)
    figures = measure(*loop.as_model(options.data), held, original, options.seed)
    result = {
        "arguments": {key: str(value) for key, value in vars(options).items()},
        "training": runs,
        "figures": {name: figure.to_json() for name, figure in figures.items()},
    }
    output = options.output or Path(f"benchmarks/results/loop-{options.seed}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["figures"], indent=1))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
