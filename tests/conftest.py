"""Fixtures for every test. torch and transformers are imported only by the tests that ask for a model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import pandas as pd

    from emlens.models import HookedModel


@pytest.fixture(scope="session")
def tiny_model() -> "Callable[..., HookedModel]":
    """``tiny_model(family="llama", seed=0, hidden=32, layers=4, heads=4, context=512)``: a model of its own at each call."""
    import tiny

    return tiny.tiny_model


@pytest.fixture
def tiny_chats() -> list[dict[str, Any]]:
    """Twelve chats with responses of different lengths."""
    import tiny

    return tiny.tiny_chats()


@pytest.fixture(scope="session")
def family_models() -> "dict[str, HookedModel]":
    """One model a family, for the tests that leave it as it is."""
    import tiny

    return {family: tiny.tiny_model(family) for family in tiny.FAMILIES}


@pytest.fixture(scope="session")
def llama(family_models: "dict[str, HookedModel]") -> "HookedModel":
    return family_models["llama"]


@pytest.fixture(scope="session")
def chats() -> "pd.DataFrame":
    """Prompts of mixed length, not sorted by it."""
    import tiny

    from emlens.prompts import load_prompts

    return load_prompts([tiny.tiny_chats()[i] for i in (7, 0, 11, 3, 5)])
