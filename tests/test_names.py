"""What was asked for by a wrong name, in a wrong shape or as the wrong thing: the error says what came, what was needed and what to do."""

import warnings

import numpy as np
import pandas as pd
import pytest

import emlens as em
from emlens.names import column_of, meant, several

N = 40
rng = np.random.default_rng(0)
VALUES = rng.standard_normal((N, 2, 8)).astype(np.float32)
FACTS = pd.DataFrame({"id": [f"q{i}" for i in range(N)], "question": [f"text {i * i} {'abc' * (i % 5)}" for i in range(N)]})
FACTS = FACTS.assign(category=np.arange(N) % 4, score=VALUES[:, 1, 0] + rng.standard_normal(N))
ACTS = em.Activations.from_array(VALUES, FACTS, layers=[3, 5])
BEFORE = pd.DataFrame({"id": FACTS["id"], "aligned": rng.uniform(40, 90, N)})
AFTER = BEFORE.assign(aligned=BEFORE["aligned"] - rng.uniform(0, 9, N))


def predict(acts=ACTS, target="score", **options):
    return em.predict(acts, target, **({"groups": "category", "n_permutations": 9} | options))


def compare(before=BEFORE, after=AFTER, **options):
    return em.compare_scores(before, after, n_boot=9, n_permutations=9, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: predict(FACTS), TypeError, r"of type DataFrame; Activations are needed: model.record\(prompts\), or em.Activations.from_array"),
        (lambda: em.fit_predictor(VALUES, "score"), TypeError, "of type ndarray; Activations are needed"),
        (lambda: em.fit_predictor(ACTS, "score", layer=5).predict(VALUES), TypeError, "of type ndarray; Activations are needed"),
        (lambda: predict(target=FACTS["score"]), TypeError, "target is of type Series; the name of a column .* is needed: .*with_facts"),
        (lambda: predict(groups=FACTS["category"].to_numpy()), TypeError, "groups is of type ndarray; the name of a column"),
        (lambda: predict(target="scor"), KeyError, "Did you mean 'score'"),
        (lambda: predict(groups="categry"), KeyError, "Did you mean 'category'"),
        (lambda: predict(metrics="R2"), ValueError, "unknown .*R2.*within_r2.* Did you mean 'r2'"),
        (lambda: predict(metrics=()), ValueError, "metrics=.* names nothing; one or more of these are needed: r2, "),
        (lambda: predict(nulls=("within",)), ValueError, "Did you mean 'within_groups'"),
        (lambda: predict(baselines=("tf_idf",)), KeyError, "Did you mean 'tfidf'"),
        (lambda: predict(baselines=("scor",)), KeyError, "Did you mean 'score'"),
        (lambda: predict(features="rwa"), ValueError, "Did you mean 'raw'"),
        (lambda: predict(model="rigde"), ValueError, "Did you mean 'ridge'"),
        (lambda: predict(**em.PUBLISHED["predict"]), ValueError, r"holds no group out.*em.PUBLISHED\['predict'\].*with groups=, take its features"),
        (lambda: predict(copies="drop"), ValueError, "copies='drop': 'refuse' .* or 'allow'"),
        (lambda: em.fit_predictor(ACTS, "score"), ValueError, r"which layer\? \[3, 5\] were recorded: .*too high by the choice"),
        (lambda: em.random_twin("smollm2"), TypeError, r"of type str, 'smollm2'; .*em.random_twin\(em.load_model"),
        (lambda: compare(tests="wilcox"), ValueError, "Did you mean 'wilcoxon'"),
        (lambda: compare(scores="alined"), KeyError, r"not there: .*'alined'.* Did you mean 'aligned'"),
        (lambda: compare(scales="ranks"), ValueError, "Did you mean 'rank'"),
        (lambda: compare(by="alined"), KeyError, "no column 'alined' on either side.*Did you mean 'aligned'"),
        (lambda: compare(BEFORE.rename(columns={"id": "question"})), KeyError, r"table.rename\(columns=\{'question': 'id'\}\) on both sides"),
        (lambda: compare(after=AFTER.assign(id="z" + AFTER["id"])), ValueError, "no id is on both, e.g. 'q0' before and 'zq0' after"),
        (lambda: compare(after=AFTER.assign(aligned="good")), TypeError, r"'aligned' holds .*, e.g. 'good'; numbers are needed: .*pd.to_numeric"),
        (lambda: compare(BEFORE.astype({"aligned": str})), TypeError, "numbers are needed"),
        (lambda: em.by_question(BEFORE.astype({"aligned": str})), TypeError, "numbers are needed"),
        (lambda: compare([1.0], AFTER), TypeError, "before is of type list; a table is needed"),
    ],
)  # fmt: skip
def test_what_was_wrong_is_said_with_the_way_out(call, error, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=words):
            call()


def test_a_single_name_stands_for_a_sequence_of_one():
    one, as_tuple = (
        predict(metrics=m, nulls=n, baselines=b) for m, n, b in (("r2", "within_groups", "mean"), (("r2",), ("within_groups",), ("mean",)))
    )
    pd.testing.assert_frame_equal(one, as_tuple)
    one, as_tuple = (
        compare(tests=t, scales=s, scores=c, of=o, family=f)
        for t, s, c, o, f in (
            ("wilcoxon", "rank", "aligned", "mean", "metric"),
            (("wilcoxon",), ("rank",), ("aligned",), ("mean",), ("metric",)),
        )
    )
    pd.testing.assert_frame_equal(one, as_tuple)
    assert one.attrs["family"] == "within metric"


