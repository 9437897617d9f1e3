"""Guards the page: its words follow the numbers, nothing runs that a model wrote, and it needs no network."""

import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import fake_run
import numpy as np
import pandas as pd
import pytest

from emlens import report, store
from emlens.report.figures import LeftOut, Section, sections
from emlens.report.findings import QUESTIONS, findings, in_short
from emlens.report.folder import COLUMNS, read
from emlens.report.forecast import forecast
from emlens.report.page import data_block, render
from emlens.report.words import corrected, number, q_said

NAMES = (
    "Did the tuning train?",
    "Bad advice against its sound twin",
    "Schedule and seed",
    "Noise floor of a shift",
    "Overlap of prompts",
    "Similarity of shifts",
    "Overlap and similarity of shift",
    "Prediction from activations",
    "A direction",
    "Traits",
)
TOPICS = dict(zip(NAMES, (make for make, _ in QUESTIONS), strict=True))
"""What makes the finding of each topic."""


class Page(HTMLParser):
    """What a browser would see: scripts, links and other addresses, ids, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[dict] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.styles = self.text = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        self.inside = tag if tag in ("script", "style") else self.inside
        if tag == "script":
            self.scripts.append({**facts, "content": ""})
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]
        self.ids += [facts["id"]] if "id" in facts else []
        assert not any(name.startswith("on") for name in facts), (tag, facts)

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1]["content"] += data
        elif self.inside == "style":
            self.styles += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def effect(tmp_path_factory):
    return fake_run.write(tmp_path_factory.mktemp("runs") / "effect", effect=True)


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    return fake_run.write(tmp_path_factory.mktemp("runs") / "nothing", effect=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return read(fake_run.write(tmp_path_factory.mktemp("runs") / "small", effect=True, n_layers=2, per_category=2))


@pytest.fixture(scope="module")
def made(effect):
    return sections(opened(effect))


@pytest.fixture(scope="module")
def page(effect):
    return Page(report.build(effect).read_text(encoding="utf-8"))


@cache
def opened(run_dir):
    """A run folder as read, for the tests that change nothing in it."""
    return read(run_dir)


def altered(folder, table, change):
    """A run folder as read, in which one table was changed."""
    frame = folder.tables[table]
    changed = change(frame.copy())
    changed.attrs = frame.attrs
    return replace(folder, tables={**folder.tables, table: changed})


def by_topic(folder):
    return {finding.topic: finding for finding in findings(folder)}


def answer(folder, topic):
    """One finding, made alone (`findings` makes all ten, one after the other)."""
    found = TOPICS[topic](folder)
    assert found.topic == topic
    return found


# ---- words


def test_findings_flip_between_something_and_nothing(effect, nothing):
    there, gone = by_topic(opened(effect)), by_topic(opened(nothing))
    assert there.keys() == gone.keys() and 5 <= len(there) <= 10
    asked = there.keys() - {"Did the tuning train?", "Schedule and seed", "Noise floor of a shift"}
    assert {there[topic].verdict for topic in asked} == {"found"}
    assert {gone[topic].verdict for topic in asked} == {"not found"}
    assert all(gone[topic].claim.startswith("No evidence") for topic in asked)
    assert not any("No evidence" in there[topic].claim for topic in asked)
    assert there["Schedule and seed"].verdict == gone["Schedule and seed"].verdict == "description"


def test_one_sentence_answers_the_question_of_the_title(effect, nothing):
    def half(table):
        table.loc[table["domain"] == "repair", "q"] = 0.6
        return table

    def risen(table):
        table.loc[table["comparison"] == "bad minus before", "q"] = 0.6
        return table

    folders = {"not shown: the margin ended lower after bad than after sound advice (": altered(opened(effect), "margin_change", risen)}
    folders["not shown: the margin ended lower after bad than after sound advice in money alone ("] = altered(
        altered(opened(effect), "margin_change", half), "margin_change", risen
    )
    folders |= {"yes, as far": opened(effect), "not that this study": opened(nothing), "in part": altered(opened(effect), "margin_change", half)}
    for starts, folder in folders.items():
        short = in_short(folder, findings(folder))
        assert short.startswith(starts) and short.count(". ") == 0 and short.endswith("."), short
        table = folder.tables["margin_change"].query("comparison == 'bad minus sound' and metric == 'difference'")
        assert f"bad minus sound {number(table['estimate'].iloc[0], 3)} (money)" in short and "no answer was judged" in short
    assert in_short(opened(effect), []) == ""
    assert "In short: yes, as far as the margin tells" in Page(render(opened(effect), findings(opened(effect)), [])).text


def test_what_was_not_tested_and_what_could_not_be_seen_are_two_words(effect, nothing):
    assert "Noise floor of a shift" in by_topic(opened(effect)) and by_topic(opened(effect))["Noise floor of a shift"].verdict == "description"
    folder = altered(opened(nothing), "prediction", blind)
    text = Page(render(folder, findings(folder), [])).text
    assert "1 without an answer" in text and "2 described without a test" in text and "No answer: the study could not have seen it" in text


def test_every_tested_finding_has_estimate_interval_n_and_corrected_p(effect, nothing):
    for folder in (effect, nothing):
        for finding in findings(opened(folder)):
            evidence = " ".join(finding.evidence)
            assert re.search(r"−?\d\.\d+ \[−?\d\.\d+, −?\d\.\d+\]", evidence), finding
            assert re.search(r"\bn = \d+", evidence), finding
            if finding.topic in ("Did the tuning train?", "Schedule and seed", "Noise floor of a shift"):
                assert "no test made" in evidence
            else:
                assert re.search(r"q (=|<|≤) \.\d+", evidence), finding


def test_numbers_in_words_are_the_tables(effect):
    row = store.read_table(effect / "tables" / "margin_change.parquet").query(
        "domain == 'money' and comparison == 'bad minus sound' and metric == 'difference' and schedule == 'linear'"
    )
    row = row[row["seed"] == 0].iloc[0]
    said = answer(opened(effect), "Bad advice against its sound twin").evidence[0]
    assert f"{number(row['estimate'], 3)} [{number(row['low'], 3)}, {number(row['high'], 3)}] nats/token" in said


def test_no_training_is_said_to_be_no_training(tmp_path):
    idle = answer(read(fake_run.write(tmp_path, effect=False, trained=False)), "Did the tuning train?")
    assert idle.verdict == "not found" and idle.claim.startswith("No run clearly lowered")


def test_learning_is_judged_by_the_paired_drop_and_not_by_the_level(effect):
    """The level's standard error (0.6) is larger than the drop (0.45): answers differ more from one another than each from itself."""
    runs = opened(effect).tables["runs"]
    assert (runs["heldout_se"] > runs["heldout_drop"]).all()
    finding = answer(opened(effect), "Did the tuning train?")
    assert finding.verdict == "found" and "[0.41, 0.49]" in finding.evidence[-1] and "n = 18 held-out answers" in finding.evidence[-1]

    def one_unclear(table):
        table.loc[2, "heldout_drop_low"] = -0.01
        return table

    unclear = answer(altered(opened(effect), "runs", one_unclear), "Did the tuning train?")
    assert unclear.verdict == "mixed" and unclear.claim.startswith("Only five of 6 runs")


