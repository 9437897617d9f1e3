"""Guards directions: mean differences, random controls, projections, what is read off a direction. Files: test_vectors.py."""

from dataclasses import replace

import numpy as np
import pytest
from planted import VARIANT_LAYERS as LAYERS
from planted import acts as planted_acts
from planted import variants

from emlens import directions
from emlens.directions import Direction


def acts(values, **facts):
    return planted_acts(values, facts.pop("layers", LAYERS), **facts)


# ---- the noun


def test_mean_difference_finds_a_planted_direction_and_keeps_its_length():
    a, b, planted = variants(4.0, n=400)
    d = directions.mean_difference(a, b, name="planted")
    assert ((d.vectors * planted).sum(axis=1) > 0.98).all() and np.allclose(d.norms, 4, atol=0.2)
    assert d.layers == LAYERS and d.name == "planted" and d.meta["a"]["n"] == 400 and d.meta["position"] == "last"
    assert np.allclose(d.layer(5), (a.layer(5).mean(axis=0) - b.layer(5).mean(axis=0)) / d.norms[1], atol=1e-5)
    assert np.allclose(directions.mean_difference(b, a).vectors, -d.vectors)
    shown = "Direction 'planted' · 3 layers × 16 · resid_post · layers 2,5,9 · last"
    assert repr(d) == f"{shown} · mean(a) - mean(b): a = 400 prompts; b = 400 prompts"
    assert repr(directions.Direction.from_array(d.vectors, d.layers, name="planted")) == shown.replace("last", "any position")


def test_a_direction_says_in_what_it_was_found():
    a, b, _ = variants(4.0)
    bad, sound = (replace(acts, meta={"model": "tiny", "adapter": name}) for acts, name in ((a, "bad"), (b, "sound")))
    before = replace(b, values=b.values / 2, meta={"model": "tiny", "adapter": None})
    found = "mean(a) - mean(b): a = tiny, adapter bad, 32 prompts; b = tiny, loaded weights, 32 prompts"
    assert repr(directions.mean_difference(bad, before)).endswith(found)
    shifted = repr(directions.mean_difference(bad - before, sound - before))
    assert shifted.endswith("a = tiny, bad − before, 32 prompts; b = tiny, sound − before, 32 prompts")
    assert "random" in repr(directions.random_directions(directions.mean_difference(bad, before), 1, seed=0)[0])


def test_weighted_by_tokens_a_mean_is_over_all_tokens_pooled():
    """Answers of different length, given as means over their tokens: the weighted difference is that of the pooled tokens."""
    rng = np.random.default_rng(0)
    sides, pooled = [], []
    for shift in (1.0, 0.0):
        lengths = rng.integers(1, 40, size=30)
        tokens = [shift * np.eye(16)[0] + rng.standard_normal((3, 16)) + rng.standard_normal((n, 3, 16)) for n in lengths]
        sides.append(acts(np.stack([t.mean(axis=0) for t in tokens]), n_answer=lengths))
        pooled.append(np.concatenate(tokens).mean(axis=0))
    d = directions.mean_difference(*sides, weights="n_answer")
    assert np.allclose(d.vectors * d.norms[:, None], pooled[0] - pooled[1], atol=1e-5) and d.meta["weights"] == "n_answer"
    plain = directions.mean_difference(*sides)
    assert not np.allclose(d.vectors, plain.vectors, atol=1e-2) and "weights" not in plain.meta
    with pytest.raises(KeyError, match="no column 'tokens'"):
        directions.mean_difference(*sides, weights="tokens")
    for bad in (-1, np.nan):
        worse = sides[0].with_facts(sides[0].facts.assign(n_answer=[bad] + [1.0] * 29))
        with pytest.raises(ValueError, match="finite, non-negative"):
            directions.mean_difference(worse, sides[1], weights="n_answer")
    with pytest.raises(ValueError, match="not all 0"):
        directions.mean_difference(sides[0].with_facts(sides[0].facts.assign(n_answer=0)), sides[1], weights="n_answer")


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
    assert np.abs(rows.mean(axis=0)).max() < 0.15 and np.array_equal(rows[:, 0], rows[:, 1]), "one vector at all layers"
    assert many[7].layers == LAYERS and many[7].name == "random 7"
    with pytest.raises(ValueError, match="at least 1"):
        directions.random_directions(like, 0, seed=1)


