"""Fixtures for every test. torch and transformers are imported only by the tests that ask for a model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
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