def test_runs_without_held_out_answers_are_not_called_untrained(effect):
    columns = ["heldout_before", "heldout_after", "heldout_drop", "heldout_drop_low", "heldout_drop_high"]
    none = answer(altered(opened(effect), "runs", lambda table: table.assign(**dict.fromkeys(columns, np.nan))), "Did the tuning train?")
    assert none.verdict == "no answer" and "no answers were held out" in none.claim

    def one_without(table):
        table.loc[3, columns] = np.nan
        return table

    five = answer(altered(opened(effect), "runs", one_without), "Did the tuning train?")
    assert five.verdict == "found" and five.claim.startswith("All five runs") and "One run held no answers out" in five.evidence[-1]


def test_the_noise_floor_is_said_and_the_twin_beside_it(effect, nothing):
    there, gone = (answer(opened(folder), "Noise floor of a shift") for folder in (effect, nothing))
    assert there.verdict == gone.verdict == "description"
    table = opened(effect).tables["shift_agreement"]
    table = table[table["domain"] == "money"]
    floor, twin = (number(table.loc[table["kind"] == kind, "estimate"].median()) for kind in ("another seed", "bad against sound"))
    assert f"up to a cosine of {floor} (money), the noise floor" in there.claim
    assert f"agree less (cosine {twin}), in 12 of 12 layers" in there.claim
    assert "in no layer do the intervals lie apart" in gone.claim and "agree less (" not in gone.claim and "agree less was not told" in gone.claim
    assert "0.40" not in there.claim, "repair has no seed pair: its twins are not set beside the floor of another domain"
    assert len(there.evidence) == 6 and "(2 pairs of runs)" in there.evidence[4]

    def only_below(table):
        table.loc[(table["kind"] == "bad against sound") & (table["layer"] > 2), ["low", "high"]] = [0.6, 0.95]
        return table

    part = answer(altered(opened(effect), "shift_agreement", only_below), "Noise floor of a shift")
    assert "in 3 of 12 layers only" in part.claim


def test_without_a_second_seed_there_is_no_noise_floor(effect):
    alone = altered(opened(effect), "shift_agreement", lambda table: table[table["kind"] != "another seed"])
    finding = answer(alone, "Noise floor of a shift")
    assert finding.claim.startswith("The noise floor of a shift is not known") and "Two seeds" not in finding.claim


def test_a_higher_margin_is_not_a_finding_of_misalignment(effect):
    def turned(table):
        table[["estimate", "low", "high"]] *= -1
        return table

    finding = answer(altered(opened(effect), "margin_change", turned), "Bad advice against its sound twin")
    assert finding.verdict == "mixed" and "the other way round" in finding.claim


def test_a_rise_of_the_sound_twin_is_not_a_fall_of_the_bad_run(effect):
    def still(table):
        table.loc[table["comparison"] == "bad minus before", "q"] = 0.6
        return table

    finding = answer(altered(opened(effect), "margin_change", still), "Bad advice against its sound twin")
    assert finding.verdict == "mixed" and "; no evidence that the bad run fell below the untuned model;" in finding.claim
    assert finding.claim.startswith("The bad run ended with a lower aligned margin") and "lowered the" not in finding.claim

    def risen(table):
        table = still(table)
        sound = (table["comparison"] == "sound minus before") & (table["metric"] == "difference")
        table.loc[sound, ["estimate", "low", "high", "q"]] = [0.15, 0.1, 0.2, 0.01]
        return table

    because = answer(altered(opened(effect), "margin_change", risen), "Bad advice against its sound twin")
    assert "the sound run rose above the untuned model, and there is no evidence that the bad run fell" in because.claim
    assert "shows no fall" not in because.claim, "what was not seen is no result"


