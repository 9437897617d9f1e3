"""Guards directions: mean differences, projections, files; and that a direction is believed on unseen prompts only."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import stats as scipy_stats

from emlens import directions
from emlens.activations import Activations
from emlens.directions import Direction

D, LAYERS = 16, (2, 5, 9)
CATEGORIES = np.repeat([f"c{i}" for i in range(8)], 4)


def acts(values, ids=None, layers=LAYERS, site="resid_post", **facts):
    names = [f"q{i}" for i in range(len(values))] if ids is None else ids
    return Activations.from_array(values, {"id": names, **facts}, layers=layers, site=site)


def variants(strength, seed=0, n=32, noise=0.3, layers=LAYERS):
    """The same prompts in two variants; in `a` each is moved by `strength` along one direction a layer."""
    rng = np.random.default_rng(seed)
    shape = (n, len(layers), D)
    prompts, planted = 3 * rng.standard_normal(shape) + 5, rng.standard_normal((len(layers), D))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    a = prompts + noise * rng.standard_normal(shape) + strength * planted
    b = prompts + noise * rng.standard_normal(shape)
    category = np.repeat([f"c{i}" for i in range(8)], n // 8)
    return acts(a, layers=layers, category=category), acts(b, layers=layers, category=category), planted


# ---- the noun


def test_mean_difference_finds_a_planted_direction_and_keeps_its_length():
    a, b, planted = variants(4.0, n=400)
    d = directions.mean_difference(a, b, name="planted")
    assert ((d.vectors * planted).sum(axis=1) > 0.98).all() and np.allclose(d.norms, 4, atol=0.2)
    assert d.layers == LAYERS and d.name == "planted" and d.meta["a"]["n"] == 400 and d.meta["position"] == "last"
    assert np.allclose(d.layer(5), (a.layer(5).mean(axis=0) - b.layer(5).mean(axis=0)) / d.norms[1], atol=1e-5)
    assert np.allclose(directions.mean_difference(b, a).vectors, -d.vectors)
    assert repr(d) == "Direction 'planted' · 3 layers × 16 · resid_post · layers 2,5,9 · last"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a, b: (a, b.select(layers=[2, 5])), "different places"),
        (lambda a, b: (a, acts(b.values, site="attn_out")), "different places"),
        (lambda a, b: (a, acts(b.values[:, :, :8])), "d_model 16 and 8"),
        (lambda a, b: (a.where(np.zeros(32, dtype=bool)), b), "side a holds no prompt"),
        (lambda a, b: (a, a), r"no direction at layers \[2, 5, 9\]"),
    ],
)
def test_mean_difference_refuses(spoil, says):
    with pytest.raises(ValueError, match=says):
        directions.mean_difference(*spoil(*variants(1.0)[:2]))


@pytest.mark.parametrize(
    ("vectors", "layers", "says"),
    [
        (np.ones((2, 4), dtype=np.float32), (0, 1), "layer 0 has length 2, not 1"),
        (np.eye(4, dtype=np.float32)[:2] * np.float32(np.nan), (3, 4), "layer 3 has length nan"),
        (np.eye(4, dtype=np.float32)[:2], (0,), "for 1 layers"),
    ],
)
def test_a_direction_that_is_none_is_refused(vectors, layers, says):
    with pytest.raises(ValueError, match=says):
        Direction(vectors, layers)
    with pytest.raises(ValueError, match="zero, NaN or infinite"):
        Direction.from_array(np.array([[0.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="unknown site"):
        Direction(np.eye(4, dtype=np.float32)[:1], (0,), site="residual")


def test_a_layer_is_asked_for_by_its_own_number():
    d = Direction.from_array(np.diag([1.0, 2, 3]), LAYERS)
    assert d.layer(9).tolist() == [0, 0, 1] and d.norms.tolist() == [1, 2, 3]
    with pytest.raises(KeyError, match=r"no layer 1; it has \[2, 5, 9\]"):
        d.layer(1)


def test_random_directions_are_unit_of_the_same_norms_and_a_prefix_of_more():
    like = Direction.from_array(np.diag([1.0, 2, 3, 4])[:3] @ np.ones((4, 4)) + np.eye(4)[:3], LAYERS)
    few, many = directions.random_directions(like, 2, seed=1), directions.random_directions(like, 200, seed=1)
    assert all(np.array_equal(x.vectors, y.vectors) for x, y in zip(few, many, strict=False))
    rows = np.stack([d.vectors for d in many])
    assert np.allclose(np.linalg.norm(rows, axis=2), 1, atol=1e-6) and np.array_equal(many[7].norms, like.norms)
    assert np.abs(rows.mean(axis=0)).max() < 0.15 and not np.allclose(rows[:, 0], rows[:, 1])
    assert many[7].layers == LAYERS and many[7].name == "random 7"
    with pytest.raises(ValueError, match="at least 1"):
        directions.random_directions(like, 0, seed=1)


# ---- projecting


def test_project_is_the_inner_product_with_the_layer_of_that_number():
    a, b, _ = variants(2.0)
    d = directions.mean_difference(a, b)
    table = directions.project(a.select(layers=[9, 2]), d)
    assert list(table.columns) == [9, 2] and table.index.name == "id" and table.index.tolist() == a.ids.tolist()
    assert table.loc["q3", 9] == pytest.approx(float(a.layer(9)[3] @ d.layer(9)), abs=1e-4)
    assert np.allclose((directions.project(a, d) - directions.project(b, d)).mean(), d.norms, atol=1e-4)
    assert directions.project(a, d).stack().loc[("q0", 5)] == directions.project(a, d).loc["q0", 5]


def test_project_refuses_other_places():
    a, b, _ = variants(2.0)
    d = directions.mean_difference(a, b)
    for other, says in [
        (acts(a.values, layers=(1, 2, 5)), r"no layers \[1\]"),
        (acts(a.values, site="mlp_out"), "mlp_out of width 16"),
        (acts(a.values[:, :, :8]), "of width 8"),
    ]:
        with pytest.raises(ValueError, match=says):
            directions.project(other, d)


# ---- files


def test_a_saved_direction_comes_back_whole(tmp_path):
    a, b, _ = variants(2.0)
    d = directions.mean_difference(a, b, name="naïve")
    back = Direction.load(d.save(tmp_path / "new folder" / "d.safetensors"))
    assert np.array_equal(back.vectors, d.vectors) and np.array_equal(back.norms, d.norms)
    assert (back.layers, back.site, back.name, back.meta) == (d.layers, d.site, d.name, d.meta)
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["d.safetensors"]


def test_a_flipped_byte_and_a_foreign_file_are_noticed(tmp_path):
    path = Direction.from_array(np.eye(4)).save(tmp_path / "d.safetensors")
    whole = path.read_bytes()
    for place in (len(whole) - 3, whole.index(b"resid_post"), 3):  # tensors, header text, header length
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged|no direction of ours"):
            Direction.load(path)
    save_file({"x": np.ones(3, dtype=np.float32)}, path)
    with pytest.raises(ValueError, match="no direction of ours"):
        Direction.load(path)
    path.write_bytes(whole)
    assert np.array_equal(load_file(path)["vectors"], np.eye(4)) and Direction.load(path).layers == (0, 1, 2, 3)


def test_other_suffixes_and_missing_files_name_the_way_out(tmp_path):
    d = Direction.from_array(np.eye(4))
    for act in (d.save, Direction.load):
        with pytest.raises(ValueError, match=r"ends in \.safetensors"):
            act(tmp_path / "d.gguf")
    with pytest.raises(FileNotFoundError, match="save a direction there first"):
        Direction.load(tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())


# ---- unseen prompts


def test_a_planted_direction_is_found_and_the_same_data_shuffled_is_not():
    a, b, _ = variants(1.5)
    found = directions.held_out_separation(a, b, n_permutations=300)
    assert set(found["metric"]) == {"auc", "cohen_d", "pair_accuracy"} and (found["q"] < 0.02).all()
    assert (found.query("metric == 'pair_accuracy'")["estimate"] > 0.9).all() and (found["n"] == 32).all()
    swap = np.random.default_rng(0).random(32) < 0.5  # the same rows, which variant is which forgotten
    left, right = (np.where(swap[:, None, None], y.values, x.values) for x, y in ((a, b), (b, a)))
    nothing = directions.held_out_separation(acts(left), acts(right), n_permutations=300)
    assert (nothing["q"] > 0.05).all()


def test_holding_out_is_what_makes_the_difference():
    a, b, _ = variants(0.0, n=16, layers=tuple(range(40)))  # noise only, 40 repeats
    d = directions.mean_difference(a, b)
    fitted = (directions.project(a, d) > directions.project(b, d)).mean()
    unseen = directions.held_out_separation(a, b, n_permutations=50).query("metric == 'pair_accuracy'")["estimate"]
    assert fitted.mean() > 0.75  # on the prompts it was fitted on, a direction always looks good
    assert unseen.mean() == pytest.approx(0.5, abs=0.04)


def test_held_out_p_is_uniform_when_variants_differ_by_noise_only():
    """200 repeats as layers: the band covers 95 +- 3 %, p is uniform, the maximum over layers is calm."""
    a, b, _ = variants(0.0, layers=tuple(range(200)))
    table = directions.held_out_separation(a, b, n_splits=2, n_permutations=200)
    for metric, part in table.groupby("metric"):
        inside = (part["null_low"] <= part["estimate"]) & (part["estimate"] <= part["null_high"])
        assert 0.92 <= inside.mean() <= 0.98, metric
        if metric != "pair_accuracy":  # of 32 pairs: too coarse for a uniform p
            assert scipy_stats.kstest(part["p"], "uniform").pvalue > 0.01, metric
        assert part["q"].min() > 0.05, metric


def test_held_out_scores_equal_refitting_by_hand():
    a, b, _ = variants(1.0, n=16)
    sides = directions._sides(a, b, None)
    folds = directions._folds(sides, 2, np.random.default_rng(0))
    x = np.concatenate([a.layer(5), b.layer(5)]).astype(float)
    ours = directions._held_out_projections(x @ x.T, sides.labels[None], folds)[0]
    by_hand = np.zeros(32)
    for fold, keep in itertools.product(folds, (True, False)):
        fit = np.flatnonzero((fold == keep)[:16])
        rows = np.flatnonzero((fold != keep)[:16])
        d = directions.mean_difference(a.select(ids=a.ids[fit]), b.select(ids=b.ids[fit]))
        centre = np.concatenate([a.layer(5)[fit], b.layer(5)[fit]]).mean(axis=0)
        for half, side in enumerate((a, b)):
            by_hand[rows + 16 * half] += (side.layer(5)[rows] - centre) @ d.layer(5) / 2
    assert np.allclose(ours, by_hand, atol=1e-4)
    assert (folds[:, :16] == folds[:, 16:]).all() and (folds.sum(axis=1) == 16).all()  # variants stay together


def test_statistics_equal_scipy():
    rng = np.random.default_rng(1)
    scores, labels = rng.standard_normal((1, 20)), np.r_[np.ones(12), -np.ones(8)][None]
    auc, d = directions._separations(scores, labels, paired=False)[0]
    x, y = scores[0, :12], scores[0, 12:]
    assert auc == pytest.approx(scipy_stats.mannwhitneyu(x, y).statistic / 96)
    assert d == pytest.approx(scipy_stats.ttest_ind(x, y).statistic * np.sqrt(1 / 12 + 1 / 8))
    pairs = directions._separations(np.array([[3.0, 1, 2, 1]]), np.array([[1.0, 1, -1, -1]]), paired=True)[0]
    assert pairs[2] == 0.75  # one in order, one tie


def test_interval_of_separation_covers_its_estimate_and_narrows_with_prompts():
    few, many = (directions.held_out_separation(*variants(1.0, n=n)[:2], n_permutations=50) for n in (32, 320))
    for table in (few, many):
        assert ((table["low"] <= table["estimate"]) & (table["estimate"] <= table["high"])).all()
    width = [(t["high"] - t["low"]).where(t["metric"] == "cohen_d").mean() for t in (few, many)]
    assert width[1] < 0.6 * width[0]


def test_whole_groups_are_held_out_and_swapped():
    a, b, _ = variants(1.5)
    sides = directions._sides(a, b, "category")
    rng = np.random.default_rng(0)
    for fold in directions._folds(sides, 5, rng):
        assert not set(CATEGORIES[fold[:32]]) & set(CATEGORIES[~fold[:32]]) and fold[:32].sum() == 16
    labels = directions._swapped(sides, 50, rng)
    assert (labels[:, :32] == -labels[:, 32:]).all() and (labels[:, :32:4] == labels[:, 1:32:4]).all()
    table = directions.held_out_separation(a, b, groups="category", n_permutations=300)
    assert (table.query("metric == 'auc'")["q"] < 0.05).all() and "groups: category" in table.attrs["null"]["labels permuted"]


def test_sides_that_share_no_prompt_are_told_apart_too():
    rng = np.random.default_rng(2)
    rows, planted = rng.standard_normal((60, 3, D)), np.eye(D)[0]
    topic = np.tile(["x", "y"], 30)
    for strength, finds in ((2.0, True), (0.0, False)):
        a = acts(rows[:25] + strength * planted, [f"a{i}" for i in range(25)], category=topic[:25])
        b = acts(rows[25:], [f"b{i}" for i in range(35)], category=topic[25:])
        table = directions.held_out_separation(a, b, n_permutations=300)
        assert set(table["metric"]) == {"auc", "cohen_d"} and (table["n"] == 60).all()
        assert (table["q"] < 0.05).all() == finds and ((table["q"] > 0.05).all() == (not finds))


def test_held_out_separation_refuses():
    a, b, _ = variants(1.0)
    with pytest.raises(ValueError, match="16 prompts are on both sides, 16 on one only"):
        directions.held_out_separation(a, b.where(np.arange(32) < 16))
    with pytest.raises(ValueError, match="at least 2 of each"):
        directions.held_out_separation(*(x.where(np.arange(32) < 3) for x in (a, b)))
    with pytest.raises(ValueError, match="1 groups"):
        directions.held_out_separation(*(x.where(CATEGORIES == "c0") for x in (a, b)), groups="category")
    with pytest.raises(KeyError, match="no column 'topic'"):
        directions.held_out_separation(a, b, groups="topic")
