"""Guards what a study says of directions: traits beside random directions, damage by the dose, overlap beside other domains' prompts."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny

import emlens as em
from emlens.coherence import Meter, neutral_texts
from emlens.study import analyse, moves
from emlens.study.pieces import Pieces

CONFIG = {
    "record": {"site": "resid_post", "position": "last"},
    "steer": {"layers": [1], "strengths": [-0.5, 0.5], "controls": 4},
    "seed": 0,
}


def bench(folder, config=CONFIG):
    """What the pieces of a study are made with, on a tiny random model."""
    return SimpleNamespace(
        config=config,
        model=tiny.tiny_model(layers=3, context=1024),
        pieces=Pieces(folder, moves.move_weights(config, 1), say=lambda line: None),
        _variant=lambda label: {"adapter": None},
        _on=lambda label: None,
    )


def prompts(n, seed, frame=0, d=20, layers=2):
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(frame).normal(size=(d, d)))[0]
    values = (rng.normal(size=(n, layers, d)) * np.arange(1, d + 1) ** -1.0) @ axes
    return em.Activations.from_array(
        values.astype(np.float32), {"id": [f"{seed}-{i}" for i in range(n)], "category": [f"c{i % 4}" for i in range(n)]}
    )


# ---- traits


def test_a_shift_along_a_trait_is_beyond_random_directions_and_another_is_not():
    before, rng = prompts(60, 1), np.random.default_rng(5)
    directions = {name: em.Direction.from_array(rng.normal(size=(2, 20))) for name in ("evil", "other")}
    still = before.values + 0.02 * rng.normal(size=before.values.shape)
    runs = {"moved": still + 0.5 * directions["evil"].vectors, "still": still}
    shifts = {run: em.Activations.from_array((values - before.values).astype(np.float32), before.facts) for run, values in runs.items()}
    table = moves.traits_table(shifts, directions, before, seed=0).set_index(["run", "persona", "layer"])
    assert len(table) == 8 and table.loc[("moved", "evil", 1), "estimate"] == pytest.approx(0.5, abs=0.05)
    by_hand = (shifts["moved"].layer(1) @ directions["evil"].layer(1)).mean()
    assert table.loc[("moved", "evil", 1), "estimate"] == pytest.approx(by_hand, rel=1e-5)
    drawn = em.random_directions(directions["evil"], moves.DRAWS, 0, before)
    random = [d.layer(1) @ shifts["moved"].layer(1).mean(axis=0) for d in drawn]
    assert table.loc[("moved", "evil", 1), ["null_low", "null_high"]].tolist() == pytest.approx(
        np.quantile(random, [0.025, 0.975]).tolist(), rel=1e-4
    )
    assert (table.xs("moved").xs("evil")["q"] < 0.05).all() and (table.xs("still")["q"] > 0.05).all()
    assert list(table["p_floor"].unique()) == [2 / 1001] and table.attrs["null"].keys() == {"random directions"}
    assert moves.traits_table(shifts, {}, before, 0).empty


def test_the_directions_of_the_traits_are_those_of_their_answers_and_are_made_once(tmp_path):
    made = moves.trait_directions(one := bench(tmp_path))
    assert list(made) == list(em.personas.TRAITS)
    by_hand = em.contrast_direction(one.model, em.load_trait("emlens:reckless"))
    assert np.array_equal(made["reckless"].vectors, by_hand.vectors) and made["reckless"].name == "reckless"
    again = moves.trait_directions(two := bench(tmp_path))
    assert two.pieces.read_back == 1 and np.array_equal(again["evil"].vectors, made["evil"].vectors)
    other = {**CONFIG, "record": {"site": "mlp_out", "position": "last"}}
    assert moves.trait_directions(bench(tmp_path, other)) == {} and "directions of the traits" not in moves.move_weights(other, 1)


# ---- damage


def test_damage_is_the_meters_and_its_pieces_are_those_expected(tmp_path):
    one = bench(tmp_path)
    before = one.model.record(tiny.contrast(4))
    own, control = tiny.random_direction(one.model, 1), tiny.random_direction(one.model, 2)
    random = {f"random {i}": d for i, d in enumerate(em.random_directions(own, CONFIG["steer"]["controls"], 0, before))}
    arms = moves.Arms({"money": own}, {"another seed (money-bad)": control}, random)
    table = moves.damage(one, arms, "drawn so")
    assert {row["piece"] for row in one.pieces.made} == {label for label in moves.move_weights(CONFIG, 1) if label.startswith("damage")}
    meter = Meter(one.model, neutral_texts().head(moves.TEXTS), None, moves.NEW_TOKENS)
    with one.model.steer(own, 1, 0.5):
        read = meter.read()
    at = table.query("domain == 'money' and strength == 0.5").set_index("metric")
    for metric in ("kl", "perplexity_ratio", "fluency"):
        assert at.loc[metric, "estimate"] == pytest.approx(read[metric].mean(), rel=1e-6)
    assert at.loc["kl", "n"] == moves.TEXTS and at.loc["kl", "null_low"] < at.loc["kl", "null_high"]
    assert set(table.loc[table["role"] == "control", "domain"]) == {"another seed (money-bad)"} and len(table) == 2 * 2 * 3
    assert np.allclose(table["p_floor"], 2 / 5) and (table["p"] >= 2 / 5).all(), "damage is ranked among the four random directions"
    assert set(table.attrs["null"]) == {"norm-matched random directions"} and "by rank among the 4" in next(iter(table.attrs["null"].values()))
    again = moves.damage(two := bench(tmp_path), arms, "drawn so")
    assert two.pieces.read_back == 2 and again.equals(table)


# ---- overlap beside other domains


def test_questions_overlap_more_than_another_domains_prompts_only_where_they_do():
    money, repair = prompts(48, 10, frame=1), prompts(48, 11, frame=2)
    like_money, like_repair = prompts(48, 12, frame=1), prompts(48, 13, frame=2)
    tables = {
        name: analyse.overlap_table(acts, {"money": money, "repair": repair}, 3, 60, 0) for name, acts in (("m", like_money), ("r", like_repair))
    }
    p = {name: table[table["null"] == "covariance"].groupby("domain")["p"].max() for name, table in tables.items()}
    assert p["m"]["money"] < 0.05 and p["r"]["repair"] < 0.05 and p["r"]["money"] > 0.05 and p["m"]["repair"] > 0.05
    table = tables["m"]
    assert set(table.attrs["null"]) == {"isotropic", "covariance"} and "training prompts of the other domains" in table.attrs["null"]["covariance"]
    plain = table[(table["comparison"] == "training v questions") & (table["domain"] == "money")].pivot(
        index="layer", columns="null", values="estimate"
    )
    assert np.allclose(plain["isotropic"], plain["covariance"])
    alone = analyse.overlap_table(like_money, {"money": money}, 3, 60, 0)
    assert set(alone["null"]) == {"isotropic"}