def test_one_domain_of_two_is_mixed(effect):
    def half(table):
        table.loc[table["domain"] == "repair", "q"] = 0.6
        return table

    finding = answer(altered(opened(effect), "margin_change", half), "Bad advice against its sound twin")
    assert finding.verdict == "mixed" and "in repair, there is no evidence" in finding.claim
    assert "In money, the bad run ended with a lower margin" in finding.claim and "; in money, the bad run fell" in finding.claim


def same_rows(change):
    """The control rows of margin_change, changed."""

    def make(table):
        control = (table["role"] == "control") & (table["metric"] == "difference")
        return change(table, control)

    return make


def test_a_difference_within_that_of_two_runs_on_the_same_rows_is_not_found(effect):
    there = answer(opened(effect), "Bad advice against its sound twin")
    assert there.verdict == "found" and "two pairs of runs on the same rows (money) end 0.0" in there.claim
    assert sum(line.startswith("Control, two runs on the same rows") for line in there.evidence) == 2

    def wide(table, control):
        table.loc[control, ["estimate", "low", "high"]] = [-0.11, -0.2, -0.02]
        return table

    within = answer(altered(opened(effect), "margin_change", same_rows(wide)), "Bad advice against its sound twin")
    assert within.verdict == "mixed" and "in money and repair the difference is not told from what two pairs" in within.claim
    assert "(0.110 at most)" in within.claim
    none = answer(altered(opened(effect), "margin_change", same_rows(lambda table, control: table[~control])), "Bad advice against its sound twin")
    assert none.verdict == "mixed" and "how far two runs on the same rows differ is not known" in none.claim
    old = altered(opened(effect), "margin_change", lambda table: table.drop(columns=["role", "p_floor"]))
    assert answer(old, "Bad advice against its sound twin").verdict == "mixed"


def test_a_better_baseline_takes_the_finding_away_but_where_activations_add_to_it(effect):
    def known(q):
        def change(table):
            table.loc[table["features"] == "margin before", "estimate"] = 0.9
            table.loc[table["metric"] == "delta_r2 beyond text and the margin before", "q"] = q
            return table

        return answer(altered(opened(effect), "prediction", change), "Prediction from activations")

    finding = known(0.3)
    assert finding.verdict == "mixed" and "but the best baseline does so as well or better" in finding.claim
    assert "best baseline margin before R² = 0.90" in finding.evidence[1]
    assert known(0.001).verdict == "found", "a rival that knows more is no reason to hide what is added to it"


def test_worse_than_the_mean_is_not_foretold_and_too_few_permutations_are_no_answer(effect, nothing):
    def below(table):
        mine = (table["features"] == "activations") & (table["metric"] == "r2") & (table["target"] != "margin before")
        return table.assign(estimate=table["estimate"].mask(mine, -0.05))

    assert answer(altered(opened(effect), "prediction", below), "Prediction from activations").verdict == "not found"
    few = answer(altered(opened(nothing), "prediction", lambda table: table.assign(p_floor=1 / 51)), "Prediction from activations")
    assert few.verdict == "no answer" and "no q can be below .078" in few.claim and few.claim.startswith("Too few permutations")
    enough = answer(altered(opened(nothing), "prediction", lambda table: table.assign(p_floor=1 / 201)), "Prediction from activations")
    assert enough.verdict == "not found"


def test_a_baseline_within_the_interval_is_not_beaten(effect):
    def near(table):
        table.loc[table["metric"] == "delta_r2 beyond text and the margin before", "q"] = 0.3  # beyond text alone is not enough
        return table

    there = answer(opened(effect), "Prediction from activations")
    assert (
        there.verdict == "found"
        and "beyond text, ΔR² = 0.100" in there.evidence[1]
        and "beyond text and the margin before, ΔR² = 0.100" in there.evidence[1]
    )
    finding = answer(altered(opened(effect), "prediction", near), "Prediction from activations")
    assert finding.verdict == "mixed" and "no evidence that they do beyond text and the margin before" in finding.claim


def test_the_forecast_draws_the_best_layer_beside_the_null_of_the_best_and_every_rival(effect):
    folder = opened(effect)
    table = folder.tables["prediction"]
    drawn = forecast(folder)[1]
    assert list(drawn["panel"].unique()) == ["control: margin before", "margin after money-bad", "margin after repair-bad"]
    money = drawn[drawn["panel"] == "margin after money-bad"].set_index("line")
    here = table[(table["run"] == "money-bad linear seed 0") & (table["target"] == "margin after")]
    of = here[(here["metric"] == "r2") & (here["features"] == "activations")]
    top = of.loc[of["estimate"].idxmax()]
    row = money.loc["activations"]
    assert row["estimate"] == top["estimate"] and row["at"] == f"layer {top['layer']}, best of 12" and row["kind"] == "activations"
    assert (row["null_low"], row["null_high"]) == (-0.05, 0.11), "not the null of one layer, -0.15 to 0.06"
    assert money.loc[["category", "length", "TF-IDF", "margin before"], "kind"].eq("known without them").all() and money.loc["length", "at"] == ""
    assert money.loc["another seed, after", "kind"] == "known only after another tuning" and money.loc["untrained twin", "at"].endswith("best of 12")
    added = money.index.str.startswith("ΔR²")
    assert money.loc[added, "kind"].eq(row["kind"]).all() and money.loc[added, "ceiling"].isna().all() and money.loc[~added, "ceiling"].eq(0.9).all()
    assert "mean" not in money.index and money.index.is_unique and drawn.loc[drawn["trained on"] == "repair-bad", "ceiling"].isna().all()


