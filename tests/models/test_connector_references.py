"""Connectors against transformers' modules with the same weights, or against the formula."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Idefics2Config,
    InternVLConfig,
    OPTConfig,
    Qwen3VLVisionConfig,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import (
    InternVLModel,
    InternVLMultiModalProjector,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger as Qwen2VLMerger
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from mllm.models.assemble import load
from mllm.models.connectors import CONNECTORS, Connector, PretrainedConnector
from mllm.models.connectors.cells import space_to_depth

QUERIES, VISION, BERT, TEXT = 3, 16, 12, 20


def test_space_to_depth_is_the_shuffle_of_idefics3_and_internvl() -> None:
    cells = torch.randn(64, 5)
    for factor in (2, 4):
        mine = space_to_depth(cells, [(8, 8)], factor)
        idefics = Idefics3Connector.pixel_shuffle(None, cells[None], factor)[0]
        internvl = InternVLModel.pixel_shuffle(None, cells.view(1, 8, 8, 5), 1 / factor)[0]
        assert torch.equal(mine, idefics)
        assert torch.equal(mine, internvl.flatten(0, 1))
        order = functional.pixel_unshuffle(cells.view(8, 8, 5).permute(2, 0, 1), factor)
        assert not torch.equal(mine, order.flatten(1).T)


def test_space_to_depth_pads_right_and_below() -> None:
    grids = [(3, 5), (2, 2)]
    cells = torch.randn(19, 4)
    padded = torch.zeros(4, 6, 4)
    padded[:3, :5] = cells[:15].view(3, 5, 4)
    wanted = [space_to_depth(padded.flatten(0, 1), [(4, 6)], 2), cells[15:].reshape(1, 16)]
    assert torch.equal(space_to_depth(cells, grids, 2), torch.cat(wanted))


def test_pixel_shuffle_is_the_projector_of_internvl() -> None:
    config = InternVLConfig()
    config.vision_config.hidden_size, config.text_config.hidden_size = 6, 8
    theirs = InternVLMultiModalProjector(config)
    mine = CONNECTORS["pixel_shuffle"]({}, 6, 8)
    for own, other in (("norm", "layer_norm"), ("first", "linear_1"), ("second", "linear_2")):
        mine.get_submodule(own).load_state_dict(theirs.get_submodule(other).state_dict())
    cells = torch.randn(16, 6)
    shuffled = InternVLModel.pixel_shuffle(None, cells.view(1, 4, 4, 6)).flatten(0, 2)
    torch.testing.assert_close(mine(cells, [(4, 4)]), theirs(shuffled))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "deepstack"])
def test_patch_merger_is_that_of_qwen(name: str) -> None:
    names = {"norm": "ln_q", "first": "mlp.0", "second": "mlp.2"}
    if name == "qwen2_vl":
        theirs: nn.Module = Qwen2VLMerger(8, 6)
        options: dict[str, Any] = {}
    elif name == "qwen2_5_vl":
        theirs, options = Qwen2_5_VLPatchMerger(8, 6), {"norm": "rms"}
    else:
        config = Qwen3VLVisionConfig(hidden_size=6, out_hidden_size=8)
        options = {"norm_after": name == "deepstack"}
        theirs = Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=name == "deepstack")
        names = {"norm": "norm", "first": "linear_fc1", "second": "linear_fc2"}
    mine = CONNECTORS["patch_merger"](options, 6, 8)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    for own, other in names.items():
        mine.merger.get_submodule(own).load_state_dict(theirs.get_submodule(other).state_dict())
    cells = torch.randn(24, 6)
    blocks = cells.view(2, 2, 3, 2, 6).transpose(1, 2).reshape(24, 6)
    torch.testing.assert_close(mine(cells, [(4, 6)]), theirs(blocks))


def test_one_layer_of_pixel_shuffle_is_that_of_idefics3() -> None:
    mine = CONNECTORS["pixel_shuffle"]({"layers": 1, "factor": 2}, 6, 8)
    cells = torch.randn(16, 6)
    shuffled = Idefics3Connector.pixel_shuffle(None, cells[None], 2)[0]
    wanted = functional.linear(shuffled, mine.second.weight)  # theirs has no bias, ours starts at 0
    torch.testing.assert_close(mine(cells, [(4, 4)]), wanted)


IDEFICS2 = {
    "query_norm": "input_latents_norm",
    "cell_norm": "input_context_norm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def test_resampler_is_that_of_idefics2() -> None:
    config = Idefics2PerceiverConfig(
        hidden_size=8,
        resampler_n_latents=5,
        resampler_depth=2,
        resampler_n_heads=2,
        resampler_head_dim=6,
        num_key_value_heads=2,
    )
    assert Idefics2Config().perceiver_config.resampler_head_dim == 96  # the defaults are theirs
    theirs = Idefics2PerceiverResampler._from_config(config, attn_implementation="eager")
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    spec = {"visual_tokens": 5, "hidden": 8, "depth": 2, "heads": 2, "head_width": 6}
    mine = CONNECTORS["resampler"](spec, 8, 8)
    mine.queries.data.copy_(theirs.latents)
    mine.norm.load_state_dict(theirs.norm.state_dict())
    for one, other in zip(mine.layers, theirs.layers, strict=True):
        for own, name in IDEFICS2.items():
            one.get_submodule(own).load_state_dict(other.get_submodule(name).state_dict())
    cells, mask = torch.randn(2, 12, 8), torch.ones(2, 12)
    mask[1, 6:] = 0
    read = theirs(functional.linear(cells, mine.first.weight), mask)
    wanted = mine.last(read.flatten(0, 1))
    found = mine(torch.cat([cells[0], cells[1, :6]]), [(3, 4), (2, 3)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_c_abstractor_is_what_honeybee_says() -> None:
    spec = {"visual_tokens": 4, "hidden": 8, "depth": 2, "positions": 5}
    mine = CONNECTORS["c_abstractor"](spec, 6, 7)
    cells = torch.randn(25, 6)
    maps = cells.T.view(1, 6, 5, 5) + mine.positions
    for block in mine.before:
        maps = _block(block, maps)
    maps = functional.adaptive_avg_pool2d(maps, (2, 2))
    for block in mine.after:
        maps = _block(block, maps)
    wanted = mine.second(functional.silu(mine.first(maps.flatten(2)[0].T)))
    torch.testing.assert_close(mine(cells, [(5, 5)]), wanted, rtol=1e-4, atol=1e-5)


def _block(block: Any, maps: Tensor) -> Tensor:
    """A RegNet-Y block written as convolutions of maps [1, W, R, K]."""

    def one(layer: Any, x: Tensor) -> Tensor:
        return functional.conv2d(x, layer.weight[:, :, None, None], layer.bias)

    def norm(layer: Any, x: Tensor) -> Tensor:
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    x = functional.silu(norm(block.first_norm, one(block.first, maps)))
    x = functional.conv2d(x, block.depthwise.weight, padding=1, groups=x.shape[1])
    x = functional.silu(norm(block.depthwise_norm, x))
    squeezed = functional.silu(one(block.squeeze, x.mean(dim=(2, 3), keepdim=True)))
    x = norm(block.last_norm, one(block.last, x * one(block.excite, squeezed).sigmoid()))
    shortcut = block.shortcut
    if isinstance(shortcut, torch.nn.Sequential):
        maps = norm(shortcut[1], one(shortcut[0], maps))
    return functional.silu(x + maps)


def test_positions_are_read_interpolated() -> None:
    mine = CONNECTORS["c_abstractor"]({"visual_tokens": 1, "hidden": 4, "positions": 4}, 6, 7)
    read = mine._positions([(4, 4), (2, 2)])
    assert torch.equal(read[:16], mine.positions.flatten(1).T)
    means = functional.avg_pool2d(mine.positions, 2).flatten(1).T
    torch.testing.assert_close(read[16:], means)


# -- BLIP-2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Blip2ForConditionalGeneration, saved in several shards."""
    torch.manual_seed(11)
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(
                hidden_size=VISION,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            ),
            qformer_config=Blip2QFormerConfig(
                hidden_size=BERT,
                num_hidden_layers=3,
                num_attention_heads=3,
                intermediate_size=10,
                encoder_hidden_size=VISION,
            ),
            text_config=OPTConfig(
                hidden_size=TEXT,
                word_embed_proj_dim=TEXT,
                ffn_dim=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=40,
                max_position_embeddings=16,
            ),
            num_query_tokens=QUERIES,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("language_model"):
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("blip") / "tiny"
    model.save_pretrained(folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def q_former(folder: Path, width: int = TEXT, features: int = VISION) -> Connector:
    """The connector that starts from the folder."""
    kind = CONNECTORS["q_former"]
    assert issubclass(kind, PretrainedConnector)
    spec = kind.spec_from_folder({"name": "q_former", "path": str(folder)})
    connector = kind(spec, features, width)
    connector.load_weights(folder)
    return connector


def test_q_former_is_that_of_blip2(blip: Path) -> None:
    theirs = Blip2ForConditionalGeneration.from_pretrained(blip).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = theirs.get_image_features(pixels).pooler_output
        states = theirs.vision_model(pixels).last_hidden_state  # 4 patches after a class token
        found = q_former(blip).train()(states.flatten(0, 1), [(1, 5), (1, 5)])
    assert found.shape == (2 * QUERIES, TEXT)
    torch.testing.assert_close(found, wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_q_former_reads_its_sizes_from_the_folder(blip: Path) -> None:
    connector = q_former(blip)
    assert connector.spec == {
        "name": "q_former",
        "visual_tokens": QUERIES,
        "hidden": BERT,
        "depth": 3,
        "heads": 3,
        "inner": 10,
        "cross_every": 2,
    }
    assert connector.tokens_per_image((4, 4)) == QUERIES


def test_q_former_starts_a_new_projection_for_another_width(
    blip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same, other = q_former(blip), q_former(blip, width=9)
    assert "does not lead to this language model's width, 9" in caplog.text
    assert other.language_projection.out_features == 9
    for name, value in same.state_dict().items():
        if not name.startswith("language_projection"):
            assert torch.equal(other.state_dict()[name], value)


def test_q_former_refuses_what_does_not_fit(
    blip: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is this the encoder that the Q-Former was trained with"):
        q_former(blip, features=6)
    with pytest.raises(ValueError, match="holds a 'llama' model, not a BLIP-2"):
        q_former(folders["llama"])
    with pytest.raises(ValueError, match="there is no folder"):
        q_former(tmp_path / "nothing")
    short = shutil.copytree(blip, tmp_path / "short")
    for file in short.glob("model-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        q_former(short)
    bare = tmp_path / "bare"
    theirs = Blip2ForConditionalGeneration.from_pretrained(blip)
    kept = {name: value for name, value in theirs.state_dict().items() if "layer.2" not in name}
    theirs.save_pretrained(bare, state_dict=kept)
    with pytest.raises(ValueError, match=r"the weight qformer\.encoder\.layer\.2\S+ is missing"):
        q_former(bare)


def test_a_model_from_blip2_no_longer_needs_its_folder(
    blip: Path, build: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(blip, tmp_path / "blip")
    model, processor = build("clip", "q_former", path=str(folder))
    assert "path" not in model.config.connector
    assert processor.connector == model.config.connector
    wanted = q_former(folder, model.connector.last_linear().out_features, model.encoder.width)
    for name in ("query_tokens", "qformer.layernorm.weight"):
        assert torch.equal(model.connector.state_dict()[name], wanted.state_dict()[name])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    again, _ = load(tmp_path / "saved")
    for name, value in model.connector.state_dict().items():
        assert torch.equal(again.connector.state_dict()[name], value)
