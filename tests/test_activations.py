"""Guards the table of activations: rows are paired by id, unlike things are not subtracted or put together, parts of mapped values stay on the
disk, and what is kept or given to others comes back or is refused."""

import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emlens.activations import FACTS, SITES, Activations, Place, write_facts
from emlens.store import MANIFEST, VALUES, StoreError, growing, writing

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


def lazy(acts: Activations) -> bool:
    """Whether the values are still a view of a file."""
    base: Any = acts.values
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def same(a: Activations, b: Activations) -> bool:
    return a.place == b.place and a.meta == b.meta and a.facts.equals(b.facts) and a.values.tobytes() == b.values.tobytes()


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


def test_a_folder_of_recordings_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    table(meta={"model": "tiny", "adapter": "bad"}).save(tmp_path / "store" / "activations-1")
    table(meta={"model": "tiny", "adapter": None}).save(tmp_path / "store" / "activations-2")
    with writing(tmp_path / "store" / "margins-3", {"piece": "margins bad"}):
        pass
    said = (
        r"folder of 3 entries, not one itself. Name one of its 2 activations: .*activations-1 \(bad · resid_post · 3 layers · last\); .*-2 \(before"
    )
    with pytest.raises(StoreError, match=said + r".*em.store.kept\('.*store'\) lists all"):
        Activations.load(tmp_path / "store")
    with pytest.raises(StoreError, match="None of them is activations"):
        with writing(tmp_path / "others" / "margins-3", {"piece": "margins bad"}):
            pass
        Activations.load(tmp_path / "others")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="manifest.json is missing"):
        Activations.load(tmp_path / "empty")


def test_attrs_with_numpy_in_them_are_kept_and_others_are_refused_not_dropped(tmp_path: Path) -> None:
    acts = table()
    acts.facts.attrs = {"scalar": np.float32(0.5), "count": np.int64(3), "array": np.arange(4).reshape(2, 2), "nested": {"mean": [np.float64(1.5)]}}
    again = Activations.load(acts.save(tmp_path / "kept"))
    assert again.facts.attrs == {"scalar": 0.5, "count": 3, "array": [[0, 1], [2, 3]], "nested": {"mean": [1.5]}}
    assert isinstance(acts.facts.attrs["array"], np.ndarray)
    acts.facts.attrs["thing"] = object()
    with pytest.raises(TypeError, match="cannot make a key or manifest of object"):
        acts.save(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


# ---- mapped values


@pytest.fixture
def kept(tmp_path: Path) -> Activations:
    """Opened from the disk."""
    return Activations.load(table().save(tmp_path / "kept"))


def test_what_is_loaded_is_mapped_and_cannot_be_changed(kept: Activations) -> None:
    assert isinstance(kept.values, np.memmap) and lazy(kept) and not lazy(table()) and same(kept, table())
    with pytest.raises(ValueError, match="read-only"):
        kept.values[0, 0, 0] = 1
    mine = kept.to_numpy()
    mine[0] = 0
    assert type(mine) is np.ndarray and kept.values[0].any()


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, None, 2), slice(None, None, -1), slice(4, 2), slice(-2, None)])
def test_slices_stay_on_the_disk(rows: slice, kept: Activations) -> None:
    part = kept[rows]
    assert lazy(part) or not len(part)
    np.testing.assert_array_equal(part.values, table().values[rows])
    assert list(part.ids) == list(table().ids[rows]) and list(part.facts.index) == list(range(len(part)))
    assert part.place == kept.place and part.meta == kept.meta


