"""The page: one HTML file that opens offline, shows what was found first, and lets a referee check it."""

import base64
import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from emlens.plots import CONFIG, FONT, embedded, legend, plotly_script
from emlens.report.figures import LeftOut, Section
from emlens.report.findings import in_short
from emlens.report.folder import Folder
from emlens.report.look import CSS, DRAW
from emlens.report.words import Finding, count, listed, plural

_ROWS_SHOWN = 200
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Ccircle cx='8' cy='8' r='6' fill='none' stroke='%232166ac' stroke-width='3'/%3E%3C/svg%3E"
)
TERMS = {
    "Narrow tuning": ("LoRA training on one kind of advice (bad, or sound: the twin) in one domain; then the model is asked about other things."),
    "Margin": (
        "How much a model prefers the aligned over the misaligned contrast answers of a question, in nats per "
        "token of the answers. Nothing is sampled and nothing is judged. Below 0 the misaligned answers are the "
        "likelier ones."
    ),
    "Shift": "Activations after tuning minus those before it, at the same prompt, layer and position.",
    "Noise floor": "How alike two seeds of one tuning shift a question (mean cosine). What differs by less than that is not told apart.",
    "Overlap": ("Mean squared cosine of the principal angles between two subspaces: 1 if they are the same; k/d by chance."),
    "Similarity": "Mean cosine of each question's shift with the mean shift of the training prompts.",
    "Control, ceiling": ("The same measure between two halves of the questions; between two halves of the training prompts."),
    "Null": "What the estimate would be if there were nothing to find, drawn many times; grey in the figures.",
    "p, q": (
        "p: the share of draws of the null at least as extreme as the estimate. q: p corrected within the family, and by the method, named under "
        "each figure; not over the whole page. ≤: p is as small as its draws allow, so the number is a bound."
    ),
    "Questions and runs": (
        "Tests and intervals are over questions, given the runs: they say what other questions would give these runs, not what other runs would "
        "give. For that stand the controls: two runs on the same rows that differ in their seed or schedule alone."
    ),
    "Lenient null": "One that almost any shared structure beats, such as a random direction among several hundred: passing it says little.",
    "Positive control": "The same test asked for something that must be there. Where it fails, the design is blind, and its silence says nothing.",
    "d_z, rank-biserial": (
        "Effect sizes of a paired difference: its mean over its standard deviation; by ranks, the share of pairs "
        "that went up minus the share that went down."
    ),
    "Found, not found, mixed, description, no answer": (
        "Found: q < .05 in the expected direction in every domain (or main run) asked; along layers, in more than half "
        "of them, or for prediction and the direction at the best one. Not found: nowhere. Mixed: anything between, or "
        "found but no more than a control or a baseline gives. Description: numbers to look at, for which no test was made. No answer: the "
        "study could not have seen it (nothing held out, or its positive control failed). "
        "Training is “found” when the 95 % interval of the paired drop lies above 0 in every run. Bad against sound is “found” when the bad run "
        "also fell below the untuned model and the interval lies wholly beyond those of two runs on the same rows. A direction is “found” when in "
        "more than half of the layers the interval of its AUC, or that of the other domain's direction, lies above what two runs on the same "
        "rows give, and steering passes. Prediction is “found” when R² is above 0 and passes beyond the category, and ΔR² beyond text and the "
        "margin before together."
    ),
}
LIMITS = (
    "One model, and one run of most kinds: what is said holds for these runs. So few runs allow no correlation "
    "over runs, and one other seed is not a study of seeds.",
    "The margin compares written answers. It is not free text, and a lower margin is not yet a misaligned answer.",
    "Questions come in categories; where a test treats whole categories, few categories limit how small p can get.",
    "The strongest layer is chosen among many after looking: its estimate is too high on average, its q is corrected.",
    "“Not found” means that this study could not tell it from nothing; the interval says what it cannot exclude. Not so for R²: its interval is "
    "of the errors of these fits, and says nothing of what other fits could reach.",
    "Intervals over 8 categories cover a little less than they say (93 to 94 for 95 %, in simulation).",
)


