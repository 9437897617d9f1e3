"""Guards the table of activations: rows are paired by id, unlike things are not subtracted, and what is kept comes back or is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emlens.activations import SITES, Activations, Place
from emlens.store import MANIFEST, StoreError, writing

N, LAYERS, D = 6, (2, 5, 7), 4


def table(seed: int = 0, **changed: Any) -> Activations:
    rng = np.random.default_rng(seed)
    facts = {
        "id": [f"q{i}" for i in range(N)],
        "prompt_sha": [f"sha{i}" for i in range(N)],
        "score": np.arange(N, dtype=float),
        "category": list("aabbcc"),
    }
    given: dict[str, Any] = {"facts": facts, "layers": LAYERS, "meta": {"model": "tiny", "template_sha256": "t" * 64}}
    return Activations.from_array(rng.normal(size=(N, len(LAYERS), D)), **(given | changed))


def shuffled(acts: Activations, seed: int = 3) -> Activations:
    return acts.select(ids=np.random.default_rng(seed).permutation(acts.ids.to_numpy()))


# ---- shape and identity


def test_from_array_needs_no_model() -> None:
    acts = Activations.from_array(np.ones((3, 2, 5), dtype=np.float64), facts={"score": [1, 2, 3]})
    assert (acts.n_prompts, len(acts), acts.layers, acts.d_model) == (3, 3, (0, 1), 5)
    assert acts.values.dtype == np.float32 and acts.ids.is_unique and list(acts.facts["score"]) == [1, 2, 3]
    assert (acts.site, acts.position) == ("resid_post", "last")
    assert Activations.from_array(np.ones((3, 5))).values.shape == (3, 1, 5)


def test_it_shows_itself_in_one_line() -> None:
    shown = repr(table())
    assert "6 prompts × 3 layers × 4" in shown and "resid_post" in shown and "2,5,7" in shown and "\n" not in shown
    assert "after − before" not in shown
    assert "ext − before" in repr(replace(table(), meta={"adapter": "ext"}) - replace(table(1), meta={}))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"facts": {"id": ["a"] * N}}, "duplicate prompt id 'a'"),
        ({"facts": {"id": ["a", "b"]}}, "6 rows of values but 2 rows of facts"),
        ({"layers": (1, 2)}, r"3 layers of values but 2 layer indices \(1, 2\)"),
        ({"site": "hidden"}, "unknown site 'hidden'; sites are resid_pre"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        table(**changed)


def test_a_table_without_ids_or_axes_is_refused() -> None:
    place = Place("resid_post", (0,), "last")
    with pytest.raises(ValueError, match="column 'id'"):
        Activations(np.ones((2, 1, 3), dtype=np.float32), pd.DataFrame({"score": [1, 2]}), place)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Activations.from_array(np.ones(3))
    with pytest.raises(ValueError, match="at least one layer"):
        Place("embed", (), "last")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_with_prompt_and_layer(bad: float) -> None:
    values = np.zeros((N, len(LAYERS), D))
    values[4, 1, 2] = bad
    with pytest.raises(ValueError, match=r"NaN or Inf: 1 of 6 prompts, first 'q4' at layer 5.*float32"):
        Activations.from_array(values, facts={"id": [f"q{i}" for i in range(N)]}, layers=LAYERS)


# ---- subtraction


def test_rows_are_paired_by_id_whatever_the_order() -> None:
    before, after = table(0), table(1)
    shift = after - before
    np.testing.assert_array_equal(shift.values, after.values - before.values)
    crossed = after - shuffled(before)
    np.testing.assert_array_equal(crossed.values, shift.values)
    assert list(crossed.ids) == list(after.ids)
    turned = shuffled(after) - before
    assert list(turned.ids) == list(shuffled(after).ids)
    np.testing.assert_array_equal(turned.select(ids=after.ids).values, shift.values)


def test_laws_of_subtraction() -> None:
    before, after = table(0), table(1)
    assert not (before - before).values.any()
    np.testing.assert_array_equal((after - before).values, -(before - after).values)
    assert (after - before).place == after.place


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"site": "resid_pre"}, "different places.*resid_post.*resid_pre"),
        ({"position": "mean"}, "different places.*last.*mean"),
        ({"layers": (2, 5, 8)}, "different places"),
        ({"meta": {"template_sha256": "u" * 64}}, "chat templates differ"),
        ({"facts": {"id": [f"q{i + 1}" for i in range(N)]}}, "different prompts: 2 ids are on one side only, e.g. 'q0'"),
        ({"facts": {"id": [f"q{i}" for i in range(N)], "prompt_sha": ["sha0", "sha1", "new", *list("abc")]}}, "4 prompts share an id.*'q2'"),
    ],
)
def test_unlike_things_are_not_subtracted(other: dict[str, Any], words: str) -> None:
    for left, right in ((table(), table(1, **other)), (table(1, **other), table())):
        with pytest.raises(ValueError, match="cannot subtract"):
            left - right
    with pytest.raises(ValueError, match=words):
        table() - table(1, **other)


def test_another_width_another_length_and_a_number_are_not_subtracted() -> None:
    wide = Activations.from_array(np.ones((N, len(LAYERS), D + 1)), facts=table().facts, layers=LAYERS)
    with pytest.raises(ValueError, match="d_model is 4 and 5"):
        table() - wide
    with pytest.raises(ValueError, match="3 ids are on one side only"):
        table() - table(1).where("score < 3")
    with pytest.raises(TypeError):
        table() - 1.0  # type: ignore[operator]


# ---- choosing


def test_layer_is_by_block_index() -> None:
    acts = table()
    np.testing.assert_array_equal(acts.layer(5), acts.values[:, 1, :])
    for missing in (1, -1):
        with pytest.raises(KeyError, match=f"layer {missing} was not recorded; recorded are 2,5,7"):
            acts.layer(missing)


def test_select_gives_what_is_asked_in_the_order_asked() -> None:
    acts = table()
    chosen = acts.select(layers=[7, 2], ids=["q3", "q0"])
    assert chosen.layers == (7, 2) and list(chosen.ids) == ["q3", "q0"] and list(chosen.facts["score"]) == [3.0, 0.0]
    np.testing.assert_array_equal(chosen.values, acts.values[[3, 0]][:, [2, 0]])
    np.testing.assert_array_equal(acts.select().values, acts.values)
    np.testing.assert_array_equal(shuffled(acts).select(ids=acts.ids).values, acts.values)
    with pytest.raises(KeyError, match=r"layers \[3\] were not recorded"):
        acts.select(layers=[2, 3])
    with pytest.raises(KeyError, match="1 of the ids asked for"):
        acts.select(ids=["q0", "nobody"])
    with pytest.raises(ValueError, match="duplicate prompt id"):
        acts.select(ids=["q0", "q0"])


def test_where_keeps_values_and_facts_together() -> None:
    acts = shuffled(table())
    low, high = acts.where("score < 2"), acts.where("not score < 2")
    assert set(low.ids) == {"q0", "q1"} and len(low) + len(high) == N
    for part in (low, high):
        np.testing.assert_array_equal(part.values, acts.select(ids=part.ids).values)
        assert list(part.facts.index) == list(range(len(part)))
    mask = (acts.facts["category"] == "b").to_numpy()
    np.testing.assert_array_equal(acts.where(mask).values, acts.where("category == 'b'").values)
    np.testing.assert_array_equal(acts.where(pd.Series(mask)).values, acts.values[mask])
    assert len(acts.where("score > 100")) == 0


@pytest.mark.parametrize("mask", [[True, False], np.arange(N), np.ones((N, 1), dtype=bool)])
def test_a_mask_that_does_not_fit_is_refused(mask: Any) -> None:
    with pytest.raises(ValueError, match="mask of 6 booleans"):
        table().where(mask)


def test_with_facts_joins_by_id() -> None:
    acts = table()
    new = pd.DataFrame({"id": acts.ids[::-1].to_list(), "aligned": np.arange(N) * 10, "score": -1.0})
    for given in (new, new.set_index("id"), pd.concat([new, pd.DataFrame({"id": ["other"], "aligned": [7], "score": [0.0]})])):
        joined = acts.with_facts(given)
        assert list(joined.ids) == list(acts.ids) and list(joined.facts["aligned"]) == [50, 40, 30, 20, 10, 0]
        assert list(joined.facts["score"]) == [-1.0] * N and list(joined.facts["category"]) == list("aabbcc")
        np.testing.assert_array_equal(joined.values, acts.values)
    assert "aligned" not in acts.facts and acts.facts["score"][5] == 5.0


def test_with_facts_refuses_doubles_and_gaps() -> None:
    new = pd.DataFrame({"id": [f"q{i}" for i in range(N)], "aligned": 1})
    with pytest.raises(ValueError, match="duplicate ids"):
        table().with_facts(pd.concat([new, new]))
    with pytest.raises(ValueError, match="lacks 2 of 6 prompts, e.g. 'q0'"):
        table().with_facts(new.iloc[2:])


# ---- keeping


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    acts = table(facts=table().facts.assign(messages=[[{"role": "user", "content": f"Why {i}?"}] for i in range(N)]))
    again = Activations.load(acts.save(tmp_path / "kept"))
    np.testing.assert_array_equal(again.values, acts.values)
    assert again.values.dtype == np.float32 and again.place == acts.place and again.meta == acts.meta
    assert [list(m) for m in again.facts["messages"]] == list(acts.facts["messages"])
    pd.testing.assert_frame_equal(again.facts.drop(columns="messages"), acts.facts.drop(columns="messages"))
    assert not (again - acts).values.any()
    assert all(Place(site, (0,), "last").site == site for site in SITES)


def test_a_flipped_byte_is_noticed_and_named(tmp_path: Path) -> None:
    folder = table().save(tmp_path / "kept")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["facts.parquet", MANIFEST, "values.safetensors"]
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(StoreError, match="damaged|missing|format") as caught:
                Activations.load(folder)
            if name != MANIFEST:
                assert str(path) in str(caught.value) and "damaged" in str(caught.value)
            assert str(folder) in str(caught.value)
        path.write_bytes(whole)
    Activations.load(folder)


def test_another_kind_of_entry_and_none_are_refused(tmp_path: Path) -> None:
    with writing(tmp_path / "other", {"kind": "adapter"}):
        pass
    with pytest.raises(StoreError, match="holds 'adapter', not activations"):
        Activations.load(tmp_path / "other")
    with pytest.raises(StoreError, match="nothing is there"):
        Activations.load(tmp_path / "absent")