def test_names_are_known_by_how_near_they_are():
    assert meant("Tfidf", ["tfidf", "length"]) == " Did you mean 'tfidf'?" and meant("entropy", ["tfidf", "length"]) == ""
    assert several("x", "one") == ("one",) and several("x", ["a", "b"], "abc") == ("a", "b") and several("x", ()) == ()
    assert column_of(FACTS, "score", "target", "").equals(FACTS["score"])


def test_one_recorded_layer_need_not_be_named():
    alone = ACTS.select(layers=[5])
    with pytest.warns(UserWarning, match="fewer than 20"):
        kept, named = em.fit_predictor(alone, "score", groups="category"), em.fit_predictor(ACTS, "score", layer=5, groups="category")
    assert kept.place == named.place and (kept.weights == named.weights).all()


def asked_of_models():
    """The same ten prompts in four models: a row for each."""
    own = np.random.default_rng(3)
    values = own.standard_normal((40, 1, 6)).astype(np.float32)
    facts = pd.DataFrame({"id": [f"m{i // 10}-{i % 10}" for i in range(40)], "question": [f"question {i % 10}" for i in range(40)]})
    facts = facts.assign(model=np.arange(40) // 10, score=values[:, 0, 0] + 0.3 * own.standard_normal(40))
    return em.Activations.from_array(values, facts)


def test_the_same_prompts_in_every_group_are_refused_unless_it_is_by_design():
    acts = asked_of_models()
    ask = {"groups": "model", "baselines": (), "n_permutations": 99}
    with pytest.raises(ValueError, match="60 pairs of prompts are copies .*copies='allow'"):
        em.predict(acts, "score", **ask)
    found = em.predict(acts, "score", copies="allow", **ask)
    assert found["q"].item() < 0.05 and "a held-out group of 'model' is new, its prompts are not (60 pairs of copies" in found.attrs["cautions"][0]
    with pytest.warns(UserWarning, match="its prompts are not .60 pairs"):
        kept = em.fit_predictor(acts, "score", groups="model", copies="allow")
    assert "its prompts allowed in other groups" in kept.predict(acts).attrs["interval"]
    alone = em.predict(ACTS, "score", groups="category", n_permutations=9, copies="allow")
    assert not any("pairs of copies" in each for each in alone.attrs["cautions"]), "none there, none told"


def test_predictions_outside_the_range_of_training_are_counted():
    rate = ACTS.with_facts(FACTS[["id"]].assign(rate=(VALUES[:, 1, 0] > 0).astype(float)))
    kept = em.fit_predictor(rate, "rate", layer=5)
    told = kept.predict(rate)
    n = int(((told["prediction"] < 0) | (told["prediction"] > 1)).sum())
    assert 0 < n < N and told.attrs["cautions"][-1].startswith(f"{n} of 40 predictions lie outside the range of 'rate' in training, 0 to 1")
    inside = kept.predict(rate.where(told["prediction"].between(0, 1)))
    assert not any("outside the range" in each for each in inside.attrs["cautions"])


def test_recordings_that_do_not_name_their_prompts_are_paired_by_row_and_it_is_said():
    nameless = em.Activations.from_array(VALUES, FACTS[["category", "score"]])
    other = em.Activations.from_array(VALUES[:, :, ::-1].copy(), FACTS[["category"]])
    found = em.predict(nameless, "score", groups="category", baselines={"rival": other}, n_permutations=9)
    assert "paired by row number" in found.attrs["baselines"]["rival"]
    named = em.Activations.from_array(VALUES[:, :, ::-1].copy(), FACTS[["id", "category"]], layers=[3, 5])
    found = predict(baselines={"rival": named})
    assert "row number" not in found.attrs["baselines"]["rival"]


def test_scores_that_go_to_one_are_noticed_and_scores_that_go_to_a_hundred_are_not():
    with pytest.warns(UserWarning, match="aligned lies between 0 and 1 on both sides.*times 100"):
        found = compare(BEFORE.assign(aligned=BEFORE["aligned"] / 100), AFTER.assign(aligned=AFTER["aligned"] / 100))
    assert any("times 100" in each for each in found.attrs["cautions"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare().attrs["cautions"] == []
        compare(*(pd.DataFrame({"id": side["id"], "margin": side["aligned"] / 100}) for side in (BEFORE, AFTER)))


def test_means_that_tell_no_question_apart_are_noticed():
    means = np.array([50.0, 51, 49, 50.5, 49.5, 50])
    noisy = pd.DataFrame({"id": list("abcdef"), "aligned": means, "aligned_std": 20.0, "n": 10})
    with pytest.warns(UserWarning, match=r"the reliability of aligned before is -\d+.*draw more answers"):
        found = compare(noisy, noisy.assign(aligned=means[::-1]), tests=("reliability", "disattenuated"))
    assert len(found.attrs["cautions"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sure = noisy.assign(aligned_std=1.0)
        assert compare(sure, sure.assign(aligned=means[::-1]), tests="reliability").attrs["cautions"] == []
