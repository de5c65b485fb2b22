"""The recipes, fitted to less data or to other data, stay valid recipes."""

from pathlib import Path

import pytest

from mllm.recipe import load, stages
from scripts.quickstart.stages import RECIPES, overrides

FILES = stages(RECIPES)


def names(file: Path, changed: list[str]) -> list[str]:
    """The data sets that a stage reads."""
    return [Path(source.path).name for source in load(file, changed).data.sources]


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    (tmp_path / "raw" / "stamps").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_all_of_the_data_changes_nothing(file: Path, debian: Path) -> None:
    assert overrides(file, debian, 1.0) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_tenth_of_the_data_is_a_tenth_of_the_tokens(file: Path, debian: Path) -> None:
    whole, part = load(file), load(file, overrides(file, debian, 0.1))
    assert whole.run.tokens is not None
    assert part.run.tokens is not None
    assert part.run.tokens >= 2 * whole.run.tokens_per_step
    assert part.run.tokens <= max(0.11 * whole.run.tokens, 2 * whole.run.tokens_per_step)
    assert part.data.sources == whole.data.sources


def test_without_debian_packages_shapes_and_pages_stand_in(tmp_path: Path) -> None:
    read = [names(file, overrides(file, tmp_path, 1.0)) for file in FILES]
    assert read[0] == ["shapes-*.tar"]
    assert set(read[1]) == {"pages-*.tar", "shapes-*.tar"}
    assert set(read[2]) == {"instruct-*.tar", "shapes-*.tar"}
