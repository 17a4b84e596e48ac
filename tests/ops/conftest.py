"""The CPU library for the tests of this room: built once into pytest's cache, or skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loftq.ops.cpu.build import BuildError, build_library
from loftq.ops.cpu.library import ISA, Library, find_library, forget_library, why_no_library


@pytest.fixture(scope="session")
def built_cache(pytestconfig: pytest.Config) -> str:
    """LOFTQ_CACHE of a folder that holds the library."""
    folder = str(pytestconfig.cache.mkdir("loftq-cpu"))  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOFTQ_CACHE", folder)
        try:
            build_library()
        except BuildError as error:
            pytest.skip(str(error))
    return folder


@pytest.fixture
def library(built_cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The library, switched on with the best instructions of this CPU."""
    monkeypatch.setenv("LOFTQ_CACHE", built_cache)
    monkeypatch.delenv(ISA, raising=False)
    forget_library()
    found = find_library()
    assert found is not None, why_no_library()
    yield found
    forget_library()
