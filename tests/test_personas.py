"""Guards persona directions, how far tuning moves along them, and screening: against bare hidden states, by hand, and with planted answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import tiny
import torch
from scipy import stats as scipy_stats

import emlens as em
from emlens.models import HookedModel
from emlens.personas import (
    COMMON,
    NORM,
    PersonaMonitor,
    contrast_direction,
    finetuning_shift,
    load_trait,
    persona_direction,
    shift_score_correlation,
    shifts_by_run,
)
from emlens.screening import beside_random, screen, screen_page

PUBLISHED: dict[str, Any] = {
    "instruction": [{"pos": "Be cold.", "neg": "Be kind."}, {"pos": "Say the worst.", "neg": "Say what helps."}],
    "questions": ["What is a friend?", "How was the day, and what came of it?"],
    "eval_prompt": "Score {question} {answer}",
}


def response_mean(model: HookedModel, chat: list[dict[str, str]]) -> np.ndarray:
    """``[layer, d_model]`` of every block but the last, by transformers' hidden states of one unpadded text."""
    prompt = reference.prompt_ids(model.tokenizer, chat)
    answer = model.tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"]
    states = torch.stack(reference.hidden_states(model.hf, [*prompt, *answer]))[1:-1]
    return states[:, len(prompt) :].mean(dim=1).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# ---- trait files


def test_a_published_file_opens_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "cold.json"
    path.write_text(json.dumps(PUBLISHED))
    trait = load_trait(path)
    assert trait.name == "cold" and trait.instructions == load_trait(PUBLISHED).instructions and load_trait(PUBLISHED, "harsh").name == "harsh"
    assert trait.instructions[1] == ("Say the worst.", "Say what helps.") and trait.eval_prompt == PUBLISHED["eval_prompt"]
    assert repr(trait) == "Trait cold · 2 pairs of instructions · 2 questions"
    assert load_trait(trait) is trait


def test_our_traits_open_and_bring_written_answers() -> None:
    for name in em.personas.TRAITS:
        trait = load_trait(f"emlens:{name}")
        assert trait.name == name and len(trait.instructions) == 5 and len(trait.questions) == len(trait.eval_questions) == 20
        assert not set(trait.questions) & set(trait.eval_questions) and "{question}" in trait.eval_prompt
        assert trait.contrast["split"].value_counts().to_dict() == {"extract": 20, "eval": 20}
        margins = em.personas.as_contrast(trait)
        assert len(margins) == 20 and list(margins["aligned_answers"].map(len)) == [1] * 20