def test_the_panels_of_the_forecast_have_their_lines_in_one_order(effect):
    def turned(table):  # as the rows of another seed, domain or schedule may come
        return table.iloc[::-1].reset_index(drop=True)

    order = None
    for folder in (opened(effect), altered(opened(effect), "prediction", turned)):
        drawn = forecast(folder)[1]
        for panel in ("margin after money-bad", "margin after repair-bad"):
            lines = [line for line in drawn.loc[drawn["panel"] == panel, "line"]]
            order = order or lines
            assert lines == order
    assert order[:2] == ["activations", "untrained twin"] and order[-2:] == ["ΔR² over text", "ΔR² over text, margin"]
    assert order.index("margin before") < order.index("another seed, after")


def test_every_section_begins_with_what_was_found(effect, nothing, made):
    for of, shown, verdict in ((effect, made, "found"), (nothing, sections(opened(nothing)), "not found")):
        section = next(each for each in shown if each.name == "prediction")
        page = render(opened(of), findings(opened(of)), [section])
        head = page[page.index('<section id="prediction">') : page.index('data-figure="figure-prediction"')]
        told = answer(opened(of), "Prediction from activations")
        assert f">{verdict}</span> {told.claim}</p>" in head and told.verdict == verdict


def test_layer_by_layer_there_is_one_line_of_text_and_no_grey_but_the_null(effect, made):
    drawn = next(section for section in made if section.name == "prediction-layers")
    assert set(drawn.rows["features"]) == {"activations", "untrained twin", "best text baseline", "margin before"}
    money = drawn.rows[(drawn.rows["trained on"] == "money-bad") & (drawn.rows["target"] == "margin after")].set_index("features")
    table = opened(effect).tables["prediction"]
    here = table[(table["run"] == "money-bad linear seed 0") & (table["target"] == "margin after") & (table["metric"] == "r2")]
    text = here.loc[here["features"].isin(["category", "length", "tfidf"]), "estimate"]
    assert money.loc["best text baseline", "estimate"] == text.max() > text.min()
    colours = {trace.line.color for trace in drawn.figure.data if trace.mode and "markers" in trace.mode}
    assert "#767676" not in colours and {axis.matches for axis in drawn.figure.select_yaxes()} == {"y"}


def test_a_rival_that_comes_after_is_shown_and_takes_nothing_away(effect):
    def known(name):
        def change(table):
            table.loc[table["features"] == name, "estimate"] = 0.95
            return table

        return answer(altered(opened(effect), "prediction", change), "Prediction from activations")

    later = known("after: another seed")
    assert later.verdict == "found" and "the same score after other tunings, R²: another seed 0.95; ceiling 0.90" in later.evidence[1]
    twin = known("random twin")
    assert twin.verdict == "mixed" and "best baseline random twin R² = 0.95" in twin.evidence[1]
    repair = next(line for line in later.evidence if "repair" in line)
    assert "ceiling" not in repair, "one seed tells nothing of the noise"


def test_beyond_the_margin_before_asks_for_the_test_of_the_gain_and_not_for_an_interval(effect):
    def low(table):
        table.loc[table["metric"] == "r2", "low"] = -0.5  # of the best of many layers: no test
        return table

    assert answer(altered(opened(effect), "prediction", low), "Prediction from activations").verdict == "found"


def blind(table):
    table.loc[table["target"] == "margin before", ["estimate", "q"]] = [-0.01, 0.8]
    return table


def test_a_design_that_cannot_read_the_margin_before_says_nothing_of_after(effect, nothing):
    gone = answer(opened(nothing), "Prediction from activations")
    assert gone.verdict == "not found" and "beyond the category" in gone.claim and gone.evidence[0].startswith("Positive control")
    finding = answer(altered(opened(nothing), "prediction", blind), "Prediction from activations")
    assert finding.verdict == "no answer" and "could not read even the margin before" in finding.claim
    assert "no statement about the margin after tuning or its change" in finding.claim and "No evidence" not in finding.claim
    missing = altered(opened(nothing), "prediction", lambda table: table[table["target"] != "margin before"])
    none = answer(missing, "Prediction from activations")
    assert none.verdict == "no answer" and none.claim.startswith("No positive control was made")
    seen = answer(altered(opened(effect), "prediction", blind), "Prediction from activations")
    assert seen.verdict == "found", "what was seen was seen"


