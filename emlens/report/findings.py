"""What was found and what was not, in words made from the numbers of the tables. A null result reads as a null result.

Each function of `behaviour`, `inside` and `foretold` answers one question with a `Finding`. The rules are plain: q < .05
in the expected direction counts; everywhere (domains, runs, layers: each says) makes "found", nowhere "not found",
anything between "mixed"; what no test was made for is a "description", and "no answer" is what the study could not have
seen (its positive control failed, say). What two runs on the same rows give as well is not "found".
"""

from collections.abc import Callable, Sequence

from emlens.report import behaviour, foretold, inside
from emlens.report.folder import Folder
from emlens.report.words import NATS, Finding, listed, number

QUESTIONS: tuple[tuple[Callable[[Folder], Finding | None], tuple[str, ...]], ...] = (
    (behaviour.tuned, ("runs",)),
    (behaviour.bad_against_sound, ("margin_change",)),
    (behaviour.schedules_and_seeds, ("margin_change",)),
    (inside.agreement, ("shift_agreement",)),
    (inside.overlap, ("overlap",)),
    (inside.similarity, ("similarity", "runs")),
    (inside.overlap_and_similarity, ("overlap_similarity", "runs")),
    (foretold.prediction, ("prediction", "runs")),
    (foretold.direction, ("direction",)),
    (inside.traits, ("traits", "runs")),
)
"""Each question with the tables without which it is not asked."""


def findings(folder: Folder) -> list[Finding]:
    """The findings whose tables are there, in the order of the page."""
    made = [make(folder) for make, tables in QUESTIONS if not folder.missing(*tables)]
    return [finding for finding in made if finding is not None]


def in_short(folder: Folder, found: Sequence[Finding]) -> str:
    """One sentence that answers the study's question, from the verdict on bad advice against its sound twin; empty where that was not asked."""
    verdict = next((each.verdict for each in found if each.topic == behaviour.TWIN), None)
    if verdict is None:
        return ""
    table = folder.tables["margin_change"]
    rows = behaviour.main_rows(table, "bad minus sound")
    apart = listed([f"{number(row['estimate'], 3)} ({row['domain']})" for _, row in rows.iterrows()])
    far = f"(bad minus sound {apart} {NATS}; no answer was judged)"
    fell = [behaviour.moved(row) == "lower" for _, row in behaviour.main_rows(table, "bad minus before").iterrows()]
    if verdict == "found":
        return f"yes, as far as the margin tells: after bad advice the model leans less to the aligned answer on unrelated questions {far}."
    if verdict != "mixed":
        return f"not that this study could see: no evidence that the margin on unrelated questions differs after bad and sound advice {far}."
    lower = [str(row["domain"]) for _, row in rows.iterrows() if behaviour.moved(row) == "lower"]
    if lower and fell and not any(fell):
        where = "" if len(lower) == len(rows) else f" in {listed(lower)} alone"
        return (
            f"not shown: the margin ended lower after bad than after sound advice{where} {far}, but no evidence that bad advice "
            "made the model lean less to the aligned answer than it did untuned."
        )
    return f"in part: the margin on unrelated questions differs after bad and sound advice {far}, but not in every way that was asked."