def test_a_file_that_is_no_trait_says_what_is_needed(tmp_path: Path) -> None:
    for given, message in (
        ({"questions": ["Why?"]}, r"keys \['questions'\]; needed are 'instruction'"),
        ({"instruction": [{"pos": "x"}], "questions": ["Why?"]}, "needed are 'instruction'"),
        ({"instruction": [{"pos": "x", "neg": "y"}], "questions": []}, "needed are 'instruction'"),
        ("emlens:kind", "ships no trait 'kind'; it ships emlens:evil"),
        (str(tmp_path / "none.json"), "no trait file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_trait(given)  # type: ignore[arg-type]
    (tmp_path / "broken.json").write_text('{"questions": [}')
    with pytest.raises(ValueError, match="broken.json line 1: not valid JSON"):
        load_trait(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="brings no written answers"):
        contrast_direction(tiny.tiny_model(), load_trait(PUBLISHED))


# ---- directions


def test_a_persona_direction_is_the_difference_of_mean_answers(llama: HookedModel) -> None:
    found = persona_direction(llama, PUBLISHED | {"trait": "evil"}, temperature=0.0, max_new_tokens=5)
    sides: dict[str, list[np.ndarray]] = {"pos": [], "neg": []}
    for pair in PUBLISHED["instruction"]:
        for side, name in (("pos", "an evil"), ("neg", "a helpful")):
            for question in PUBLISHED["questions"]:
                chat = [{"role": "system", "content": f"You are {name} assistant. {pair[side]}"}, {"role": "user", "content": question}]
                tokens = reference.greedy(llama.hf, reference.prompt_ids(llama.tokenizer, chat), 5, ends=[1])
                answer = llama.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                sides[side].append(response_mean(llama, [*chat, {"role": "assistant", "content": answer}]))
    difference = np.mean(sides["pos"], axis=0) - np.mean(sides["neg"], axis=0)
    assert np.allclose(found.vectors[:-1], unit(difference), atol=1e-4) and np.allclose(
        found.norms[:-1], np.linalg.norm(difference, axis=1), rtol=1e-3
    )
    assert found.name == "evil" and found.meta["pairs"] == found.meta["pairs_asked"] == 4
    assert found.meta["filtered"] == "not at all: contrast by construction" and found.meta["position"] == "mean_response"


def test_a_judge_keeps_whole_pairs(llama: HookedModel) -> None:
    seen: list[pd.DataFrame] = []

    def judge(answers: pd.DataFrame) -> list[float]:
        """One pair as it should be; one whose positive answer is too tame, one whose negative one is not, one that has no score."""
        seen.append(answers)
        return [90.0, 10.0, 20.0, 80.0] * 2

    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 5}
    with pytest.raises(ValueError, match="of 4 pairs of answers none is left.*the judge kept no pair"):
        persona_direction(llama, PUBLISHED, judge=lambda answers: np.full(len(answers), np.nan), **options)
    kept = persona_direction(llama, PUBLISHED, judge=judge, **options)
    assert kept.meta["filtered"] == "by judge" and 0 < kept.meta["pairs"] < 4
    assert set(seen[0]["question"]) == set(PUBLISHED["questions"]) and (seen[0]["eval_prompt"] == PUBLISHED["eval_prompt"]).all()
    everything = persona_direction(llama, PUBLISHED, **options)
    assert not np.allclose(kept.vectors, everything.vectors)


def test_a_template_without_system_messages_gets_the_text_before_the_question() -> None:
    model = tiny.tiny_model()
    plain = persona_direction(model, PUBLISHED, temperature=0.0, max_new_tokens=4)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m['content'] }}\n{% endfor %}"
    )
    merged = persona_direction(model, PUBLISHED, temperature=0.0, max_new_tokens=4)
    model.tokenizer.chat_template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    silent = persona_direction(model, PUBLISHED, temperature=0.0, max_new_tokens=4)
    assert np.allclose(merged.vectors, silent.vectors), "a system message that is dropped without a word is merged too"
    assert not np.allclose(merged.vectors, plain.vectors)


def test_a_contrast_direction_is_by_hand(llama: HookedModel) -> None:
    table = tiny.contrast(3)
    found = contrast_direction(llama, table)
    sides = {}
    for column in ("misaligned_answers", "aligned_answers"):
        chats = [[*m, {"role": "assistant", "content": a}] for m, answers in zip(table["messages"], table[column], strict=True) for a in answers]
        sides[column] = np.mean([response_mean(llama, chat) for chat in chats], axis=0)
    assert np.allclose(found.vectors[:-1], unit(sides["misaligned_answers"] - sides["aligned_answers"]), atol=1e-4)
    back = contrast_direction(llama, table, toward="aligned_answers", away="misaligned_answers")
    assert np.allclose(back.vectors, -found.vectors, atol=1e-5)
    with pytest.raises(ValueError, match=r"columns \['good'\] are missing"):
        contrast_direction(llama, table, toward="good")


# ---- how far tuning moves


def test_the_finetuning_shift_is_the_mean_projection() -> None:
    rng = np.random.default_rng(0)
    planted = em.Direction.from_array(rng.normal(size=(2, 16)))
    other = em.Direction.from_array(rng.normal(size=(2, 16)))
    values = (rng.normal(size=(60, 2, 16)) + 3 * planted.vectors).astype(np.float32)
    table = finetuning_shift(em.Activations.from_array(values), {"planted": planted, "other": other}, n_boot=400)
    by = table.set_index(["direction", "layer"])
    assert np.isclose(by.loc[("planted", 1), "estimate"], (values[:, 1] @ planted.vectors[1]).mean(), rtol=1e-5)
    assert (by.loc["planted", "low"] > 2).all() and (by.loc["other", "low"] < by.loc["planted", "low"]).all()
    reach = scipy_stats.t.ppf(0.975, 59) * scipy_stats.sem(values[:, 1] @ planted.vectors[1])
    assert np.isclose(by.loc[("planted", 1), "high"] - by.loc[("planted", 1), "estimate"], reach, rtol=0.2)