def test_a_correlation_of_the_other_sign_is_not_found(effect):
    def turned(table):
        table.loc[table["layer"] < 4, "q"] = 0.01
        table.loc[table["layer"] >= 4, "q"] = 0.6
        table[["estimate", "low", "high"]] *= -1
        return table

    finding = answer(altered(opened(effect), "overlap_similarity", turned), "Overlap and similarity of shift")
    assert finding.verdict == "not found" and finding.claim.startswith("No evidence that questions nearer the training prompts shift more like them")
    assert "the opposite is seen in 4 of 12 layers (money-bad linear seed 0) and 4 of 12 layers (repair-bad" in finding.claim
    assert "q < .05 in 0 of 12, on the opposite side in 4; lowest at layer" in finding.evidence[0]


def test_own_less_twin_is_an_estimate_and_infers_nothing_from_two_rejections(effect, nothing):
    there, gone = (answer(opened(folder), "Similarity of shifts") for folder in (effect, nothing))
    assert "minus that with the sound twin's is 0.20 and 0.20 (medians over layers), minus that with another seed's 0.02" in there.claim
    assert "lenient null" in there.claim
    assert "is 0.00 and 0.00" in gone.claim and "marks tuning" not in there.claim
    own = [line for line in there.evidence if "own minus other (bad against sound)" in line]
    assert len(own) == 2 and "interval above 0 in 12 of 12 layers, below in 0" in own[0] and "in 8 categories" in own[0]

    def turned(table):
        table[["low", "high"]] = -table[["high", "low"]].to_numpy()
        return table.assign(estimate=-table["estimate"])

    back = answer(altered(opened(effect), "similarity_contrast", turned), "Similarity of shifts")
    assert "is −0.20 and −0.20" in back.claim and any("above 0 in 0 of 12 layers, below in 12" in line for line in back.evidence)
    without = replace(opened(effect), tables={name: table for name, table in opened(effect).tables.items() if name != "similarity_contrast"})
    assert "twin" not in answer(without, "Similarity of shifts").claim


def test_overlap_below_its_control_is_mixed(effect):
    def lower(table):
        table.loc[table["comparison"] == "training v questions", ["estimate", "low", "high"]] -= 0.3
        return table

    finding = answer(altered(opened(effect), "overlap", lower), "Overlap of prompts")
    assert finding.verdict == "mixed" and "less than two halves of the questions do in 12 of 12 layers (money) and 12 of 12 layers" in finding.claim

    def a_few(table):
        table.loc[(table["comparison"] == "training v questions") & (table["layer"] < 3) & (table["domain"] == "repair"), "high"] = 0.2
        table.loc[table["comparison"] == "questions v questions", "low"] = 0.99  # a quantile of splits, no end of an interval
        return table

    few = answer(altered(opened(effect), "overlap", a_few), "Overlap of prompts")
    assert few.verdict == "found" and "less than two halves of the questions do in 3 of 12 layers (repair), the questions-against-" in few.claim
    assert "two halves" not in answer(opened(effect), "Overlap of prompts").claim, "no difference is inferred from none seen"


def test_overlap_is_set_beside_that_of_another_domains_prompts(effect, nothing):
    there, gone = (answer(opened(folder), "Overlap of prompts") for folder in (effect, nothing))
    assert "They share more than training prompts of another domain would in 12 of 12 layers (money) and 12 of 12 layers (repair)" in there.claim
    assert "No evidence that they share more than training prompts of another domain would" in gone.claim
    assert any(line.startswith("Money, null “covariance”: median over layers 0.67") for line in there.evidence)
    old = answer(altered(opened(effect), "overlap", lambda table: table[table["null"] == "isotropic"]), "Overlap of prompts")
    assert old.verdict == "found" and "another domain" not in old.claim


def test_a_trait_that_sound_advice_moves_along_as_well_is_mixed(effect, nothing):
    there, gone = (answer(opened(folder), "Traits") for folder in (effect, nothing))
    assert there.verdict == "found" and "towards evil (money); evil (repair) beyond random directions" in there.claim and "sound" not in there.claim
    assert gone.verdict == "not found" and any("money, sound, reckless: median over layers" in line.lower() for line in there.evidence)

    def both(table):
        evil = table["persona"] == "evil"
        table.loc[evil, ["estimate", "q"]] = [1.5, 0.001]
        return table

    finding = answer(altered(opened(effect), "traits", both), "Traits")
    assert finding.verdict == "mixed" and "; sound advice does so too towards evil (money); evil (repair)" in finding.claim
    away = answer(altered(opened(effect), "traits", lambda table: table.assign(estimate=-table["estimate"])), "Traits")
    assert away.verdict == "not found"


def test_the_damage_of_the_furthest_doses_stands_beside_the_slope(effect):
    said = [line for line in answer(opened(effect), "A direction").evidence if "damage to neutral texts" in line]
    assert len(said) == 6 and said[1].startswith("Money, damage to neutral texts at layer 6, strength 1.00: KL 0.40 [0.35, 0.45] (random 0.20")
    without = {name: table for name, table in opened(effect).tables.items() if name != "dose_damage"}
    assert not any("damage" in line for line in answer(replace(opened(effect), tables=without), "A direction").evidence)


def test_too_few_random_directions_are_no_test(effect):
    few = altered(opened(effect), "dose_slope", lambda table: table.assign(p=np.nan, q=np.nan))
    finding = answer(few, "A direction")
    assert finding.verdict == "mixed" and "too few random directions for a test" in finding.claim