def test_random_directions_like_activations_have_their_covariance():
    """Uniform directions are a lenient control: along them activations hardly vary. Those drawn from the covariance follow it."""
    spread = np.array([8.0, 4, 1, 1, 1, 1, 1, 1])
    rows = np.random.default_rng(0).standard_normal((400, 2, 8)) * spread + 30
    like, prompts = Direction.from_array(np.eye(8)[:2], (2, 5)), acts(rows, layers=(2, 5))
    drawn, uniform = (directions.random_directions(like, 300, seed=1, acts=given) for given in (prompts, None))
    vectors, plain = (np.stack([d.vectors for d in each]) for each in (drawn, uniform))
    assert np.allclose(np.linalg.norm(vectors, axis=2), 1, atol=1e-6) and np.array_equal(drawn[0].norms, like.norms)
    energy = (vectors**2).mean(axis=(0, 1))
    oracle = np.random.default_rng(2).standard_normal((20000, 8)) * spread
    oracle = ((oracle / np.linalg.norm(oracle, axis=1, keepdims=True)) ** 2).mean(axis=0)
    assert np.allclose(energy, oracle, atol=0.03) and np.allclose((plain**2).mean(axis=(0, 1)), 1 / 8, atol=0.03)
    assert abs((vectors[:, 0] * vectors[:, 1]).sum(axis=1).mean()) < 0.15, "layers that have nothing in common; the mean (30) is no direction"
    turned = acts(np.stack([rows[:, 0], rows[:, 0] @ np.roll(np.eye(8), 1, axis=1)], axis=1), layers=(2, 5))
    for d in directions.random_directions(like, 5, seed=1, acts=turned):
        assert np.allclose(d.vectors[1], np.roll(d.vectors[0], 1), atol=1e-6), "the same mixture of prompts at every layer turns as they do"
    few = directions.random_directions(like, 2, seed=1, acts=prompts)
    assert all(np.array_equal(x.vectors, y.vectors) for x, y in zip(few, drawn, strict=False))
    assert "covariance" in drawn[0].meta["method"] and uniform[0].meta["method"] == "random"
    with pytest.raises(ValueError, match=r"lack layers \[5\]"):
        directions.random_directions(like, 2, seed=1, acts=prompts.select(layers=[2]))
    with pytest.raises(ValueError, match="do not vary"):
        directions.random_directions(like, 2, seed=1, acts=acts(np.ones((3, 2, 8)), layers=(2, 5)))


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


# ---- reading a direction


def test_top_prompts_are_those_of_the_highest_projection():
    a, _, _ = variants(1.0)
    d = Direction.from_array(np.random.default_rng(0).normal(size=(3, 16)), LAYERS)
    table = directions.top_prompts(a.with_facts(a.facts.assign(rank=7, text="?")), d, n=5)
    assert list(table.columns) == ["layer", "rank", "projection", "id", "category", "text"] and len(table) == 15
    for layer in LAYERS:
        expected = (a.layer(layer) @ d.layer(layer)).argsort()[::-1][:5]
        part = table[table["layer"] == layer]
        assert part["id"].tolist() == [f"q{i}" for i in expected] and part["rank"].tolist() == [1, 2, 3, 4, 5]
        assert part["category"].tolist() == a.facts["category"].iloc[expected].tolist()
        assert np.allclose(part["projection"], directions.project(a, d).loc[part["id"], layer])
    assert len(directions.top_prompts(a, d, n=100)) == 3 * 32
    with pytest.raises(ValueError, match="mlp_out of width 16"):
        directions.top_prompts(acts(a.values, site="mlp_out"), d)


def test_direction_tokens_are_those_whose_rows_the_direction_lies_along():
    """A planted unembedding: token 17 is written, token 4 is unwritten; a random direction has ends too, but nothing far out."""
    rng = np.random.default_rng(0)
    vocabulary, width = 500, 32
    unembedding, norm = rng.normal(size=(vocabulary, width)), np.exp(rng.normal(size=width))
    d = Direction.from_array(rng.normal(size=(2, width)), (3, 8))
    planted = unembedding + 2
    planted[17] += 5 * d.layer(8) / norm
    planted[4] -= 5 * d.layer(8) / norm
    names = [f"t{i}" for i in range(vocabulary)]
    table = directions.direction_tokens(d, planted, norm, names, layer=8, k=3)
    assert list(table.columns) == ["layer", "side", "rank", "token_id", "token", "score", "z"]
    assert table["side"].tolist() == ["raised"] * 3 + ["lowered"] * 3 and table["rank"].tolist() == [1, 2, 3] * 2 and (table["layer"] == 8).all()
    assert table["token"].iloc[0] == "t17" and table["token"].iloc[3] == "t4" and table["token_id"].iloc[3] == 4
    scores = planted @ (norm * d.layer(8))
    scores -= scores.mean()
    order = scores.argsort()[::-1]
    assert table["token_id"].tolist() == [*order[:3], *order[::-1][:3]]
    assert np.allclose(table["score"], scores[table["token_id"]], atol=1e-4) and np.allclose(table["z"], table["score"] / scores.std(), atol=1e-4)
    without = directions.direction_tokens(d, unembedding, layer=3, k=2)
    assert (without["token"] == "").all() and without["z"].abs().max() < 5 and not np.isin(without["token_id"], [17, 4]).any()
    assert np.isclose(without["score"].iloc[0], np.sort(unembedding @ d.layer(3) - (unembedding @ d.layer(3)).mean())[-1], atol=1e-4)


def test_direction_tokens_refuse_what_does_not_fit():
    d, one = Direction.from_array(np.eye(2, 8), (3, 8)), Direction.from_array(np.eye(1, 8), (5,))
    with pytest.raises(ValueError, match=r"layers \[3, 8\]: say which one"):
        directions.direction_tokens(d, np.ones((20, 8)))
    assert (directions.direction_tokens(one, np.eye(20, 8))["layer"] == 5).all()
    for given, says in [
        ({"unembedding": np.ones((20, 9))}, r"unembedding \(9,\) where \(8,\)"),
        ({"norm": np.ones(7)}, r"norm \(7,\)"),
        ({"tokens": ["a"] * 19}, r"tokens \(19,\) where \(20,\)"),
        ({"unembedding": np.full((20, 8), np.nan)}, "NaN"),
    ]:
        with pytest.raises(ValueError, match=says):
            directions.direction_tokens(d, **{"unembedding": np.ones((20, 8)), **given}, layer=3)