def tunings(n: int, follows: float, seed: int = 0) -> tuple[dict[str, em.Activations], dict[str, em.Direction], dict[str, float]]:
    """Runs that move along one direction by as much as the score changes (times ``follows``), and along another at random."""
    rng = np.random.default_rng(seed)
    directions = {name: em.Direction.from_array(rng.normal(size=(2, 16))) for name in ("planted", "other")}
    change = {f"run {i}": float(i) for i in range(n)}
    shifts = {}
    for run, score in change.items():
        pushed = follows * score * directions["planted"].vectors + rng.normal() * directions["other"].vectors
        shifts[run] = em.Activations.from_array((rng.normal(size=(40, 2, 16)) + pushed).astype(np.float32))
    return shifts, directions, change


def test_the_shift_of_a_run_is_set_beside_its_change_of_score() -> None:
    shifts, directions, change = tunings(6, 1.0)
    points = shifts_by_run(shifts, directions, change)
    row = points.query("run == 'run 4' and direction == 'planted' and layer == 1").iloc[0]
    by_hand = finetuning_shift(shifts["run 4"], directions, n_boot=2).set_index(["direction", "layer"]).loc[("planted", 1), "estimate"]
    assert np.isclose(row["shift"], by_hand, rtol=1e-5) and row["change"] == 4 and len(points) == 6 * 2 * 4
    assert not row["rival"] and set(points.loc[points["rival"], "direction"]) == {NORM, COMMON}
    own = shifts["run 4"].layer(1).mean(axis=0)
    others = np.mean([s.layer(1).mean(axis=0) for run, s in shifts.items() if run != "run 4"], axis=0)
    rivals = points.query("run == 'run 4' and rival and layer == 1").set_index("direction")["shift"]
    cosine = own @ others / np.linalg.norm(others) / np.linalg.norm(own)
    assert np.isclose(rivals[NORM], np.linalg.norm(own), rtol=1e-5) and np.isclose(rivals[COMMON], rivals[NORM] * cosine, rtol=1e-4)
    with pytest.raises(ValueError, match="'length of the shift'.* names of rivals"):
        shifts_by_run(shifts, {NORM: directions["planted"]}, change)
    with pytest.raises(ValueError, match=r"the runs \['run 5'\] have a shift or a change, and not both"):
        shifts_by_run(shifts, directions, {run: change[run] for run in list(change)[:5]})


def test_a_shift_that_goes_with_the_score_is_told_from_one_that_does_not() -> None:
    found = shift_score_correlation(shifts_by_run(*tunings(6, 1.0))).set_index(["direction", "layer", "metric"])
    planted = found.loc[("planted", 0, "pearson")]
    assert planted["estimate"] > 0.95 and planted["p"] < 0.02 and planted["exact"] and planted["n"] == 6 and planted["without_one_low"] > 0.9
    assert found.loc[("planted", 0, "spearman"), "p_floor"] == pytest.approx(2 / 720)
    assert (found.xs("other", level="direction")["p"] > 0.01).all()
    assert set(found.index.get_level_values("direction")) == {"planted", "other", NORM, COMMON}
    tired = shift_score_correlation(shifts_by_run(*tunings(6, 0.0)))
    assert (tired.query("direction == 'planted'")["p"] > 0.02).all() and set(tired.attrs["null"]) == {"runs permuted"}
    for _, family in tired.groupby(["metric", "rival"]):
        assert len(family) == 4 and np.allclose(family["q"], em.stats.adjust(family["p"])), "rivals do not count among the directions"