def test_layers_and_even_rows_stay_on_the_disk_others_are_read(kept: Activations) -> None:
    for part in (
        kept.select(layers=[5]),
        kept.select(layers=[2, 7]),
        kept.select(layers=LAYERS),
        kept.select(ids=["q1", "q3", "q5"]),
        kept.where("score > 2"),
        kept.where(np.ones(N, dtype=bool)),
        kept[[1, 2, 3]],
        kept[2],
        kept.with_facts(kept.facts.assign(aligned=1)),
        kept[1:5].select(layers=[5, 7], ids=["q2", "q4"]),
    ):
        assert lazy(part), part
    for part in (kept.select(layers=[7, 2]), kept[[3, 1]], kept[[0, 1, 3]], shuffled(kept), kept - table(1)):
        assert not lazy(part), part


def test_rows_are_chosen_as_from_the_array() -> None:
    acts, values = table(), table().values
    mask = np.array([True, False, True, True, False, False])
    for rows in ([3, 1], [-1, 0], np.array([5]), mask, mask.tolist(), pd.Series(mask), [], np.zeros(N, dtype=bool), range(2, 4), slice(2)):
        chosen = acts[rows]
        index = np.asarray(rows, dtype=None if len(np.asarray(rows)) else int) if not isinstance(rows, slice) else rows
        np.testing.assert_array_equal(chosen.values, values[index])
        assert list(chosen.ids) == list(acts.ids.to_numpy()[index])
    assert list(acts[4].ids) == list(acts[-2].ids) == ["q4"] and [str(one.ids[0]) for one in acts] == list(acts.ids)


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ((1, 2), TypeError, r"give a slice, row numbers or a mask.*select\(layers=…\)"),
        ("q1", TypeError, r"select\(ids=…\)"),
        (["q1"], TypeError, "does not choose prompts"),
        (1.0, TypeError, "does not choose prompts"),
        ([[0, 1]], TypeError, "does not choose prompts"),
        (None, TypeError, "does not choose prompts"),
        (N, IndexError, "row 6 is outside: there are 6 prompts"),
        ([0, -N - 1], IndexError, "row -7 is outside"),
        ([True, False], ValueError, "mask of 6 booleans"),
        ([1, 1], ValueError, "duplicate prompt id 'q1'"),
    ],
)
def test_what_chooses_no_rows_is_refused(rows: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        table()[rows]


def test_loading_and_choosing_read_no_values_but_users_arrays_are_looked_through(kept: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    real = np.isfinite
    monkeypatch.setattr(np, "isfinite", lambda x: looked.append(np.shape(x)) or real(x))
    folder = Path(kept.values.filename).parent  # type: ignore[attr-defined, union-attr]
    again = Activations.load(folder)
    again[1:].select(layers=[2]).where("score > 1").with_facts(kept.facts).to_pandas()
    Activations.concat([again[:2], again[2:]])
    assert looked == []
    bad = table().values.copy()
    bad[3, 1, 2] = np.nan
    for make in (lambda: replace(again, values=bad), lambda: Activations(bad, again.facts, again.place), lambda: Activations.from_array(bad)):
        with pytest.raises(ValueError, match="NaN or Inf: 1 of 6 prompts"):
            make()
    assert looked
    overflow = replace(again, values=np.full(bad.shape, 3e38, dtype=np.float32))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="NaN or Inf"):
        overflow - replace(again, values=-overflow.values)


def test_nan_is_found_wherever_it_lies_in_a_large_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emlens.store.tensors.PIECE", 3 * 2 * 5 * 4)
    values = np.zeros((11, 2, 5), dtype=np.float32)
    Activations.from_array(values)
    for row in range(11):
        values[row, 1, 4] = np.inf
        with pytest.raises(ValueError, match=rf"1 of 11 prompts, first 'row-{row:05d}' at layer 1"):
            Activations.from_array(values)
        values[row] = 0


def test_verify_false_does_not_read_but_sees_a_cut_file(tmp_path: Path) -> None:
    folder = table().save(tmp_path / "kept")
    with open(folder / VALUES, "r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\x11")
    with pytest.raises(StoreError, match="values.safetensors is damaged: its content"):
        Activations.load(folder)
    assert len(Activations.load(folder, verify=False)) == N
    with open(folder / VALUES, "r+b") as handle:
        handle.truncate(200)
    with pytest.raises(StoreError, match="values.safetensors is damaged: it has 200 bytes"):
        Activations.load(folder, verify=False)


def test_saving_replaces_nothing_but_itself_unless_told(tmp_path: Path) -> None:
    acts = table(meta={"model": "tiny", "adapter": "bad"})
    folder = acts.save(tmp_path / "kept")
    assert same(Activations.load(acts.save(folder)), acts), "the same again is no loss"
    for other, what in (
        (table(1, meta=acts.meta), "other values or facts"),
        (table(), "something else"),
        (acts.with_facts(acts.facts.assign(x=1)), "other"),
    ):
        with pytest.raises(StoreError, match=rf"kept holds {what}.* already: activations · bad · tiny · resid_post · 3 layers · last.*replace=True"):
            other.save(folder)
        assert same(Activations.load(folder), acts) and [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert same(Activations.load(table(1).save(folder, replace=True)), table(1))


@pytest.mark.parametrize("replace", [False, True])
def test_saving_removes_no_files_of_others(replace: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    assert same(Activations.load(table().save(tmp_path / "thesis", replace=replace)), table()), "an empty folder is as good as none"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "chapter.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"mine holds files that are no entry of emlens \(chapter.txt\)"):
        table().save(tmp_path / "mine", replace=replace)
    assert (tmp_path / "mine" / "chapter.txt").read_text() == "years of work"


def test_mapped_values_are_saved_again_anywhere_even_in_their_own_place(kept: Activations, tmp_path: Path) -> None:
    turned = Activations.load(kept[::-1].save(tmp_path / "turned"))
    assert same(turned, table()[::-1]) and same(Activations.load(turned[::-1].save(tmp_path / "turned", replace=True)), table())
    assert same(Activations.load(table()[:0].save(tmp_path / "empty")), table()[:0])


def test_a_recording_that_grew_is_opened_like_one_that_was_saved(tmp_path: Path) -> None:
    acts = table(meta={"model": "tiny", "noise_floor": {2: 0.1, 5: 0.2, 7: 0.4}})
    made_by = {"kind": "activations", "site": acts.site, "layers": acts.layers, "position": acts.position, "meta": acts.meta}
    with growing(tmp_path / "grown", made_by, acts.values.shape) as grow:
        write_facts(acts.facts, grow.folder)
        for shard, rows in enumerate(([5, 0], [1, 2, 4], [3])):
            grow.put(shard, rows, acts.values[rows])
    grown, saved = Activations.load(tmp_path / "grown"), Activations.load(acts.save(tmp_path / "saved"))
    assert same(grown, saved) and same(grown, acts) and lazy(grown)
    for name in (VALUES, FACTS):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


READING = """
import sys

import numpy as np
from emlens.activations import Activations


def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024


Activations.from_array(np.ones((2, 2, 2))).to_pandas()
before = peak()
acts = Activations.load(sys.argv[1])
part = acts[10:20].select(layers=[3, 4])
assert part.values.sum() == 2 * 2048 * sum(range(10, 20)), part.values.sum()
assert acts.where("score > 250").values.shape == (5, 32, 2048) and "≈" not in repr(acts)
if sys.argv[2] == "all":
    acts.to_numpy()
print(peak() - before)
"""


def test_another_process_reads_what_is_larger_than_it_may_grow(tmp_path: Path) -> None:
    values = np.broadcast_to(np.arange(256, dtype=np.float32)[:, None, None], (256, 32, 2048))
    Activations.from_array(values, {"score": np.arange(256)}).save(tmp_path / "kept")
    grown = {}
    for mode in ("part", "all"):
        done = subprocess.run([sys.executable, "-c", READING, str(tmp_path / "kept"), mode], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        grown[mode] = float(done.stdout)
    assert grown["part"] < 24 and grown["all"] > 54 < (tmp_path / "kept" / VALUES).stat().st_size / 2**20


# ---- putting together


def test_parts_put_together_are_the_whole() -> None:
    acts = table()
    for cuts in ([0, 6], [0, 2, 6], [0, 1, 1, 3, 6]):
        assert same(Activations.concat(acts[a:b] for a, b in zip(cuts, cuts[1:], strict=False)), acts)
    other = Activations.concat([acts[3:], acts[:3]])
    assert list(other.ids) == ["q3", "q4", "q5", "q0", "q1", "q2"] and same(other.select(ids=acts.ids), acts)


def test_the_facts_of_parts_are_joined_by_name() -> None:
    first, second = table()[:2], table()[2:].with_facts(table().facts[["id"]].assign(aligned=5.0))
    first.facts.attrs, second.facts.attrs = {"source": "a", "seed": np.int64(1)}, {"source": "b", "seed": 1}
    both = Activations.concat([first, second])
    assert both.facts["aligned"].isna().tolist() == [True, True, False, False, False, False] and list(both.facts["score"]) == list(range(N))
    assert both.facts.attrs == {"seed": 1}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"site": "resid_pre"}, "different places.*resid_post.*resid_pre"),
        ({"position": "mean"}, "different places"),
        ({"layers": (2, 5, 8)}, "different places"),
        ({"meta": {"template_sha256": "u" * 64}}, r"chat templates differ \(tttttttt and uuuuuuuu\)\. Give both models one chat_template\."),
        ({"meta": {"architecture": "LlamaForCausalLM 4×4"}}, "two different architectures, GPT2LMHeadModel 3×4 and LlamaForCausalLM 4×4"),
    ],
)
def test_unlike_things_are_not_put_together(other: dict[str, Any], words: str) -> None:
    meta = {"architecture": "GPT2LMHeadModel 3×4", "template_sha256": "t" * 64}
    with pytest.raises(ValueError, match=f"cannot put together.*{words}"):
        Activations.concat([table(meta=meta)[:2], table(**other)[2:]])