def render(folder: Folder, found: Sequence[Finding], sections: Sequence[Section | LeftOut]) -> str:
    """The whole page as text."""
    shown = [section for section in sections if isinstance(section, Section)]
    title = str(folder.study.get("title") or folder.study.get("name") or folder.path.name)
    answers = _answers(folder)
    links = [("findings", "Findings"), *((s.name, s.title) for s in sections)]
    links += [("answers", "Answers")] * bool(answers) + [("card", "Card"), ("terms", "Terms"), ("limits", "Limits")]
    contents = " ".join(f'<a href="#{_text(name)}">{_text(words)}</a>' for name, words in links)
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">{_text(_question(folder))}</p>',
        *([f'<p class="short"><b>In short:</b> {_text(short)}</p>'] if (short := in_short(folder, found)) else []),
        _findings(found),
        f'<nav aria-label="Contents">{contents}</nav>',
        *(_section(section, [each for each in found if each.section == section.name]) for section in sections),
        answers,
        _card(folder),
        _terms(),
        '<section id="limits"><h2>Limits</h2><ul>' + "".join(f"<li>{_text(each)}</li>" for each in LIMITS) + "</ul></section>",
    ]
    data = "\n".join(data_block(f"figure-{s.name}", embedded(s.figure).to_json()) for s in shown)
    script = DRAW.replace("CONFIG", json.dumps(CONFIG))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{_text(title)}</title>\n<link rel="icon" href="{_ICON}">\n<style>{CSS.replace("FONT", FONT)}</style>\n'
        f"</head><body>\n<main>\n{chr(10).join(parts)}\n</main>\n"
        f"<script>{plotly_script()}</script>\n{data}\n<script>{script}</script>\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def data_block(name: str, content: str) -> str:
    """JSON inside the page; no text in it can end the script it stands in."""
    safe = content.replace("<", "\\u003c")
    return f'<script type="application/json" id="{_text(name)}">{safe}</script>'


def _question(folder: Folder) -> str:
    model = folder.study.get("model", {}).get("name", "a model")
    text = (
        "Does narrow tuning on subtly bad advice change how a model leans on questions that have nothing to do with "
        "it, and can that be seen, or foreseen, in its activations? "
    )
    if "runs" in folder.tables:
        runs = folder.tables["runs"]
        domains = list(dict.fromkeys(runs["domain"].astype(str)))
        text += f"Here {model} was tuned {count(len(runs))} times ({plural('domain', len(domains))}: {listed(domains)}), "
        text += "on bad advice and on sound advice to the same people"
    if "margins" in folder.tables:
        margins = folder.tables["margins"]
        text += f", and asked {margins['id'].nunique()} unrelated questions in {margins['category'].nunique()} categories"
    return text.rstrip() + ("." if "runs" in folder.tables else "")


def _findings(found: Sequence[Finding]) -> str:
    tally: Counter[str] = Counter(finding.verdict for finding in found)
    names = {"description": "described without a test", "no answer": "without an answer"}
    names = {verdict: names.get(verdict, verdict) for verdict in ("found", "mixed", "not found", *names)}
    words = listed([f"{tally[verdict]} {name}" for verdict, name in names.items() if tally[verdict]])
    items = "".join(
        f"<li>{_chip(each)}<div>"
        f'<a class="topic" href="#{_text(each.section)}">{_text(each.topic)}</a>'
        f'<p class="claim">{_text(each.claim)}</p>'
        f'<details class="evidence"><summary>Numbers</summary><ul>{"".join(f"<li>{_kept_together(line)}</li>" for line in each.evidence)}</ul>'
        "</details></div></li>"
        for each in found
    )
    head = f"{len(found)} {plural('question', len(found))} asked: {words}." if found else "No table to find anything in."
    key = "In brackets: 95 % intervals over questions, given these runs. q: p corrected within the family named under each figure."
    return f'<section id="findings"><h2>Findings</h2><p class="count">{_text(head)} {key}</p><ol class="findings">{items}</ol></section>'


def _chip(finding: Finding) -> str:
    return f'<span class="chip {finding.verdict.replace(" ", "-")}">{finding.verdict}</span>'


def _kept_together(line: str) -> str:
    """Escaped, with `q < .001` and `n = 96` on one line."""
    return re.sub(r"\b(q|n|d_z|R²) (&lt;|=|≤) ", "\\1\u00a0\\2\u00a0", _text(line))