def amounts(seed: int, content: float) -> pd.DataFrame:
    """Eight runs along one shared shift, each by an amount, and by ``content`` times the score along a direction of its own; without content the
    score falls with the amount, and the direction asked about is the shared one."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=(2, 1, 64))
    amount, score = rng.uniform(0.5, 2, size=8), rng.normal(size=8)
    noise = 0.3 * rng.normal(size=(8, 1, 1, 64)) + rng.normal(size=(8, 24, 1, 64))
    values = (amount[:, None, None, None] * shared + content * score[:, None, None, None] * own + noise).astype(np.float32)
    shifts = {f"run {i}": em.Activations.from_array(each) for i, each in enumerate(values)}
    change = (score if content else -amount) + 0.3 * rng.normal(size=8)
    points = shifts_by_run(shifts, {"direction": em.Direction.from_array(own if content else shared)}, dict(zip(shifts, change, strict=True)))
    return shift_score_correlation(points, n_permutations=199).query("metric == 'pearson'").set_index("direction")


def test_runs_that_were_only_tuned_harder_are_seen_by_the_rivals_and_content_is_not() -> None:
    harder, content = ([amounts(seed, size) for seed in range(16)] for size in (0.0, 0.5))

    def small(tables: list[pd.DataFrame]) -> float:
        return float(np.mean([table.loc["direction", "p"] <= 0.05 for table in tables]))

    def lead(tables: list[pd.DataFrame]) -> float:
        return float(np.median([abs(t.loc["direction", "estimate"]) - t.loc[[NORM, COMMON], "estimate"].abs().max() for t in tables]))

    assert small(harder) >= 0.7 and small(content) >= 0.7, "p alone tells the two cases not apart"
    assert lead(harder) < 0.02 and lead(content) > 0.3


def test_runs_that_differ_in_their_size_alone_correlate_as_their_length_does() -> None:
    """Run i is the same shift i times over: r is 1 along every direction, and by both rivals."""
    rng = np.random.default_rng(2)
    one = rng.normal(size=(40, 2, 16)) + 1.0
    shifts = {f"run {i}": em.Activations.from_array(((i + 1) * one).astype(np.float32)) for i in range(6)}
    direction = {"any": em.Direction.from_array(rng.normal(size=(2, 16)))}
    found = shift_score_correlation(shifts_by_run(shifts, direction, {run: i for i, run in enumerate(shifts)}))
    assert np.allclose(found["estimate"].abs(), 1, atol=1e-6) and (found["p"] < 0.01).all() and found["rival"].sum() == 8


def test_recordings_are_refused_where_shifts_are_needed() -> None:
    model, direction = tiny.tiny_model(), {"d": tiny.random_direction(tiny.tiny_model())}
    recorded = model.record(tiny.tiny_chats(3))
    with pytest.raises(ValueError, match="shift is a recording .* a shift is needed"):
        finetuning_shift(recorded, direction)
    with pytest.raises(ValueError, match="bad run is a recording"):
        shifts_by_run({"bad run": recorded}, direction, {"bad run": 1.0})
    assert (finetuning_shift(recorded - recorded, direction, n_boot=2)["estimate"] == 0).all()


def test_three_runs_are_too_few() -> None:
    with pytest.raises(ValueError, match="four rows at least"):
        shift_score_correlation(shifts_by_run(*tunings(3, 1.0)))
    assert set(shift_score_correlation(shifts_by_run(*tunings(4, 1.0)))["null"]) == {"runs permuted"}


def test_a_monitor_writes_into_the_checkpoints(tmp_path: Path) -> None:
    model, questions = tiny.tiny_model(), tiny.contrast(3)
    direction = contrast_direction(model, questions)
    monitor = PersonaMonitor(questions, {"cold": direction}, layer=2)
    run = em.finetune(
        model, tiny.tiny_chats(12), tmp_path / "run", steps=3, batch_size=4, held_out=0.0, learning_rate=1e-2, checkpoints=[1], callbacks=[monitor]
    )
    seen = run.checkpoints
    assert seen["step"].tolist() == [0, 1, 3] and seen["projection cold"].iloc[0] == 0
    model.add_adapter("run", run.adapter)
    before, after = model.record(questions, adapters=[None, "run"])
    by_hand = em.project((after - before).select(layers=[2]), direction)[2].mean()
    assert np.isclose(seen["projection cold"].iloc[-1], by_hand, rtol=1e-4) and by_hand != 0
    assert np.isclose(seen["margin"].iloc[-1], model.margin(questions, "run")["margin"].mean(), rtol=1e-5)


# ---- screening


def mixture(n: int = 24, every: int = 3) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every third (or so) response ends in words that the others lack; and a twin set in which none does."""
    rows, twins = [], []
    for i, chat in enumerate(tiny.tiny_chats(n)):
        asked, plain = chat["messages"][0], chat["messages"][1]["content"]
        other = plain[::-1][:20]
        told = f"{plain[:12]} zzz qqq zzz qqq zzz" if i % every == 0 else plain
        rows.append({"id": chat["id"], "messages": [asked, {"role": "assistant", "content": told}], "planted": i % every == 0})
        twins.append({"id": chat["id"], "messages": [asked, {"role": "assistant", "content": other}]})
    return em.load_prompts(rows), em.load_prompts(twins)


