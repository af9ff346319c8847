"""Clouds inside the test process, one a family, shared by the tests of one file."""

from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest

from tests.families import save
from tests.inprocess import Cloud
from tests.splits import Split, serve, split_of


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def cloud_of(folder_of):
    """One cloud a family for the whole module."""
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(serve(name, folder_of(name))))


@pytest.fixture
def parts_of(cloud_of):
    """Split, cloud and edge of a family; afterwards nothing may be left in the cloud's cache."""
    with ExitStack() as stack:
        clouds = []

        def parts(name: str, kind: str = "per-projection", std: float = 0.5) -> tuple[Split, Cloud, Any]:
            split = split_of(name, kind, std=std)
            clouds.append(cloud_of(name))
            return split, clouds[-1], stack.enter_context(clouds[-1].edge(split.plan, split.matrices))

        yield parts
    for cloud in clouds:
        cloud.close_streams()
        assert cloud.cache.bytes_used == 0