def test_a_prompt_twice_another_width_and_nothing_are_not_put_together() -> None:
    with pytest.raises(ValueError, match="prompt id 'q2' is in two parts"):
        Activations.concat([table()[:3], table()[2:]])
    wide = Activations.from_array(np.ones((N, len(LAYERS), D + 1)), facts=table().facts, layers=LAYERS)
    with pytest.raises(ValueError, match="cannot put together: d_model is 4 and 5"):
        Activations.concat([table()[:3], wide[3:]])
    with pytest.raises(ValueError, match="give at least one"):
        Activations.concat([])


def test_what_parts_say_differently_is_kept_apart() -> None:
    metas = [{"model": "tiny", "adapter": None, "dtype": "float32"}, {"model": "tiny", "adapter": "ext", "dtype": "float32"}]
    first, second, third = (table(meta=m)[i * 2 : i * 2 + 2] for i, m in enumerate([*metas, metas[0]]))
    both = Activations.concat([first, second])
    assert both.meta == {"model": "tiny", "dtype": "float32", "parts": [{"adapter": None}, {"adapter": "ext"}]}
    assert Activations.concat([both, third]).meta == both.meta == Activations.concat([first, second, third]).meta
    assert Activations.concat([first, third]).meta == metas[0]


# ---- noise and two loads