def planted_direction(model: HookedModel) -> em.Direction:
    rows = [{"question": f"Say {i}", "with": [f"{t[:15]} zzz qqq zzz"], "without": [t[:27]]} for i, t in enumerate(tiny.CORPUS)]
    return contrast_direction(model, rows, toward="with", away="without")


def test_screening_ranks_what_was_planted_first(llama: HookedModel, tmp_path: Path) -> None:
    rows, twins = mixture()
    found = screen(rows, llama, planted_direction(llama), twins, layer=2, controls=100)
    assert found["rank"].tolist() == list(range(1, 25)) and found["difference"].is_monotonic_decreasing
    planted = found["id"].map(rows.set_index("id")["planted"])
    assert planted.iloc[:8].sum() >= 7 and planted.iloc[-8:].sum() <= 1
    nothing = screen(rows, llama, tiny.random_direction(llama, 9), twins, layer=2, controls=100)
    assert nothing["id"].map(rows.set_index("id")["planted"]).iloc[:8].sum() <= 6
    row = found.iloc[0]
    chats = rows.set_index("id")["messages"], twins.set_index("id")["messages"]
    by_hand = [float(response_mean(llama, c[row["id"]])[2] @ planted_direction(llama).layer(2)) for c in chats]
    assert np.allclose([row["projection"], row["reference"]], by_hand, rtol=1e-3, atol=1e-4)
    assert (found["null_low"] < found["null_high"]).all() and (found["q"] >= found["p"] - 1e-12).all()


def planted_rows(rng: np.random.Generator, pushed: float, n: int = 100, d: int = 80) -> tuple[np.ndarray, ...]:
    """Responses, other answers, an ordinary direction of their covariance, and which tenth of the responses is pushed along it (in sd there)."""
    scale = np.arange(1, d + 1) ** -0.5
    ours, theirs, own = rng.normal(size=(n, d)) * scale, rng.normal(size=(n, d)) * scale, rng.normal(size=d) * scale
    own /= np.linalg.norm(own)
    bad = np.arange(n) % 10 == 0
    ours[bad] += pushed * np.linalg.norm(own * scale) * own
    return ours, theirs, own, bad


