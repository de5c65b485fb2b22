"""What a recipe may say about the parts of a model and its losses, checked without importing torch.

The tables repeat the registries of mllm.models and mllm.objectives, because those import torch; a
test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

from mllm.recipe_yaml import Path_, closest, nearest

if TYPE_CHECKING:
    from mllm.recipe import (
        ConnectorSection,
        ModelSection,
        SourceSection,
        TrainSection,
    )

PARTS = ("encoder", "connector", "language_model")
"""What a new model is made of."""

MODULES = (*PARTS, "fusion")
"""What `train:` may name."""

OBJECTIVE_NAMES = ("language_modeling",)

_COUNTS = (
    *("cross_every", "depth", "factor", "head_width", "heads", "hidden", "inner", "layers"),
    *("positions", "tiles", "min_tiles", "longest_edge", "every"),
)
"""Options that are whole numbers from 1 on, whichever part has them."""

_SQUARES = ("average_pool", "c_abstractor")  # connectors that pool to a square grid

ENCODER_OPTIONS: dict[str, tuple[str, ...]] = {
    "aimv2": ("resize", "layer"),
    "blip2": ("resize", "layer", "class_cell"),
    "clip": ("resize", "layer"),
    "dinov2": ("resize", "layer", "class_token"),
    "dinov2_with_registers": ("resize", "layer", "class_token"),
    "dinov3_convnext": ("resize", "layer"),
    "dinov3_vit": ("resize", "layer", "class_token"),
    "efficientnet_lite": ("resize",),
    "pair": ("resize", "first", "second"),
    "qwen2_5_vl": ("layer", "min_pixels", "max_pixels"),
    "qwen2_vl": ("layer", "min_pixels", "max_pixels"),
    "qwen3_vl": ("layer", "min_pixels", "max_pixels", "deepstack"),
    "siglip": ("resize", "layer"),
    "siglip2_naflex": ("layer", "max_patches"),
    "timm": ("resize", "layer"),
}
"""Encoder → the options it takes beside name and path."""

BOUNDS = ("min_pixels", "max_pixels", "max_patches")
"""Options of encoders of native resolution that may change beside model.from."""

CONNECTOR_OPTIONS: dict[str, tuple[str, ...]] = {
    "average_pool": ("visual_tokens", "hidden", "norm", "bias"),
    "c_abstractor": ("visual_tokens", "hidden", "depth", "positions"),
    "linear": (),
    "mlp": ("hidden", "norm", "bias"),
    "patch_merger": ("factor", "norm", "norm_after", "hidden", "levels"),
    "pixel_shuffle": ("factor", "layers", "hidden"),
    "q_former": (
        *("path", "text", "visual_tokens", "hidden", "depth", "heads", "inner", "cross_every"),
    ),
    "resampler": ("visual_tokens", "hidden", "depth", "heads", "head_width"),
}
"""Connector → the options it takes beside name and init."""

CONNECTOR_LAST_LINEAR = {
    "average_pool": "second",
    "c_abstractor": "second",
    "linear": "only",
    "mlp": "second",
    "patch_merger": "merger.second",
    "pixel_shuffle": "second",
    "q_former": "language_projection",
    "resampler": "last",
}
"""Connector → the layer inside it that `init: ridge` solves."""

FUSION_OPTIONS: dict[str, tuple[str, ...]] = {
    "cross_attention": ("every", "layers", "heads", "head_width", "inner", "only_immediate"),
    "deepstack": ("layers",),
    "in_sequence": (),
}
"""Fusion → the options it takes."""

WITH_WEIGHTS = ("cross_attention",)
"""Fusions that have something to learn; their gates start closed."""

TILING_OPTIONS: dict[str, tuple[str, ...]] = {
    "any_resolution": ("grids", "tiles"),
    "dynamic": ("tiles", "min_tiles", "thumbnail"),
    "none": (),
    "split": ("longest_edge",),
}
"""Tiling → the options it takes."""


def model_problems(model: ModelSection) -> Iterable[tuple[Path_, str]]:
    """What is wrong with the model section: (path, message)."""
    yield from _parts(model)
    yield from _images(model)
    if model.from_ is not None:
        for part in ("encoder", "language_model", "fusion"):
            if getattr(model, part) is not None and not _bounds_alone(model, part):
                yield (
                    ("model", part),
                    f"model.from already brings the {part}; remove model.{part} or model.from",
                )
        connector = model.connector
        if connector is not None and (connector.name is not None or connector.init is not None):
            yield (
                ("model", "connector"),
                "model.from already brings the connector and its weights; only its "
                "visual_tokens and options can change",
            )
        return
    for part in PARTS:
        if getattr(model, part) is None:
            yield ("model",), f"give model.{part}, or model.from a folder that a stage saved"
    if model.connector is not None and model.connector.name is None:
        yield ("model", "connector"), "give model.connector.name"


def train_problems(
    train: Mapping[str, TrainSection], default_lr: float | None
) -> Iterable[tuple[Path_, str]]:
    """What is wrong with the modules and how they learn: (path, message)."""
    for name, how in train.items():
        path: Path_ = ("train", name)
        root = name.split(".")[0]
        if root not in MODULES:
            yield path, f"train: unknown module {name!r}{nearest(root, MODULES)}"
            continue
        if how.frozen:
            if how.lr or how.lora:
                yield path, f"train.{name} is frozen and has a learning rate; choose one"
            continue
        if how.qlora is not None:
            yield (
                (*path, "qlora"),
                f"train.{name}.qlora is not supported yet (4-bit weights do not learn under "
                "ZeRO-2 and ZeRO-3); use lora: {rank: …}",
            )
        if how.lora is not None and name != "language_model":
            yield (
                (*path, "lora"),
                f"train.{name}: LoRA is for language_model only; give {name} a plain lr",
            )
        if how.lr is None and default_lr is None:
            yield path, f"train.{name} has no learning rate; give train.{name}.lr or optimizer.lr"
    if all(how.frozen for how in train.values()):
        yield ("train",), "nothing would be trained: give at least one module a learning rate"


def fusion_problems(
    model: ModelSection, train: Mapping[str, TrainSection]
) -> Iterable[tuple[Path_, str]]:
    """What is wrong with how visual tokens reach the language model: (path, message)."""
    fusion, path = model.fusion, ("model", "fusion")
    if model.from_ is not None:
        return
    name = "in_sequence" if fusion is None else fusion.name
    trained = [key for key, how in train.items() if key.split(".")[0] == "fusion"]
    if name not in FUSION_OPTIONS:
        yield (*path, "name"), f"unknown fusion {name!r}{nearest(name, FUSION_OPTIONS)}"
        return
    learns = any(not train[key].frozen for key in trained)
    if name in WITH_WEIGHTS and not learns:
        yield (
            path,
            f"model.fusion: the gates of {name} start closed, so nothing would come of images; "
            "give train.fusion a learning rate",
        )
    if name not in WITH_WEIGHTS and learns:
        yield ("train", trained[0]), f"train.{trained[0]}: fusion {name} has nothing to learn"
    if fusion is None:
        return
    given = dict(fusion.options)
    layers = given.pop("layers", None) if "layers" in FUSION_OPTIONS[name] else None
    yield from _options(path, f"fusion {name}", given, FUSION_OPTIONS[name])
    if layers is not None:
        yield from _layers((*path, "layers"), layers)
        if given.get("every") is not None:
            yield (*path, "every"), "model.fusion: give every or layers, not both"
    images = model.images
    cut = images is not None and images.tiling not in (None, "none")
    featured = images is not None and images.options.get("regions") == "feature"
    if name == "cross_attention" and (cut or featured):
        yield (
            ("model", "images"),
            f"fusion {name} takes images whole; leave model.images.{'tiling' if cut else 'regions'}"
            " out, or use fusion in_sequence",
        )
    connector = model.connector
    if name != "in_sequence" and connector is not None and connector.init == "ridge":
        yield (
            ("model", "connector", "init"),
            "model.connector.init: ridge makes visual tokens that are like words, for fusion "
            f"in_sequence; with {name} use init: random",
        )


def _layers(path: Path_, layers: Any) -> Iterable[tuple[Path_, str]]:
    whole = isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers)
    if not whole or not layers or layers != sorted(set(layers)):
        yield (
            path,
            f"{'.'.join(map(str, path))}: expected a list of different layer numbers from 0 on, in "
            f"order, got {layers!r}",
        )


def ridge_problems(
    model: ModelSection, train: Mapping[str, TrainSection]
) -> Iterable[tuple[Path_, str]]:
    """A ridge start of a frozen layer: only what is trained is in a checkpoint."""
    connector = model.connector
    if connector is None or connector.init != "ridge":
        return
    layer = f"connector.{CONNECTOR_LAST_LINEAR.get(connector.name or '', '')}".rstrip(".")
    weight = f"{layer}.weight"
    keys = [key for key in train if weight == key or weight.startswith(f"{key}.")]
    key = max(keys, key=len, default=None)
    if key is None or train[key].frozen:
        why = f"train.{key} is frozen" if key else "train does not name it"
        yield (
            ("model", "connector", "init"),
            f"model.connector.init: ridge solves {layer}, which must be trained, and {why}: a "
            f"resumed run would lose the solution; give train.{layer} a learning rate or use "
            "init: random",
        )


def objective_problems(
    objectives: Sequence[str], sources: Sequence[SourceSection]
) -> Iterable[tuple[Path_, str]]:
    """What is wrong with the losses, and with which source is for which: (path, message)."""
    if not objectives:
        yield ("objectives",), f"objectives is empty; valid: {', '.join(OBJECTIVE_NAMES)}"
    for i, name in enumerate(objectives):
        if name not in OBJECTIVE_NAMES:
            yield (
                ("objectives", i),
                f"unknown objective {name!r}{nearest(name, OBJECTIVE_NAMES)}",
            )
        if name in objectives[:i]:
            yield ("objectives", i), f"the objective {name!r} is given twice"
    for number, source in enumerate(sources):
        if source.objectives is not None:
            path: Path_ = ("data", "sources", number, "objectives")
            yield from _source_objectives(path, source.objectives, objectives)


def _source_objectives(
    path: Path_, names: Sequence[str], objectives: Sequence[str]
) -> Iterable[tuple[Path_, str]]:
    dotted = ".".join(map(str, path))
    if not names:
        yield path, f"{dotted} is empty: leave it out for all; valid: {', '.join(objectives)}"
    for i, name in enumerate(names):
        hint = nearest(name, objectives)
        if name not in OBJECTIVE_NAMES:
            yield (*path, i), f"{dotted}: unknown objective {name!r}{hint}"
        elif name not in objectives:
            yield (*path, i), f"{dotted}: {name!r} is not in the recipe's objectives{hint}"
        if name in names[:i]:
            yield (*path, i), f"{dotted}: the objective {name!r} is given twice"


def _images(model: ModelSection) -> Iterable[tuple[Path_, str]]:
    """What is wrong with how images are cut."""
    images, path = model.images, ("model", "images")
    if images is None:
        return
    name = images.tiling
    if name is None and model.from_ is None:
        yield path, f"give model.images.tiling; valid: {', '.join(TILING_OPTIONS)}"
    elif name is not None and name not in TILING_OPTIONS:
        hint = nearest(name, TILING_OPTIONS)
        yield (*path, "tiling"), f"unknown tiling {name!r}{hint}"
    elif name is not None:
        yield from _options(path, f"tiling {name}", images.options, TILING_OPTIONS[name])
    else:  # it comes with model.from, so its kind is not known here
        every = {option for options in TILING_OPTIONS.values() for option in options}
        yield from _options(path, "tiling", images.options, every)


def _bounds_alone(model: ModelSection, part: str) -> bool:
    """Whether the encoder's section gives nothing but bounds of images of native resolution."""
    encoder = model.encoder
    if part != "encoder" or encoder is None or encoder.name or encoder.path:
        return False
    return bool(encoder.options) and set(encoder.options) <= set(BOUNDS)


