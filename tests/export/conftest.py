"""The tiny parts that the models' tests are made of."""

from tests.models.conftest import _one_thread_and_a_seed, build, folders

__all__ = ["_one_thread_and_a_seed", "build", "folders"]