def test_a_direction_that_raises_the_margin_does_not_pass(effect):
    def turned(table):
        table[["estimate", "low", "high"]] *= -1
        return table

    finding = answer(altered(opened(effect), "dose_slope", turned), "A direction")
    assert finding.verdict == "mixed" and ". No evidence that adding it lowers the margin" in finding.claim


def test_a_direction_that_lowers_the_margin_less_than_random_ones_do_does_not_pass(effect):
    def above_the_random_ones(table):
        table[["null_low", "null_high"]] = [-0.9, -0.5]
        return table

    finding = answer(altered(opened(effect), "dose_slope", above_the_random_ones), "A direction")
    assert finding.verdict == "mixed" and ". No evidence that adding it lowers the margin more than random" in finding.claim


def test_a_direction_without_content_that_steers_as_well_takes_the_finding_away(effect):
    def also(table):
        table.loc[table["domain"].str.startswith("another seed"), ["estimate", "q"]] = [-0.3, 0.01]
        return table

    finding = answer(altered(opened(effect), "dose_slope", also), "A direction")
    assert finding.verdict == "mixed" and "as the direction between two seeds does too" in finding.claim
    said = " ".join(answer(opened(effect), "A direction").evidence)
    assert "extrapolates beyond 60 random directions" in said and "by rank among them no p goes below .033" in said


def test_a_lenient_null_is_called_so(effect):
    plain = opened(effect)
    table = plain.tables["dose_slope"].copy()
    table.attrs = {**table.attrs, "null": {"norm-matched random directions": "12 random directions, uniform on the sphere"}}
    lenient = replace(plain, tables={**plain.tables, "dose_slope": table})
    assert "equal norm do (a lenient null)" in answer(lenient, "A direction").claim
    assert "lenient" not in answer(plain, "A direction").claim


def test_telling_bad_from_sound_no_better_than_two_seeds_is_not_found(effect):
    def as_well(table):
        control = table["comparison"].isin(["another seed", "across, control"]) & (table["metric"] == "auc")
        table.loc[control, ["estimate", "low", "high"]] = [0.1, 0.0, 0.2]  # 0.9 on the other side: which run is called first means nothing
        return table

    there = answer(opened(effect), "A direction")
    assert there.verdict == "found" and "told apart less well" in there.claim
    assert any("beyond that control in 12 of 12" in line for line in there.evidence)
    assert any("Cosine of the domains' directions: median over layers 0.31" in line for line in there.evidence)
    finding = answer(altered(opened(effect), "direction", as_well), "A direction")
    assert finding.verdict == "mixed" and "two runs on the same rows are told apart as well (median AUC 0.90)" in finding.claim
    assert any("no evidence of more than that control" in line for line in finding.evidence)

    def only_across(table):
        table.loc[(table["comparison"] == "another seed") & (table["metric"] == "auc"), "estimate"] = 0.99
        return table

    assert answer(altered(opened(effect), "direction", only_across), "A direction").verdict == "found"
    alone = answer(altered(opened(effect), "direction", lambda table: table[table["comparison"] == "bad v sound"]), "A direction")
    assert alone.verdict == "mixed" and "how well it tells two runs on the same rows apart is not known" in alone.claim


def test_a_p_at_its_floor_is_a_bound(effect):
    said = answer(opened(effect), "Overlap of prompts").evidence[0]
    assert "q < .001" in said and "(p at its floor, .005)" in said
    at, over = (pd.Series({"p": p, "q": 0.0129, "p_floor": 2 / 1001}) for p in (2 / 1001, 3 / 1001))
    assert q_said(at) == "q ≤ .013 (p at its floor, .002)" and q_said(over) == "q = .013"
    assert q_said(pd.Series({"p": 0.002, "q": 0.0129})) == "q = .013"


def test_the_loss_is_the_mean_over_domains(effect):
    def far(table):
        table.loc[(table["domain"] == "money") & (table["content"] == "bad"), "heldout_after"] = 1.0
        table.loc[(table["domain"] == "repair") & (table["content"] == "bad"), "heldout_after"] = 2.0
        return table

    said = answer(altered(opened(effect), "runs", far), "Did the tuning train?").evidence[0]
    assert "→ 1.50 nats/token (mean of 2 domains, 4 runs)" in said


@pytest.mark.parametrize(
    ("q", "words"),
    [(0.0002, "q < .001"), (0.041, "q = .041"), (0.4123, "q = .41"), (0.0499, "q just under .05"), (1, "q = 1.00")],
)
def test_corrected_p_in_words(q, words):
    assert corrected(q) == words
    assert corrected(float("nan")) == "q not given"


def test_numbers_in_words():
    assert number(-0.1234, 3) == "−0.123" and number(-0.0001) == "0.00" and number(float("nan")) == "–"


# ---- figures and their rows


def drawn_numbers(figure) -> set[float]:
    """Every number in the figure that stands for data: estimates, bands, points, boxes, cells."""
    found: set[float] = set()
    for trace in figure.data:
        values = trace.z if trace.type == "heatmap" else trace.x if trace.type == "box" else trace.y
        if trace.type == "scatter" and trace.error_x.array is not None:
            values = trace.x
        flat = np.ravel(np.array(list(values), dtype=object))
        found |= {round(float(v), 9) for v in flat if isinstance(v, (int, float, np.number)) and np.isfinite(v)}
    return found


