"""Marks that several test files use."""

import pytest

from minigpt.generation.native_library import system_build

compiled = pytest.mark.skipif(
    system_build().library is None, reason=f"no native step: {system_build().reason}"
)
