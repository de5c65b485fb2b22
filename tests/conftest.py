"""For every test: how the files are dealt to processes, and a cache of remote code of its own."""

from __future__ import annotations

import os
import tempfile

import pytest

_modules = tempfile.TemporaryDirectory(prefix="mllm-tests-")
os.environ["HF_MODULES_CACHE"] = _modules.name  # two processes would write the same files there

LAUNCHES = {"one", "two", "four"}
"""Fixtures that launch ranks once for all tests; see tests/training/conftest.py."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a file in one process, and all tests that share the launches."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        shares = LAUNCHES & set(getattr(item, "fixturenames", ()))
        group = "launches" if shares else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