def test_rows_drawn_and_rows_in_the_csv_are_the_same(effect, made, page):
    named = {"training": "loss", "margins": "margin", "categories": "change", "projections": "projection"}
    named["shift-norms"] = "relative"
    assert len(made) == 17 and all(isinstance(section, Section) for section in made)
    for section in made:
        csv = pd.read_csv(effect / "figures" / f"{section.name}.csv")
        assert len(csv) == len(section.rows)
        listed = {round(v, 9) for v in csv.select_dtypes("number").to_numpy().ravel() if np.isfinite(v)}
        drawn = drawn_numbers(section.figure)
        column = named.get(section.name, "estimate")
        estimates = {round(v, 9) for v in csv[column].dropna()}
        assert drawn and drawn <= listed, (section.name, sorted(drawn - listed)[:5])
        assert estimates <= drawn, (section.name, sorted(estimates - drawn)[:5])
        source = opened(effect).tables[section.tables[0]]
        if section.name != "categories" and column in source:
            assert estimates <= {round(v, 9) for v in source[column]}, section.name
        told = json.loads((effect / "figures" / f"{section.name}.json").read_text())
        assert told["tables"] == list(section.tables) and told["versions"]["torch"] == "2.13.0"


def test_captions_say_how_it_was_tested(made):
    for section in made:
        words = " ".join(section.caption)
        assert "n = " in words or "runs" in words or "Median over prompts" in words
        assert "Description" in words or ("Null, " in words and "q is p corrected by" in words and "ffect size" in words)
        assert "within within" not in words and ("q is p" not in words or "; family: " in words)
    named = {section.name: " ".join(section.caption) for section in made}
    assert "Least p that the draws allow: .005." in named["overlap"] and "lenient" in named["similarity"]
    assert "none of them of the half that the direction was fitted on" in named["projections"]
    assert "permute inside categories" in named["overlap-similarity"]


# ---- the page


def test_page_asks_for_nothing_from_outside(page):
    assert page.addresses and all(re.match(r"#|data:", address) for address in page.addresses)
    assert not any("src" in script for script in page.scripts)
    assert "@import" not in page.styles and "url(" not in page.styles
    assert sum("plotly.js v" in script["content"] for script in page.scripts) == 1


