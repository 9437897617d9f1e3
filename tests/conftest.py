"""Fixtures for every test, and how the fast ones run. torch and transformers are imported only by the tests that ask for a model."""

import gc
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    import pandas as pd

    from emlens.models import HookedModel


def pytest_configure(config: pytest.Config) -> None:
    """One thread, also in what the tests start: tiny models lose more to threads that wait for one another than they gain."""
    gc.disable()  # while the tests are collected: imports make a million objects and no garbage
    if config.option.markexpr == "not slow":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        threadpool_limits(1)  # of numpy, which is there already: a plugin of jaxtyping's imports it


def pytest_collection_finish() -> None:
    gc.enable()
    gc.set_threshold(10_000)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Spare the garbage collector what is there already: a tuning collects by hand, each time over all that the imports made."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """``fsync`` guards against loss of power, which no test here provokes; that it is called, and when, is tested in test_store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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