def noisy(floor: dict[int, float] | None, seed: int = 0, **meta: Any) -> Activations:
    return table(seed, meta={"model": "tiny", **meta, **({"noise_floor": floor} if floor else {})})


def test_the_noise_of_both_sides_is_carried_and_shown_beside_the_shift() -> None:
    after, before = noisy({2: 3.0, 5: 0.6, 7: 1.0}, 1, adapter="ext"), noisy({2: 4.0, 5: 0.8, 7: 0.0})
    shift = after - before
    assert shift.meta["noise_floor"] == pytest.approx({2: 5.0, 5: 1.0, 7: 1.0})
    rms = np.median(np.sqrt((shift.values.astype(np.float64) ** 2).mean(axis=(0, 2))))
    assert f"rms {rms:.3g}, noise floor 1" in repr(shift) and "rms" not in repr(table() - table(1))
    assert (noisy({2: 3.0}) - noisy(None)).meta["noise_floor"] == {2: 3.0} == (noisy(None) - noisy({2: 3.0})).meta["noise_floor"]
    assert "noise_floor" not in (noisy(None) - noisy(None)).meta


def test_the_noise_of_chosen_layers_goes_with_them_to_the_disk_and_back(tmp_path: Path) -> None:
    acts = noisy({2: 3.0, 5: 0.5, 7: 1.0}).select(layers=[7, 2])
    assert list(acts.meta["noise_floor"].items()) == [(7, 1.0), (2, 3.0)] and "noise floor 2" in repr(acts)
    again = Activations.load(acts.save(tmp_path / "kept"))
    assert again.meta == acts.meta and again.select(layers=[2]).meta["noise_floor"] == {2: 3.0}
    assert (again - acts).meta["noise_floor"][2] == pytest.approx(3 * np.sqrt(2))