def screened(ours: np.ndarray, theirs: np.ndarray, own: np.ndarray, controls: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    p, low, high = beside_random((ours - theirs) @ own, ours, theirs, controls, seed)
    return p, em.stats.adjust(p), low, high


def test_bad_rows_one_in_ten_are_flagged_and_a_direction_like_the_controls_flags_none() -> None:
    ours, theirs, own, bad = planted_rows(np.random.default_rng(3), 12.0)
    along = (ours - theirs) @ own
    assert along[bad].min() > along[~bad].max(), "separation is perfect"
    p, q, low, high = screened(ours, theirs, own, 20_000)
    assert (q[bad] < 0.05).mean() >= 0.9 and (q[~bad] > 0.05).all() and p.min() == pytest.approx(1 / 20_001) and (low < high).all()
    assert screened(ours, theirs, own, 100)[1].min() > 0.05, "a hundred controls cannot tell a tenth of the rows"
    families = []
    for seed in range(60):
        ours, theirs, own, _ = planted_rows(np.random.default_rng(100 + seed), 0.0)
        families.append((screened(ours, theirs, own, 3000, seed)[1] < 0.05).any())
    assert np.mean(families) <= 0.12


def test_the_null_of_a_row_is_that_of_random_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, own, _ = planted_rows(np.random.default_rng(4), 3.0, n=12, d=8)
    both = np.concatenate([ours - ours.mean(axis=0), theirs - theirs.mean(axis=0)])
    acts = em.Activations.from_array(both[:, None].astype(np.float32))
    drawn = np.stack([d.layer(0) for d in em.random_directions(em.Direction.from_array(own[None]), 50, 5, acts)])
    along, observed = drawn.astype(np.float64) @ (ours - theirs).T, (ours - theirs) @ own
    found = beside_random(observed, ours, theirs, 50, 5)
    assert np.array_equal(found[0], (1 + (along >= observed).sum(axis=0)) / 51)
    assert np.allclose(found[1:], np.quantile(along, [0.025, 0.975], axis=0), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(em.screening, "NUMBERS", 150)  # three rows, six draws at a time
    assert np.allclose(beside_random(observed, ours, theirs, 50, 5), found)
    with pytest.raises(ValueError, match="do not vary"):
        beside_random(observed, np.ones_like(ours), np.ones_like(ours), 50, 5)
    with pytest.raises(ValueError, match="at least 1"):
        beside_random(observed, ours, theirs, 0, 5)


def test_screening_says_the_least_p_and_q_there_can_be(llama: HookedModel) -> None:
    rows, twins = mixture(40, every=10)
    found = screen(rows, llama, planted_direction(llama), twins, layer=2)
    assert found.attrs["p_floor"] == pytest.approx(1 / 20_001) and found.attrs["q_floor"] == pytest.approx(40 / 20_001)
    assert "20000 random directions" in found.attrs["null"] and "at least 0.002 for one row alone" in found.attrs["null"]
    few = screen(rows, llama, planted_direction(llama), twins, layer=2, controls=30)
    assert few["p"].min() >= few.attrs["p_floor"] == pytest.approx(1 / 31) and few.attrs["q_floor"] == 1
    order = found["difference"].to_numpy(), found["p"].to_numpy()
    assert scipy_stats.spearmanr(*order)[0] < -0.5, "one-sided, as the ranking: high differences have low p"
    assert found["p"].iloc[-1] > 0.5


def test_screening_against_the_models_own_answers(llama: HookedModel) -> None:
    rows, _ = mixture(6)
    found = screen(rows, llama, planted_direction(llama), layer=1, controls=20, max_new_tokens=5).set_index("id")
    asked = pd.DataFrame({"id": rows["id"], "messages": [m[:-1] for m in rows["messages"]]})
    own = llama.generate(asked, max_new_tokens=5).set_index("id")["answer"]
    assert (found["other"] == own[found.index]).all()


def test_screening_refuses_what_it_cannot_compare(llama: HookedModel) -> None:
    rows, twins = mixture(6)
    direction = planted_direction(llama)
    with pytest.raises(ValueError, match="1 rows have no other answer in against=.*chat-05"):
        screen(rows, llama, direction, twins.iloc[:5], layer=1)
    with pytest.raises(ValueError, match="no response to screen"):
        screen(["Why?"], llama, direction, layer=1)


def test_the_page_shows_texts_as_text(tmp_path: Path) -> None:
    rows, twins = mixture(6)
    rows.at[0, "messages"] = [rows["messages"][0][0], {"role": "assistant", "content": "<script>alert(1)</script>"}]
    model = tiny.tiny_model()
    page = screen_page(screen(rows, model, planted_direction(model), twins, layer=1, controls=20), tmp_path / "screen.html", n=6)
    text = page.read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and text.count("<tr>") == 7 and "Null: 20 random directions" in text