def _parts(model: ModelSection) -> Iterable[tuple[Path_, str]]:
    encoder = model.encoder
    if encoder is not None and encoder.name is None and model.from_ is None:
        yield ("model", "encoder"), "give model.encoder.name"
    elif encoder is not None and encoder.name is not None:
        yield from _encoder(("model", "encoder"), encoder.name, encoder.path, encoder.options)
    if model.connector is not None:
        yield from _connector(model.connector)


def _encoder(
    path: Path_, name: str, folder: Any, given: Mapping[str, Any]
) -> Iterable[tuple[Path_, str]]:
    dotted = ".".join(map(str, path))
    options = ENCODER_OPTIONS.get(name)
    if options is None:
        hint = nearest(name, ENCODER_OPTIONS)
        yield (*path, "name"), f"unknown encoder {name!r}{hint}"
    else:
        yield from _options(path, f"encoder {name}", given, options)
    if name == "pair":
        yield from _pair(path, folder, given)
    elif not folder:
        yield path, f"{dotted}.path is missing: give the folder or hub id of its weights"


def _pair(path: Path_, folder: Any, given: Mapping[str, Any]) -> Iterable[tuple[Path_, str]]:
    dotted = ".".join(map(str, path))
    if folder:
        yield (*path, "path"), f"{dotted}.path: a pair has none; its first and second have"
    for part in ("first", "second"):
        place, section = (*path, part), given.get(part)
        if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
            yield (place if part in given else path), f"give {dotted}.{part}: {{name: …, path: …}}"
            continue
        values = dict(section)
        name, own = values.pop("name"), values.pop("path", None)
        if name == "pair":
            yield (*place, "name"), f"{dotted}.{part}: a pair of pairs is not supported"
        elif "resize" in values:
            yield (
                (*place, "resize"),
                f"{dotted}.{part}: both see one view of an image; give {dotted}.resize",
            )
        else:
            yield from _encoder(place, name, own, values)