def test_the_noise_of_parts_is_pooled_over_prompts() -> None:
    a, b, c = noisy({2: 1.0})[:1], noisy({2: 2.0})[1:3], noisy(None)[3:]
    pooled = Activations.concat([a, b, c]).meta["noise_floor"]
    assert pooled == pytest.approx({2: np.sqrt((1 + 2 * 4 + 3 * 0) / 6)})
    assert Activations.concat([Activations.concat([a, b]), c]).meta["noise_floor"] == pytest.approx(pooled)


def test_the_rms_of_a_large_array_is_estimated_and_said_so() -> None:
    values = np.ones((1000, 1, 2), dtype=np.float32)
    acts = Activations.from_array(values, layers=[3], meta={"noise_floor": {3: 0.01}})
    assert "rms ≈ 1, noise floor 0.01" in repr(acts) and "rms 1, noise floor 0.01" in repr(acts[:256])


LOADS = {
    "base": {"model": "Qwen-0.5B", "weights": {"weights_sha256": "a" * 64}, "adapter": None},
    "tuned": {"model": "runs/full", "weights": {"weights_sha256": "b" * 64}, "adapter": None},
    "revision": {"model": "Qwen-0.5B", "weights": {"weights_sha256": "c" * 64}, "adapter": None},
    "adapted": {"model": "runs/full", "weights": {"weights_sha256": "b" * 64}, "adapter": "ext", "adapter_layers": [3, 4]},
}


@pytest.mark.parametrize(
    ("after", "before", "shown"),
    [
        ("tuned", "base", "runs/full − Qwen-0.5B"),
        ("revision", "base", "Qwen-0.5B cccccccc − Qwen-0.5B aaaaaaaa"),
        ("adapted", "base", "runs/full ext in layers 3,4 − Qwen-0.5B"),
        ("adapted", "tuned", "ext in layers 3,4 − before"),
    ],
)
def test_a_difference_of_two_loads_says_which(after: str, before: str, shown: str) -> None:
    shift = table(1, meta=LOADS[after]) - table(meta=LOADS[before])
    assert f" · {shown}" in repr(shift) and shift.meta["weights"] == LOADS[after]["weights"]
    assert {**shift.meta, **shift.meta["before"]}["weights"] == LOADS[before]["weights"]
    np.testing.assert_array_equal(shift.values, table(1).values - table().values)
    with pytest.raises(ValueError, match="cannot subtract: two different architectures, A 2×4 and A 3×4"):
        table(1, meta={**LOADS[after], "architecture": "A 2×4"}) - table(meta={**LOADS[before], "architecture": "A 3×4"})


RECORDED = {"model": "tiny", "adapter": None, "prompts_sha256": "p" * 64, "plan": {"budget": 8}}
"""Some of what a recording says of itself."""


