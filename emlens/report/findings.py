"""What was found and what was not, in words made from the numbers of the tables. A null result reads as a null result.

Each function of `behaviour`, `inside` and `foretold` answers one question with a `Finding`. The rules are plain: q < .05
in the expected direction counts; everywhere (domains, runs, layers: each says) makes "found", nowhere "not found",
anything between "mixed"; what no test was made for, or one whose positive control failed, is a "description". What two
runs on the same rows give as well is not "found".
"""

from collections.abc import Callable

from emlens.report import behaviour, foretold, inside
from emlens.report.folder import Folder
from emlens.report.words import Finding

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
)
"""Each question with the tables without which it is not asked."""


def findings(folder: Folder) -> list[Finding]:
    """The findings whose tables are there, in the order of the page."""
    made = [make(folder) for make, tables in QUESTIONS if not folder.missing(*tables)]
    return [finding for finding in made if finding is not None]
