"""Guards attribution: parts that sum to a shift have contributions that sum to its length, in every family, and what cannot sum is refused."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from test_patching import tuned

from emlens import stats
from emlens.activations import Activations
from emlens.attribution import attribute, contributions
from emlens.models import HookedModel

Parts = list[Activations]


@pytest.fixture
def planted() -> tuple[Activations, Parts]:
    """Shifts of 12 prompts along a direction of their own: 1 from the embedding, 2 and −1 from block 0, 3 and 4 from block 1, and
    much that is across and cancels."""
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(12, 8))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    across = rng.normal(size=(12, 2, 8)) * 5
    across -= np.einsum("pkd,pd,pe->pke", across, unit, unit)
    facts = pd.DataFrame({"id": [f"p{i}" for i in range(12)], "category": list("abc") * 4})

    def acts(site: str, sizes: list[float], extra: np.ndarray | float = 0.0) -> Activations:
        values = np.array(sizes)[None, :, None] * unit[:, None] + extra
        return Activations.from_array(values, facts, site=site)

    parts = [acts("embed", [1]), acts("attn_out", [2, 3], across), acts("mlp_out", [-1, 4], -across)]
    return acts("resid_post", [2, 9]), parts


def test_contributions_are_components_along_each_prompts_own_shift() -> None:
    rng = np.random.default_rng(1)
    parts = rng.normal(size=(5, 7, 16)).astype(np.float32)
    shift = parts.sum(axis=1)
    found = contributions(parts, shift)
    for p in range(5):
        for i in range(7):
            line = np.linalg.lstsq(shift[p, :, None], parts[p, i], rcond=None)[0][0]  # how often the shift is in the part
            assert found[p, i] == pytest.approx(line * np.linalg.norm(shift[p]), abs=1e-5)
    assert np.allclose(found.sum(axis=1), np.linalg.norm(shift, axis=1), rtol=1e-6)
    assert not np.allclose(found[:, 1:].sum(axis=1), np.linalg.norm(shift, axis=1), rtol=1e-2)
    assert np.array_equal(contributions(parts, np.zeros_like(shift)), np.zeros((5, 7)))


def test_planted_contributions_come_back(planted: tuple[Activations, Parts]) -> None:
    shift, parts = planted
    table = attribute(shift, parts)
    assert list(zip(table["layer"], table["site"], strict=True)) == [
        (-1, "embed"), (0, "attn_out"), (0, "mlp_out"), (1, "attn_out"), (1, "mlp_out")
    ]  # fmt: skip
    assert np.allclose(table["contribution"], [1, 2, -1, 3, 4], atol=1e-4) and np.allclose(table["share"], np.array([1, 2, -1, 3, 4]) / 9, atol=1e-4)
    assert (table["n"] == 12).all() and table.attrs["norm"] == pytest.approx(9, abs=1e-4) and table.attrs["rest"] < 1e-5
    lower = attribute(shift, parts, layer=0)
    assert np.allclose(lower["contribution"], [1, 2, -1], atol=1e-4)


def test_prompts_are_paired_by_id(planted: tuple[Activations, Parts]) -> None:
    shift, parts = planted
    shuffled = [one.select(ids=list(one.ids)[::-1]) for one in parts]
    assert np.allclose(attribute(shift, shuffled)["contribution"], [1, 2, -1, 3, 4], atol=1e-4)


@pytest.mark.parametrize("clusters", [None, "category"])
def test_intervals_are_those_of_the_mean_over_prompts(clusters: str | None) -> None:
    rng = np.random.default_rng(2)
    facts = pd.DataFrame({"id": [f"p{i}" for i in range(20)], "category": list("abcde") * 4})
    parts = [Activations.from_array(rng.normal(size=(20, n, 6)), facts, site=s) for s, n in (("embed", 1), ("attn_out", 1), ("mlp_out", 1))]
    shift = Activations.from_array(sum(one.values for one in parts), facts)
    table = attribute(shift, parts, clusters=clusters, seed=3)
    each = attribute(shift, parts, by="prompt")
    wide = each.pivot(index="id", columns=["layer", "site"], values="contribution").loc[shift.ids]
    low, high = stats.bootstrap_interval(wide.to_numpy(), clusters=facts["category"] if clusters else None, seed=3)
    assert np.allclose(table["contribution"], wide.mean()) and np.allclose(table["low"], low) and np.allclose(table["high"], high)
    assert (table["low"] < table["contribution"]).all() and (table["contribution"] < table["high"]).all()
    sums = each.groupby("id")[["contribution", "share"]].sum()
    assert np.allclose(sums["contribution"], each.groupby("id")["norm"].first(), rtol=1e-5) and np.allclose(sums["share"], 1, rtol=1e-5)


def test_no_shift_has_no_shares(planted: tuple[Activations, Parts]) -> None:
    _, parts = planted
    none = [one - one for one in parts]
    shift = Activations.from_array(np.zeros((12, 2, 8)), none[0].facts)
    table = attribute(shift, none)
    assert (table["contribution"] == 0).all() and table["share"].isna().all()
    assert attribute(shift, none, by="prompt")["share"].isna().all()


def test_parts_that_are_not_those_of_the_shift_are_refused(planted: tuple[Activations, Parts]) -> None:
    shift, (embed, attn, mlp) = planted
    for parts, message in (
        ([embed, attn], r"parts are of \['embed', 'attn_out'\]; needed is one each of embed, attn_out, mlp_out"),
        ([embed, attn, attn], "needed is one each"),
        ([embed, attn, mlp.select(layers=[0])], r"mlp_out .*without blocks \[1\]"),
        ([embed, attn.where("category == 'a'"), mlp], "attn_out is at 'last' for 4 prompts"),
        ([embed, Activations.from_array(attn.values, attn.facts, site="attn_out", position="mean"), mlp], "at 'mean'.*the shift's: 'last'"),
        ([embed, attn, Activations.from_array(0 * mlp.values, mlp.facts, site="mlp_out")], r"leave \d+% of the shift at layer 1 over"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(shift, parts)
    with pytest.raises(ValueError, match="by='layer'"):
        attribute(shift, [embed, attn, mlp], by="layer")
    with pytest.raises(ValueError, match="the shift is of attn_out"):
        attribute(attn, [embed, attn, mlp])
    with pytest.raises(KeyError, match="layer 2 was not recorded"):
        attribute(shift, [embed, attn, mlp], layer=2)


# ---- on a model


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
def test_contributions_sum_to_the_shift_in_every_family(family: str, chats: pd.DataFrame) -> None:
    model = tuned(family)
    each = model.attribute(chats.head(2), "bad", by="prompt")
    shift = model.record(chats.head(2), layers=[3], adapter="bad") - model.record(chats.head(2), layers=[3])
    want = pd.Series(np.linalg.norm(shift.values[:, 0], axis=-1), index=shift.ids.to_numpy())
    found = each.groupby("id")["contribution"].sum().loc[want.index]
    assert np.allclose(found, want, rtol=1e-4) and np.allclose(each.groupby("id")["norm"].first().loc[want.index], want, rtol=1e-5)
    without = each[each["site"] != "attn_out"].groupby("id")["contribution"].sum().loc[want.index]
    assert not np.allclose(without, want, rtol=1e-2) and len(each) == 2 * 9


def test_blocks_below_an_adapter_contribute_nothing(chats: pd.DataFrame) -> None:
    table = tuned().attribute(chats, ("bad", [2]), before=None, position="mean", n_boot=50)
    assert (table.query("layer < 2")["contribution"] == 0).all() and (table.query("layer >= 2")["contribution"].abs() > 1e-3).all()
    assert table["share"].sum() == pytest.approx(1, abs=1e-4)
    reverse = tuned().attribute(chats, None, before=("bad", [2]), position="mean", n_boot=50)
    assert np.allclose(reverse["contribution"], table["contribution"], atol=1e-4)  # along the opposite direction, the opposite parts


@pytest.mark.parametrize(("position", "layer"), [("all", 1), ("mean_response", 2), (-1, None)])
def test_positions_and_layers(chats: pd.DataFrame, position: Any, layer: int | None) -> None:
    model: HookedModel = tuned()
    table = model.attribute(chats, "bad", position=position, layer=layer, n_boot=50)
    at = 3 if layer is None else layer
    shift = model.record(chats, layers=[at], position=position, adapter="bad") - model.record(chats, layers=[at], position=position)
    assert table["contribution"].sum() == pytest.approx(np.linalg.norm(shift.values[:, 0], axis=-1).mean(), rel=1e-4)
    assert table["layer"].max() == at and (table["n"] == len(shift)).all()