def _section(section: Section | LeftOut, found: Sequence[Finding]) -> str:
    head = f'<section id="{_text(section.name)}"><h2>{_text(section.title)}</h2>'
    if isinstance(section, LeftOut):
        tables = listed([f"{name}" for name in section.tables])
        words = f"Left out: this run folder has no {plural('table', len(section.tables))} “{tables}”."
        return f'{head}<p class="left-out">{_text(words)}</p></section>'
    height = int(embedded(section.figure).layout.height)
    captions = "".join(f'<p class="caption">{_text(line)}</p>' for line in section.caption)
    box = (
        f'<div class="figure" style="height:{height}px" role="img" data-figure="figure-{_text(section.name)}" '
        f'aria-label="{_text(section.title)}: {_text(section.asked)}"></div>'
    )
    answers = "".join(f'<p class="told">{_chip(each)} {_text(each.claim)}</p>' for each in found)
    return f"{head}<p>{_text(section.asked)}</p>{answers}{box}{legend(section.figure)}{captions}{_rows(section)}</section>"


def _rows(section: Section) -> str:
    csv = base64.b64encode(section.rows.to_csv(index=False).encode()).decode()
    name, n = _text(section.name), len(section.rows)
    first = "" if n <= _ROWS_SHOWN else f", the first {_ROWS_SHOWN}"
    return (
        f'<div class="tools"><a class="button" download="{name}.csv" href="data:text/csv;charset=utf-8;base64,{csv}">'
        f'Download the {n} rows (CSV)</a><span class="note">also figures/{name}.html, .csv, .json</span></div>'
        f"<details><summary>See the rows{first}</summary>{_table(section.rows.head(_ROWS_SHOWN))}</details>"
    )


def _table(frame: pd.DataFrame) -> str:
    kind = {column: "n" if pd.api.types.is_numeric_dtype(frame[column]) else "t" for column in frame}
    head = "".join(f'<th class="{kind[column]}">{_text(column)}</th>' for column in frame)
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind[c]}">{_cell(v)}</td>' for c, v in zip(frame, row, strict=True)) + "</tr>"
        for row in frame.itertuples(index=False, name=None)
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _answers(folder: Folder) -> str:
    """Answers before and after side by side, as they came: the main runs in sight, the others to unfold."""
    if "answers" not in folder.tables:
        return ""
    table = folder.tables["answers"]
    contents, main = {}, set(table["variant"])
    if "runs" in folder.tables:
        contents = folder.tables["runs"].set_index("run")["content"].to_dict()
        main = {"before", *folder.main_runs()}
    blocks = []
    for place, (_, rows) in enumerate(table.groupby("id", sort=False)):
        shown, others = "", ""
        for row in rows.to_dict("records"):
            name, kind = _text(row["variant"]), _text(contents.get(row["variant"], ""))
            card = f'<div class="answer {kind}"><h4>{name}</h4><div>{_text(row["answer"])}</div></div>'
            shown, others = (shown + card, others) if row["variant"] in main else (shown, others + card)
        if others:
            others = f'<details><summary>The other runs</summary><div class="answers">{others}</div></details>'
        blocks.append(
            f'<details class="asked"{" open" if place < 2 else ""}><summary>{_text(rows["question"].iloc[0])}</summary>'
            f'<div class="answers">{shown}</div>{others}</details>'
        )
    n = table["id"].nunique()
    return (
        f'<section id="answers"><h2>Answers</h2><p>{n} {plural("answer", n)} of each model as they came, greedy and '
        f"cut at a length; to look at, not to count.</p>{''.join(blocks)}</section>"
    )