def test_whether_it_is_a_shift_is_known_wherever_it_goes(tmp_path: Path) -> None:
    before, after = table(meta=RECORDED), table(1, meta={**RECORDED, "adapter": "bad"})
    shift = after - before
    assert (table().is_shift, before.is_shift, shift.is_shift, (table(1) - table()).is_shift, (shift - shift).is_shift) == (
        None,
        False,
        True,
        True,
        True,
    )
    again = table(2, meta={**RECORDED, "adapter": "sound"}) - before
    for acts, known in ((before, False), (shift, True)):
        ways = [acts[1:3], acts.select(layers=[5]), acts.where("score > 2"), acts.with_facts(acts.facts.assign(x=1))]
        ways += [
            Activations.load(acts.save(tmp_path / str(known))),
            Activations.from_pandas(acts.to_pandas()),
            Activations.from_dataset(acts.to_dataset()),
        ]
        other = replace(before, meta={**RECORDED, "prompts_sha256": "q" * 64}) if not known else again
        assert {a.is_shift for a in [*ways, Activations.concat([acts[:2], other[2:]])]} == {known}
    with pytest.raises(ValueError, match="cannot put together shifts and recordings"):
        Activations.concat([shift[:2], before[2:]])
    assert Activations.concat([shift[:2], table()[2:]]).is_shift is None


def test_it_shows_which_variant_it_is() -> None:
    before, after = table(meta=RECORDED), table(1, meta={**RECORDED, "adapter": "bad"})
    assert repr(before).endswith("resid_post · layers 2,5,7 · last · tiny · loaded weights") and repr(after).endswith("· tiny · adapter bad")
    part = table(1, meta={**RECORDED, "adapter": "bad", "adapter_layers": [3, 4]})
    assert repr(part).endswith("tiny · adapter bad in layers 3,4") and repr(part - before).endswith("last · tiny · bad in layers 3,4 − before")
    assert repr(table(meta={**RECORDED, "edits": [{"strength": 1}]})).endswith("tiny · loaded weights edited")
    assert repr(Activations.concat([before[:2], after[2:]])).endswith("tiny · loaded weights, adapter bad")
    arrays = [Activations.from_array(np.ones((2, 1, 3)) * i) for i in (1, 2)]
    assert repr(arrays[0]).endswith(" · last") and repr(arrays[1] - arrays[0]).endswith("after − before")
    assert "<th>variant</th><td>tiny · adapter bad" in after._repr_html_()


def test_differences_of_differences_and_edited_runs_are_named_as_such() -> None:
    runs = [table(i, meta={"adapter": name}) for i, name in enumerate([None, "bad", "sound"])]
    before, bad, sound = runs
    assert "(bad − before) − (sound − before)" in repr((bad - before) - (sound - before))
    assert "before edited − before" in repr(table(meta={"edits": [{"strength": 1}]}) - table())


def test_different_templates_are_subtracted_only_when_told_and_it_is_shown() -> None:
    after, before = table(1, meta={"template_sha256": "u" * 64}), table()
    with pytest.raises(ValueError, match=r"chat templates differ.*after.minus\(before, templates_differ=True\)"):
        after - before
    shift = after.minus(before, templates_differ=True)
    np.testing.assert_array_equal(shift.values, after.values - before.values)
    assert "(templates differ)" in repr(shift) and shift.meta["before"]["template_sha256"] == "t" * 64
    assert "templates differ" not in repr(table(1).minus(table(), templates_differ=True))


def test_prompts_cut_into_other_numbers_of_tokens_are_not_subtracted() -> None:
    counted = [table(i).with_facts(table().facts[["id"]].assign(n_tokens=[3, 4, n, 6, 7, 8])) for i, n in enumerate([5, 9])]
    with pytest.raises(ValueError, match=r"1 prompts share an id but not a number of tokens \(two tokenizers\?\), first 'q2'"):
        counted[1] - counted[0]
    np.testing.assert_array_equal(counted[1].minus(counted[0], templates_differ=True).values, table(1).values - table().values)
    unknown = replace(counted[1], facts=counted[1].facts.assign(n_tokens=np.nan))
    np.testing.assert_array_equal((unknown - counted[0]).values, table(1).values - table().values)


