"""What a recipe may say about the parts of a model and its losses, checked without importing torch.

What there is and which options it takes is declared in mllm.parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mllm.parts import CONNECTORS, ENCODERS, FUSIONS, IMAGES, OBJECTIVES, TILINGS, Option, Part
from mllm.parts.fusions import DEFAULT, WITH_WEIGHTS
from mllm.parts.option import SECTION, problems
from mllm.recipe_yaml import Path_, closest, nearest

if TYPE_CHECKING:
    from mllm.recipe import (
        ConnectorSection,
        ModelSection,
        SourceSection,
    )
    from mllm.recipe_train import TrainSection

PARTS = ("encoder", "connector", "language_model")
"""What a new model is made of."""

OBJECTIVE_NAMES = tuple(OBJECTIVES)

BOUNDS = {
    name: option
    for part in ENCODERS.values()
    for name, option in part.options.items()
    if option.reloadable
}
"""Options of encoders that may change beside model.from."""

CONNECTOR_LAST_LINEAR = {
    "average_pool": "second",
    "c_abstractor": "second",
    "gemma3": "second",
    "linear": "only",
    "mlp": "second",
    "patch_merger": "merger.second",
    "pixel_shuffle": "second",
    "q_former": "language_projection",
    "resampler": "last",
}
"""Connector → the layer inside it that `init: ridge` solves."""


def model_problems(model: ModelSection) -> Iterable[tuple[Path_, str]]:
    """What is wrong with the model section: (path, message)."""
    yield from _parts(model)
    yield from _images(model)
    yield from _fusion(model)
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


def fusion_problems(
    model: ModelSection, train: Mapping[str, TrainSection]
) -> Iterable[tuple[Path_, str]]:
    """A fusion that would never open its gates, or that has nothing to learn: (path, message)."""
    name = DEFAULT if model.fusion is None else model.fusion.name
    if model.from_ is not None or name not in FUSIONS:
        return
    learning = [
        key for key, how in train.items() if key.split(".")[0] == "fusion" and not how.frozen
    ]
    if name in WITH_WEIGHTS and not learning:
        yield (
            ("model", "fusion"),
            f"model.fusion: the gates of {name} start closed, so nothing would come of images; "
            "give train.fusion a learning rate",
        )
    for key in learning:
        if name in WITH_WEIGHTS and train[key].adapters:
            yield (
                ("train", key),
                f"train.{key}: a new fusion learns in full: its gates start closed and are no "
                "linear layers, so adapters alone would never open them",
            )
    if name not in WITH_WEIGHTS and learning:
        yield ("train", learning[0]), f"train.{learning[0]}: fusion {name} has nothing to learn"


def ridge_problems(
    model: ModelSection, train: Mapping[str, TrainSection]
) -> Iterable[tuple[Path_, str]]:
    """A ridge start of a frozen layer: only what is trained is in a checkpoint."""
    connector = model.connector
    if connector is None or connector.init != "ridge":
        return
    if connector.name == "gemma3" or connector.options.get("bias") is False:
        yield (
            ("model", "connector", "init"),
            "model.connector.init: ridge sets a bias of the last layer, and this connector has "
            "none there; use init: random",
        )
    layer = f"connector.{CONNECTOR_LAST_LINEAR.get(connector.name or '', '')}".rstrip(".")
    weight = f"{layer}.weight"
    keys = [key for key in train if weight == key or weight.startswith(f"{key}.")]
    key = max(keys, key=len, default=None)
    if key is None or not train[key].full:
        how = "is frozen" if key and train[key].frozen else "has adapters over it"
        why = f"train.{key} {how}" if key else "train does not name it"
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
        if not images.options:
            yield path, f"give model.images.tiling; valid: {', '.join(TILINGS)}"
        yield from _options(path, "images without a tiling", images.options, IMAGES)
    elif name is None:  # it comes with model.from, so its kind is not known here
        yield from _options(path, "tiling", images.options, _every_option(TILINGS), whole=False)
    elif name not in TILINGS:
        yield (*path, "tiling"), f"unknown tiling {name!r}{nearest(name, TILINGS)}"
    else:
        yield from _options(path, f"tiling {name}", images.options, TILINGS[name].options)


def _fusion(model: ModelSection) -> Iterable[tuple[Path_, str]]:
    """What is wrong with how visual tokens reach the language model."""
    path: Path_ = ("model", "fusion")
    fusion, images, connector = model.fusion, model.images, model.connector
    if fusion is None:
        return
    name, given = fusion.name, fusion.options
    if name not in FUSIONS:
        yield (*path, "name"), f"unknown fusion {name!r}{nearest(name, FUSIONS)}"
        return
    yield from _options(path, f"fusion {name}", given, FUSIONS[name].options)
    if given.get("every") is not None and given.get("layers") is not None:
        yield (*path, "every"), "model.fusion: give every or layers, not both"
    featured = images is not None and images.options.get("regions") == "feature"
    if name == "cross_attention" and featured:
        yield (
            ("model", "images", "regions"),
            f"fusion {name} has one token for an image and none for a region of it; write "
            f"model.images.regions as decimals or thousandths, or use fusion {DEFAULT}",
        )
    if name != DEFAULT and connector is not None and connector.init == "ridge":
        yield (
            ("model", "connector", "init"),
            "model.connector.init: ridge makes visual tokens that are like words, for fusion "
            f"{DEFAULT}; with {name} use init: random",
        )


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
    elif encoder is not None and _bounds_alone(model, "encoder"):
        yield from _options(("model", "encoder"), "encoder", encoder.options, BOUNDS, whole=False)
    elif encoder is not None and encoder.name is not None:
        yield from _encoder(("model", "encoder"), encoder.name, encoder.path, encoder.options)
    if model.connector is not None:
        yield from _connector(model.connector)


def _encoder(
    path: Path_, name: str, folder: Any, given: Mapping[str, Any]
) -> Iterable[tuple[Path_, str]]:
    dotted = ".".join(map(str, path))
    if name not in ENCODERS:
        yield (*path, "name"), f"unknown encoder {name!r}{nearest(name, ENCODERS)}"
    else:
        yield from _options(path, f"encoder {name}", given, ENCODERS[name].options)
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
        yield from _options(path, "connector", given, _every_option(CONNECTORS), whole=False)
    elif name not in CONNECTORS:
        yield (*path, "name"), f"unknown connector {name!r}{nearest(name, CONNECTORS)}"
    else:
        yield from _options(path, f"connector {name}", given, CONNECTORS[name].options)


def _every_option(parts: Mapping[str, Part]) -> dict[str, Option]:
    """The options of all parts; of one name, that which can change in a saved model."""
    every: dict[str, Option] = {}
    for part in parts.values():
        every |= {n: o for n, o in part.options.items() if n not in every or o.reloadable}
    return every


def _options(
    path: Path_,
    what: str,
    given: Mapping[str, Any],
    known: Mapping[str, Option],
    whole: bool = True,
) -> Iterable[tuple[Path_, str]]:
    """What is wrong with a part's options; `whole`: those that are needed must be among them."""
    misspelt = [name for name in given if name not in known]
    for name in misspelt:
        yield (*path, name), f"unknown option {name!r} of the {what}{nearest(name, known)}"
    meant = {closest(name, known) for name in misspelt}
    dotted = ".".join(map(str, path))
    for name, problem in problems(known, given):
        if known[name].values is SECTION:
            continue  # `_pair` says more of it
        if name in given:
            yield (*path, name), f"{dotted}.{problem}"
        elif whole and name not in meant:
            yield path, f"{dotted}.{problem}"
