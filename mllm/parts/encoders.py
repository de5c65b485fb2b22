"""The vision encoders that a recipe can name."""

from __future__ import annotations

from mllm.parts.option import FLAG, LAYER, SECTION, WHOLE, Option, Part, one_of

_RESIZE = Option(
    one_of("squash", "crop", "pad"),
    "how an image becomes a square",
    otherwise="its file's",
)
_COUNTED = "whose features are taken, -1: the last"
_LAYER = Option(LAYER, _COUNTED, default=-2)
_LAST = Option(LAYER, _COUNTED, default=-1)
_CLASS_TOKEN = Option(FLAG, "beside every cell, for twice the width", default=False)
_PIXELS = {
    "min_pixels": Option(
        WHOLE, "smaller images are scaled up; may change later", None, "its file's", True, 10**8
    ),
    "max_pixels": Option(
        WHOLE, "larger images are scaled down; may change later", None, "its file's", True, 10**8
    ),
}

ENCODERS: dict[str, Part] = {
    "aimv2": Part(
        "AIMv2's vision transformer",
        "models.encoders.aimv2:Aimv2Encoder",
        "{name: aimv2, path: weights/aimv2-large-patch14-224}",
        {"resize": _RESIZE, "layer": _LAST},
    ),
    "blip2": Part(
        "the vision tower of a BLIP-2 folder",
        "models.encoders.blip2:Blip2Encoder",
        "{name: blip2, path: weights/blip2-opt-2.7b}",
        {
            "resize": _RESIZE,
            "layer": _LAST,
            "class_cell": Option(FLAG, "the class token as one more cell", default=True),
        },
    ),
    "clip": Part(
        "CLIP's vision transformer",
        "models.encoders.clip:ClipEncoder",
        "{name: clip, path: weights/clip-vit-large-patch14-336}",
        {"resize": _RESIZE, "layer": _LAYER},
    ),
    "dinov2": Part(
        "DINOv2's vision transformer",
        "models.encoders.dinov2:Dinov2Encoder",
        "{name: dinov2, path: weights/dinov2-large, class_token: true}",
        {"resize": _RESIZE, "layer": _LAYER, "class_token": _CLASS_TOKEN},
    ),
    "dinov2_with_registers": Part(
        "DINOv2's vision transformer with register tokens",
        "models.encoders.dinov2:Dinov2WithRegistersEncoder",
        "{name: dinov2_with_registers, path: weights/dinov2-with-registers-large}",
        {"resize": _RESIZE, "layer": _LAYER, "class_token": _CLASS_TOKEN},
    ),
    "dinov3_convnext": Part(
        "DINOv3's ConvNeXt; layer counts stages",
        "models.encoders.dinov3:Dinov3ConvNextEncoder",
        "{name: dinov3_convnext, path: weights/dinov3-convnext-base, layer: -2}",
        {"resize": _RESIZE, "layer": _LAST},
    ),
    "dinov3_vit": Part(
        "DINOv3's vision transformer",
        "models.encoders.dinov3:Dinov3VitEncoder",
        "{name: dinov3_vit, path: weights/dinov3-vitl16}",
        {"resize": _RESIZE, "layer": _LAYER, "class_token": _CLASS_TOKEN},
    ),
    "efficientnet_lite": Part(
        "EfficientNet-Lite 0 to 4, the features before pooling",
        "models.encoders.efficientnet_lite:EfficientNetLiteEncoder",
        "{name: efficientnet_lite, path: weights/efficientnet-lite0}",
        {"resize": _RESIZE},
    ),
    "idefics3": Part(
        "the SigLIP of Idefics3 and SmolVLM, normalised",
        "models.encoders.idefics3:Idefics3Encoder",
        "{name: idefics3, path: weights/SmolVLM-Instruct}",
        {"resize": _RESIZE, "layer": _LAST},
        ("SmolVLM", "SmolVLM2"),
    ),
    "internvl": Part(
        "InternViT of transformers' InternVL",
        "models.encoders.internvl:InternVlEncoder",
        "{name: internvl, path: weights/InternVL3-1B-hf}",
        {"resize": _RESIZE, "layer": _LAST},
        ("InternViT",),
    ),
    "pair": Part(
        "two of the others side by side; it has no path",
        "models.encoders.pair:PairEncoder",
        "name: pair\n"
        "first: {name: siglip, path: weights/siglip-so400m-patch14-384}\n"
        "second: {name: dinov2, path: weights/dinov2-large, layer: -2}",
        {
            "resize": _RESIZE,
            "first": Option(SECTION, "with its options; its grid and rule count"),
            "second": Option(SECTION, "with its options; brought to that grid"),
        },
    ),
    "qwen2_vl": Part(
        "Qwen2-VL's vision transformer, native resolution",
        "models.encoders.qwen_vl:Qwen2VLEncoder",
        "{name: qwen2_vl, path: weights/Qwen2-VL-2B-Instruct}",
        {"layer": _LAST, **_PIXELS},
    ),
    "qwen2_5_vl": Part(
        "Qwen2.5-VL's vision transformer, attention inside windows",
        "models.encoders.qwen_vl:Qwen2_5VLEncoder",
        "{name: qwen2_5_vl, path: weights/Qwen2.5-VL-3B-Instruct, max_pixels: 1003520}",
        {"layer": _LAST, **_PIXELS},
    ),
    "qwen3_vl": Part(
        "Qwen3-VL's vision transformer, if asked with inner layers",
        "models.encoders.qwen_vl:Qwen3VLEncoder",
        "{name: qwen3_vl, path: weights/Qwen3-VL-4B-Instruct}",
        {
            "layer": _LAST,
            **_PIXELS,
            "deepstack": Option(FLAG, "inner layers beside the last", default=False),
        },
    ),
    "siglip": Part(
        "SigLIP's vision transformer, SigLIP 2's of one resolution",
        "models.encoders.siglip:SiglipEncoder",
        "{name: siglip, path: weights/siglip-so400m-patch14-384}",
        {"resize": _RESIZE, "layer": _LAYER},
        ("SigLIP 2",),
    ),
    "siglip2_naflex": Part(
        "SigLIP 2 of variable resolution (NaFlex)",
        "models.encoders.siglip2_naflex:Siglip2NaflexEncoder",
        "{name: siglip2_naflex, path: weights/siglip2-so400m-patch16-naflex}",
        {
            "layer": _LAYER,
            "max_patches": Option(
                WHOLE,
                "images are scaled to so many; may change later",
                None,
                "its file's",
                True,
                65536,
            ),
        },
        ("SigLIP 2", "NaFlex"),
    ),
    "timm": Part(
        "any backbone of timm; layer counts its feature levels",
        "models.encoders.timm_backbone:TimmEncoder",
        "{name: timm, path: weights/convnext_base.fb_in22k}",
        {"resize": _RESIZE, "layer": _LAST},
    ),
}
"""Name → what it is; the order of `mllm models`."""