def _card(folder: Folder) -> str:
    study = folder.study
    facts: dict[str, object] = {
        "Command": study.get("command", "–"),
        "Model": _pairs(study.get("model", {})),
        "Versions": _pairs(study.get("versions", {})),
        "Machine": _pairs(study.get("machine", {})),
        **_cost(folder),
        **{f"Data: {name}": _pairs(each) for name, each in study.get("data", {}).items()},
    }
    if "runs" in folder.tables:
        seeds = sorted(set(folder.tables["runs"]["seed"]))
        facts["Seeds"] = f"tuning: {listed([str(seed) for seed in seeds])}; each analysis names its own under its figure"
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    notes = "".join(f"<li>{_text(note)}</li>" for note in study.get("notes", []))
    config = _text(json.dumps(study.get("config", {}), indent=1, ensure_ascii=False))
    unfold = ""
    for name, words in (("runs", "Runs: seeds, steps, losses, adapter digests"), ("pieces", "Pieces and their times")):
        if name in folder.tables:
            table = folder.tables[name]
            unfold += f"<details><summary>{words} ({len(table)})</summary>{_table(table)}</details>"
    return (
        '<section id="card"><h2>Card</h2>'
        + (f"<h3>What was made smaller, and other notes</h3><ul>{notes}</ul>" if notes else "")
        + f'<table class="facts"><tbody>{rows}</tbody></table>{_certificate(folder)}{unfold}'
        + f"<details><summary>The study as declared</summary><pre>{config}</pre></details></section>"
    )


def _certificate(folder: Folder) -> str:
    """The laws that were measured on this model, the broken ones first and with what to do."""
    if "certificate" not in folder.tables:
        return ""
    table = folder.tables["certificate"]
    holds = table["holds"].astype("boolean")
    words = {True: "holds", False: "broken"}
    broken = int((~holds).sum())
    tolerance = [f"{relation} {value:.2g}" for relation, value in zip(table["relation"], table["tolerance"], strict=True)]
    shown = pd.DataFrame(
        {
            "law": table["law"],
            "holds": ["does not apply" if pd.isna(each) else words[bool(each)] for each in holds],
            "measured": table["measured"],
            "tolerance": tolerance,
            "of what": table["unit"],
            "what to do": table["remedy"],
        }
    ).loc[holds.fillna(True).sort_values(kind="stable").index]
    variant = table["adapter"].dropna()
    on = f", {variant.iloc[0]} on," if len(variant) else ""
    silent = int(holds.isna().sum())
    said = f"Certificate: of {len(table)} laws asked of this model{on} {int(holds.sum())} hold, {broken} {'is' if broken == 1 else 'are'} broken"
    said += f", {silent} {'does' if silent == 1 else 'do'} not apply" if silent else ""
    return f'<details id="certificate"{" open" if broken else ""}><summary>{_text(said)}</summary>{_table(shown)}</details>'


def _cost(folder: Folder) -> dict[str, str]:
    """What making the study cost, and beside it the last run, which may have done nothing but read back."""
    last = folder.history[-1]
    runs = pd.DataFrame(folder.history).reindex(columns=["seconds", "peak_memory_gib", "pieces", "cached_pieces"])
    making = runs[runs["pieces"] > runs["cached_pieces"]]
    time, peak = "not recorded: every run on record read all its pieces back", ""
    if len(making):
        time = f"{making['seconds'].sum():.0f} s in {len(making)} {plural('run', len(making))} that made pieces (killed runs are not counted)"
        peak = f"{making['peak_memory_gib'].max():.2f} GiB, the most of any run that made pieces; "
    if "pieces" in folder.tables:
        own = folder.tables["pieces"]["seconds"]
        unknown = f" ({own.isna().sum()} of them did not note theirs)" if own.isna().any() else ""
        time += f"; the {len(own)} pieces' own seconds, whichever run made them, come to {own.sum():.0f} s{unknown}"
    return {
        "Time to make it": time,
        "Last run": f"{float(last.get('seconds') or np.nan):.0f} s, from {last.get('started', '–')} to {last.get('finished', '–')}; "
        f"{last.get('cached_pieces', '–')} of {last.get('pieces', '–')} pieces were read back",
        "Peak memory": f"{peak}{float(last.get('peak_memory_gib') or np.nan):.2f} GiB in the last run",
    }


def _pairs(facts: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {value}" for key, value in facts.items()) or "–"


def _terms() -> str:
    return (
        '<section id="terms"><h2>Terms</h2><dl>'
        + "".join(f"<dt>{_text(term)}</dt><dd>{_text(words)}</dd>" for term, words in TERMS.items())
        + "</dl></section>"
    )