def _connector(connector: ConnectorSection) -> Iterable[tuple[Path_, str]]:
    path: Path_ = ("model", "connector")
    given = dict(connector.options)
    if connector.visual_tokens is not None:
        given["visual_tokens"] = connector.visual_tokens
    name = connector.name
    if name is None:  # it comes with model.from, so its kind is not known here
        every = {option for options in CONNECTOR_OPTIONS.values() for option in options}
        yield from _options(path, "connector", given, every)
    elif name not in CONNECTOR_OPTIONS:
        hint = nearest(name, CONNECTOR_OPTIONS)
        yield (*path, "name"), f"unknown connector {name!r}{hint}"
        return
    else:
        yield from _options(path, f"connector {name}", given, CONNECTOR_OPTIONS[name])
    tokens = connector.visual_tokens
    if tokens is None and name == "average_pool":
        if "visual_tokens" in (closest(each, CONNECTOR_OPTIONS[name]) for each in given):
            return  # it is misspelt, and the unknown option says so
        yield path, "model.connector.visual_tokens is missing: average_pool needs a square number"
    elif tokens is not None and name in (None, *_SQUARES) and isqrt(tokens) ** 2 != tokens:
        low = max(1, isqrt(tokens))
        yield (
            (*path, "visual_tokens"),
            f"model.connector.visual_tokens must be a square number, got {tokens}; the nearest are "
            f"{low**2} and {(low + 1) ** 2}",
        )


def _options(
    path: Path_, what: str, given: Mapping[str, Any], known: Iterable[str]
) -> Iterable[tuple[Path_, str]]:
    for name, value in given.items():
        place, dotted = (*path, name), ".".join(map(str, (*path, name)))
        if name not in known:
            yield place, f"unknown option {name!r} of the {what}{nearest(name, known)}"
        elif value is None:
            continue
        elif name in (*_COUNTS, "layer") and type(value) is not int:
            yield place, f"{dotted}: expected a whole number, got {value!r}"
        elif name in ("class_token", "thumbnail", "only_immediate") and type(value) is not bool:
            yield place, f"{dotted}: expected true or false, got {value!r}"
        elif name in _COUNTS and value < 1:
            yield place, f"{dotted}: expected greater than 0, got {value!r}"
        elif name == "path" and not (isinstance(value, str) and value):
            yield place, f"{dotted}: expected a folder or hub id, got {value!r}"
        elif name == "text" and value is not False:
            yield place, f"{dotted}: a connector is not given the text yet; leave it out"