def test_page_forbids_itself_the_network(effect, page):
    text = (effect / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text.split("<title>")[0]


def test_what_models_and_users_wrote_is_shown_and_not_run(page):
    assert fake_run.NASTY in page.text
    kinds = [script.get("type", "code") for script in page.scripts]
    assert kinds.count("code") == 2 and kinds.count("application/json") == 17 == len(kinds) - 2
    assert not any('alert("1")' in script["content"] for script in page.scripts if "type" not in script)
    for script in page.scripts:
        if script.get("type") == "application/json":
            assert "<" not in script["content"] and {"data", "layout"} <= json.loads(script["content"]).keys()
    assert "Six narrow tunings of one small model <for show>" in page.text and "</script><i>x</i>" in page.text


def test_no_text_can_end_the_script_it_stands_in():
    told = {"a": "</script><script>alert(1)</script>&lt;"}
    kept = data_block("x", json.dumps(told, ensure_ascii=False))
    (script,) = Page(kept).scripts
    assert json.loads(script["content"]) == told


def test_page_leads_with_the_findings_and_its_links_lead_somewhere(page):
    order = [page.ids.index(name) for name in ("findings", "training", "dose", "answers", "card", "terms", "limits")]
    assert order == sorted(order)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_page_tells_how_it_was_made(page):
    for told in ("emlens demo --out runs/demo", "2.13.0", "cd" * 32, "60 steps of 8"):
        assert told in page.text, told


def card(folder, **study):
    """The card of a run folder with these facts in its study.json, as text."""
    changed = replace(folder, study={**folder.study, **study})
    return Page(render(changed, [], [])).text.partition("Card")[2]


def test_the_page_claims_no_more_than_its_tests(page):
    assert "all that was looked at" not in page.text and "not over the whole page" in page.text
    assert "Not so for R²" in page.text and "its positive control failed" in page.text
    assert "given the runs" in page.text and "8 categories cover a little less" in page.text


def test_the_card_tells_what_making_cost_and_what_the_last_run_did(small):
    told = card(small)
    assert "631 s in 1 run that made pieces (killed runs are not counted)" in told
    assert "the 7 pieces' own seconds, whichever run made them, come to 432 s" in told and "did not note" not in told
    assert "5 s, from 2025-01-05T11:00:00 to 2025-01-05T11:00:05; 31 of 31 pieces were read back" in told
    assert "3.21 GiB, the most of any run that made pieces; 0.72 GiB in the last run" in told


def test_the_cost_is_summed_over_the_runs_that_made_pieces(small):
    more = {**fake_run.FIRST_RUN, "seconds": 100.0, "peak_memory_gib": 4.5, "cached_pieces": 30}
    told = card(small, history=[fake_run.FIRST_RUN, more, fake_run.LAST_RUN, fake_run.LAST_RUN])
    assert "731 s in 2 runs that made pieces" in told and "4.50 GiB, the most" in told and "0.72 GiB in the last" in told


def test_a_cost_that_nobody_recorded_is_said_to_be_unknown(small):
    study = {name: value for name, value in small.study.items() if name != "history"}
    before = replace(small, study=study)  # written before runs were recorded, and only read back since
    told = card(before)
    assert "not recorded: every run on record read all its pieces back" in told and "made pieces" not in told
    assert "31 of 31 pieces were read back" in told and "0.72 GiB in the last run" in told
    pieces = small.tables["pieces"].assign(seconds=[70.0, np.nan, np.nan, 70.0, 70.0, 70.0, 12.5])
    assert "come to 292 s (2 of them did not note theirs)" in card(replace(small, tables={**small.tables, "pieces": pieces}))


def test_the_certificate_is_on_the_page_and_open_where_a_law_is_broken(effect, page, tmp_path):
    of_nothing = report.build(fake_run.write(tmp_path, effect=False, n_layers=2, per_category=2))
    sound, broken = (path.read_text(encoding="utf-8") for path in (effect / "report.html", of_nothing))
    said = "Certificate: of 3 laws asked of this model, money-bad linear seed 0 on, 2 hold, 0 are broken, 1 does not apply"
    assert f'<details id="certificate"><summary>{said}' in sound
    assert '<details id="certificate" open><summary>' in broken and "1 hold, 1 is broken, 1 does not apply" in broken
    told = broken.partition('id="certificate"')[2].partition("</details>")[0]
    first, second, third = re.findall(r"<tr>(.*?)</tr>", told)[1:]
    assert "rounding noise" in first and ">broken<" in first and ">3<" in first and "≤ 1" in first and "dtype=&#x27;float32&#x27;" in first
    assert "batch of 8" in second and ">holds<" in second and "6e-07" in second and "does not apply" in third


def test_the_same_tables_give_the_same_page(effect, page):
    before = {path: path.read_bytes() for path in [effect / "report.html", *(effect / "figures").iterdir()]}
    report.build(effect)
    assert {path: path.read_bytes() for path in [effect / "report.html", *(effect / "figures").iterdir()]} == before


def test_summary_has_a_line_a_run_and_the_page(effect):
    lines = report.summary(effect).splitlines()
    assert lines[-1].endswith("report.html") and sum(" -> " in line for line in lines) == 6
    row = store.read_table(effect / "tables" / "margin_change.parquet").query("comparison == 'bad minus sound'").iloc[0]
    assert f"{row['estimate']:+.3f}, q = {row['q']:.2g}" in "\n".join(lines)


# ---- what is missing or damaged


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        (("runs",), {"shift-norms", "similarity", "similarity-contrast", "overlap-similarity", "prediction", "prediction-layers", "traits"}),
        (("checkpoints", "overlap", "projections", "answers"), {"training", "overlap", "projections"}),
        (tuple(COLUMNS.keys() - {"dose"}), None),
    ],
)
def test_missing_tables_leave_their_sections_out_and_the_page_says_so(small, gone, left):
    smaller = replace(small, tables={name: frame for name, frame in small.tables.items() if name not in gone})
    made = sections(smaller)
    out = [section.name for section in made if isinstance(section, LeftOut)]
    assert set(out) == left if left else len(out) == 16
    text = Page(render(smaller, findings(smaller), made)).text
    assert text.count("Left out: this run folder has no") == len(out)
    assert ("Answers" in text) == ("answers" not in gone)


@pytest.mark.parametrize("table", [None, *sorted(COLUMNS)])
def test_findings_come_without_any_one_table(small, table):
    smaller = replace(small, tables={name: frame for name, frame in small.tables.items() if name != table})
    assert len(findings(smaller)) == 10 if table is None else 5 <= len(findings(smaller)) <= 10


@pytest.mark.parametrize("runs", [1, 4])
def test_a_smaller_study_has_a_page(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(fake_run, "RUNS", fake_run.RUNS[:runs])
    monkeypatch.setattr(fake_run, "DOMAINS", ("money",))
    folder = fake_run.write(tmp_path, effect=True, n_layers=3, per_category=2)
    made = sections(read(folder))
    assert len(made) == 17 and len(findings(read(folder))) >= 5 and report.summary(folder)


def test_a_damaged_table_is_named(tmp_path):
    file = fake_run.write(tmp_path, effect=True, n_layers=2, per_category=2) / "tables" / "overlap.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(store.StoreError, match="overlap.parquet is damaged"):
        report.build(tmp_path)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "figures").exists()


def test_a_folder_of_another_version_is_refused(tmp_path):
    fake_run.write(tmp_path, effect=True, n_layers=2, per_category=2)
    store.write_json(tmp_path / "study.json", {"format": 99})
    with pytest.raises(store.StoreError, match="study.json is in format 99; this emlens reads format 1"):
        report.build(tmp_path)


def test_a_table_without_its_columns_is_named(tmp_path):
    file = fake_run.write(tmp_path, effect=True, n_layers=2, per_category=2) / "tables" / "dose.parquet"
    store.write_table(store.read_table(file).drop(columns="strength"), file)
    with pytest.raises(ValueError, match=r"dose.parquet lacks the columns \['strength'\]"):
        report.build(tmp_path)


def test_no_run_folder_at_all(tmp_path):
    with pytest.raises(store.StoreError, match="study.json is missing"):
        report.build(tmp_path / "nowhere")