# ---- showing, and to others


def test_it_shows_itself_as_a_small_table_in_notebooks(kept: Activations) -> None:
    shown = replace(kept, meta={"model": "<tiny>", "dtype": "bfloat16", "noise_floor": {2: 0.5}})._repr_html_()
    assert shown.startswith("<table>") and "&lt;tiny&gt;" in shown and "<tiny>" not in shown and "bfloat16" in shown and "noise floor 0.5" in shown
    assert "on the disk" in shown and "in memory" in table()._repr_html_() and "id, prompt_sha, score, category" in shown
    assert "<th>shift</th><td>tiny · before − before" in (kept - kept)._repr_html_() and "<th>shift" not in shown


def test_a_frame_comes_back_whatever_the_order_of_its_rows() -> None:
    acts = table(site="mlp_out", position="mean", meta={"model": "tiny", "noise_floor": {2: 0.5}})
    frame = acts.to_pandas()
    assert frame.shape == (N * len(LAYERS), D) and frame.index.names == ["id", "layer"]
    np.testing.assert_array_equal(frame.loc[("q3", 5)].to_numpy(), acts.select(ids=["q3"]).layer(5)[0])
    assert same(Activations.from_pandas(frame, acts.facts), acts)
    mixed = Activations.from_pandas(frame.sample(frac=1, random_state=0), acts.facts)
    assert mixed.layers != LAYERS and same(mixed.select(layers=LAYERS, ids=acts.ids), acts)
    joined = frame.join(acts.facts.set_index("id"))
    assert list(joined.loc[("q4", slice(None)), "score"]) == [4.0] * 3


def test_a_frame_with_gaps_or_another_index_is_refused() -> None:
    frame = table().to_pandas()
    for damaged in (frame.iloc[1:], pd.concat([frame, frame.iloc[:1]])):
        with pytest.raises(ValueError, match=r"6 prompts × 3 layers need 18 rows, each once; found 1[79]"):
            Activations.from_pandas(damaged)
    with pytest.raises(ValueError, match=r"index of 'id' and 'layer'; found \[None\]"):
        Activations.from_pandas(frame.reset_index(drop=True))
    with pytest.raises(ValueError, match="NaN or Inf"):
        Activations.from_pandas(frame.where(frame > frame.min().min()))


def test_a_dataset_comes_back(tmp_path: Path) -> None:
    import datasets

    acts = table(site="mlp_out", meta={"model": "tiny", "noise_floor": {2: 0.5}})
    made = acts.to_dataset()
    assert isinstance(made, datasets.Dataset) and made.column_names == [*acts.facts.columns, "layer_2", "layer_5", "layer_7"]
    assert made.features["layer_5"].feature.dtype == "float32" and made[3]["layer_5"] == acts.values[3, 1].tolist()
    assert same(Activations.from_dataset(made), acts)
    made.save_to_disk(tmp_path / "set")
    assert same(Activations.from_dataset(datasets.load_from_disk(tmp_path / "set")), acts)
    assert same(Activations.from_dataset(made.select([4, 1])), acts[[4, 1]])
    foreign = datasets.Dataset.from_dict({"layer_1": [[1.0, 2.0]], "layer_x": [3]})
    foreign.info.description = "a set of ours"
    assert Activations.from_dataset(foreign).layers == (1,) and list(Activations.from_dataset(foreign).facts.columns) == ["id", "layer_x"]
    with pytest.raises(ValueError, match=r"no columns layer_0, layer_1, …; its columns are \['layer_x'\]"):
        Activations.from_dataset(foreign.remove_columns("layer_1"))
