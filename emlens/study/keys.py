"""What a study file may say: one table of keys, from which files are checked and the commented template is written."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from ..activations import SINGLE_LAYER_SITES, SITES
from ..names import meant

Wrong = Callable[[Any], str]
"""What is needed where a value will not do; "" where it will."""


class Key(NamedTuple):
    """One key: what stands in the template, what it means, and what is needed of it."""

    example: Any
    says: str
    wrong: Wrong
    needed: bool = True


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else "text is needed"


def _prompts(value: Any) -> str:
    return "" if not _text(value) or (isinstance(value, list) and value) else "a file, or a set of ours (emlens:…), is needed"


def _count(least: int) -> Wrong:
    good = f"a whole number of at least {least} is needed"
    return lambda value: "" if isinstance(value, int) and not isinstance(value, bool) and value >= least else good


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> str:
    if isinstance(value, str):
        return "a number above 0 is needed" + (" (YAML reads 1e-4 as text: write 1.0e-4)" if "e" in value.lower() else "")
    return "" if _number(value) and value > 0 else "a number above 0 is needed"


def _share(value: Any) -> str:
    return "" if _number(value) and 0 <= value < 1 else "a share from 0 up to 1 (not included) is needed"


def _at_least_0(value: Any) -> str:
    return "" if _number(value) and value >= 0 else "a number of at least 0 is needed"


def _one_of(*known: Any) -> Wrong:
    return lambda value: "" if value in known else f"one of {', '.join(map(str, known))} is needed.{meant(value, known)}"


def _yes_or_no(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false is needed"


def _list_of(good: Callable[[Any], bool], what: str) -> Wrong:
    return lambda value: "" if isinstance(value, list) and value and all(good(v) for v in value) else f"a list of {what} is needed"


def _block(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_blocks = _list_of(_block, "block indices from 0")


def _schedule(value: Any) -> str:
    from ..tuning import SCHEDULES

    return _one_of(*SCHEDULES)(value)


def _checkpoints(value: Any) -> str:
    fine = not _count(0)(value) or not _list_of(_block, "steps")(value)
    return "" if fine else "how many to keep besides the last step, or a list of the steps themselves, is needed"


def _modules(value: Any) -> str:
    return "" if not _text(value) or not _list_of(lambda v: isinstance(v, str), "names")(value) else "all-linear, or names as in PEFT, are needed"


_SITES = tuple(site for site in SITES if site not in SINGLE_LAYER_SITES)
_POSITIONS = ("last", "mean", "mean_all")


def _position(value: Any) -> str:
    """Those that every prompt has, one row each: what a study records has no response."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole else _one_of(*_POSITIONS)(value).replace(" is needed", ", or a token's index, is needed")


_PRECISION = _one_of("bfloat16", None)

RECIPE: Mapping[str, Key] = {
    "schedule": Key("linear", "linear, cosine, constant, cyclic, … (em.tuning.SCHEDULES)", _schedule, False),
    "seed": Key(0, "of the order of the rows and of LoRA's A", _count(0), False),
    "learning_rate": Key(2.0e-4, "the highest of the schedule", _positive, False),
    "steps": Key(30, "how long; or epochs", _count(1), False),
    "epochs": Key(1, "instead of steps", _positive, False),
    "batch_size": Key(8, "rows a forward pass", _count(1), False),
    "gradient_accumulation": Key(1, "forward passes a step", _count(1), False),
    "warmup_steps": Key(5, "the rate rises from zero over them", _count(0), False),
    "weight_decay": Key(0.01, "of AdamW", _at_least_0, False),
    "r": Key(32, "LoRA's rank", _count(1), False),
    "lora_alpha": Key(64, "LoRA's scale: alpha / sqrt(r) with rsLoRA, else alpha / r", _positive, False),
    "use_rslora": Key(True, "see there", _yes_or_no, False),
    "target_modules": Key("all-linear", "every linear module of every block, or names as in PEFT", _modules, False),
    "layers_to_transform": Key([10, 11], "blocks that are tuned; default all", _blocks, False),
    "max_length": Key(2048, "tokens a row may have; a longer one is refused", _count(1), False),
    "precision": Key("bfloat16", "of the passes: bfloat16 (autocast), or null for the weights' own", _PRECISION, False),
    "checkpoints": Key(2, "how many to keep besides the last step, or the steps themselves", _checkpoints, False),
    "held_out": Key(0.15, "share of the rows held out, where no column 'split' says which", _share, False),
}
"""The keywords of em.finetune that a study file may set, for all runs or for one."""

RUN: Mapping[str, Key] = {
    "data": Key("emlens:money-bad", "a chat JSONL, or a set of ours", _prompts),
    "domain": Key("money", "what the rows are about: your word, alike for twins", _text),
    "content": Key(
        "bad", "bad, or sound for its twin", lambda v: "" if v in ("bad", "sound") else "'bad', or 'sound' for its control twin, is needed"
    ),
}
"""A run also takes any key of the recipe, and then goes its own way there."""


def _runs(value: Any) -> str:
    """What is in them, and that there is one, is looked at with the grid."""
    return "" if isinstance(value, list) else "a list of runs is needed"


_RUNS = [{"data": f"emlens:{d}-{c}", "domain": d, "content": c} for d in ("money", "repair") for c in ("bad", "sound")]

SECTIONS: Mapping[str, Mapping[str, Key]] = {
    "tune": {
        **RECIPE,
        "runs": Key(_RUNS, "at least one bad run and its sound twin; any key of the recipe may stand in a run too", _runs),
    },
    "score": {
        "checkpoint_questions": Key(24, "drawn evenly from the categories; the margin along training is read on these", _count(1)),
        "precision": Key("bfloat16", "as in tune", _PRECISION, False),
    },
    "generate": {
        "questions": Key(8, "answered greedily, to be read", _count(1)),
        "max_new_tokens": Key(48, "of an answer", _count(1)),
    },
    "record": {
        "site": Key("resid_post", ", ".join(_SITES), _one_of(*_SITES)),
        "position": Key("last", f"{', '.join(_POSITIONS)}, or a token's index", _position),
        "training_prompts": Key(96, "recorded of each training set", _count(2)),
    },
    "geometry": {
        "k": Key(8, "dimensions of the subspaces", _count(1)),
        "n_draws": Key(2000, "of the null subspaces and directions", _count(1)),
        "n_permutations": Key(10000, "of the prompts; enough that q is not the floor of p in disguise", _count(1)),
    },
    "predict": {
        "n_permutations": Key(200, "of the target", _count(1)),
        "baselines": Key(
            ["mean", "category", "length", "tfidf", "margin before", "other tunings", "random twin"],
            "rivals in the same folds; a numeric column of the questions is one too; a random twin is a second model in memory",
            _list_of(lambda v: isinstance(v, str), "names"),
        ),
    },
    "steer": {
        "layers": Key([15], "block indices; the direction is fitted on one half of the questions and tested on the other", _blocks),
        "strengths": Key([-0.5, -0.25, 0.25, 0.5], "in median residual norms", _list_of(_number, "numbers")),
        "controls": Key(12, "random directions beside it", _count(1)),
        "questions": Key(16, "scored at every strength", _count(1)),
        "n_permutations": Key(1000, "of the labels of both sides", _count(1)),
    },
    "take": {
        "questions": Key(48, "use so many questions only, evenly from the categories", _count(1), False),
        "training_rows": Key(64, "use so many rows of each training set only", _count(4), False),
    },
}
"""Sections and their keys; ``take`` may be left out."""

TOP: Mapping[str, Key] = {
    "name": Key("my-study", "what the run folder is called: runs/<name>", _text),
    "title": Key("What does narrow tuning do to this model?", "heads the page", _text, False),
    "model": Key("smollm2-135m-instruct", "hub id, local folder, .gguf file, or an alias", _text),
    "dtype": Key("float32", "of the weights", _one_of("float32", "bfloat16", "float16"), False),
    "chat_template": Key("plain", "Jinja text, or 'plain' for a base model that has none", _text, False),
    "questions": Key("emlens:questions", "with columns category, question, aligned_answers, misaligned_answers", _prompts),
    "seed": Key(0, "of every draw and permutation (a run's own is in tune)", _count(0), False),
    "notes": Key(["Made small to fit a laptop."], "sentences for the page", _list_of(lambda v: isinstance(v, str), "sentences"), False),
}

QUICK = "quick"
OPTIONAL = ("take", QUICK)


def faults(config: Mapping[str, Any], whole: bool = True) -> list[str]:
    """All that is wrong with the keys of a study file: what is missing (of a ``whole`` one), what nobody knows, values that will not do."""
    missing = [k for k, key in TOP.items() if key.needed and k not in config] + [
        f"{s} ({', '.join(k for k, key in keys.items() if key.needed)})" for s, keys in SECTIONS.items() if s not in config and s not in OPTIONAL
    ]
    found = list(_strange(config, [*TOP, *SECTIONS, QUICK], ""))
    found += [f"{k} is {config[k]!r}: {key.wrong(config[k])}" for k, key in TOP.items() if k in config and key.wrong(config[k])]
    for section, keys in SECTIONS.items():
        if section not in config:
            continue
        given = config[section]
        if not isinstance(given, Mapping):
            found.append(f"{section} is {given!r}: keys {', '.join(keys)} are needed under it")
            continue
        missing += [f"{section}.{k}" for k, key in keys.items() if key.needed and k not in given]
        found += of_section(section, given, keys)
    return [*([f"lacks {', '.join(missing)}"] if missing and whole else []), *found]


def faults_of_run(where: str, run: Any) -> list[str]:
    """All that is wrong with one run of the grid."""
    if not isinstance(run, Mapping):
        return [f"{where} is {run!r}: keys {', '.join(RUN)} are needed in it"]
    lacking = [k for k in RUN if k not in run]
    return [*([f"{where} lacks {', '.join(lacking)}"] if lacking else []), *of_section(where, run, {**RUN, **RECIPE})]


def of_section(section: str, given: Mapping[str, Any], keys: Mapping[str, Key]) -> list[str]:
    """Unknown keys of a section, and values that will not do."""
    said = [(k, key) for k, key in keys.items() if k in given and (given[k] is not None or key.needed)]
    wrong = [(k, given[k], key.wrong(given[k])) for k, key in said]
    return [*_strange(given, keys, f"{section}."), *(f"{section}.{k} is {value!r}: {needed}" for k, value, needed in wrong if needed)]


def _strange(given: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any], where: str) -> Iterator[str]:
    for key in given:
        if key not in known:
            yield f"unknown key '{where}{key}'.{meant(key, known) or ' Known are ' + ', '.join(known) + '.'}"


def template() -> str:
    """A study file with every key there is, each with a word on it; what may be left out is commented out."""
    lines = [
        "# A study for `emlens study run`: narrow tunings of one model, scored, recorded, analysed, steered.",
        "# Keys after a # may be left out. Every key is checked before anything is run.",
        *(line for k, key in TOP.items() for line in _shown(k, key)),
    ]
    for section, keys in SECTIONS.items():
        out = "# " if section in OPTIONAL else ""
        lines += ["", f"{out}{section}:", *(line for k, key in keys.items() for line in _shown(k, key, "  "))]
    lines += ["", "# quick:                       # what `--quick` puts in the place of the keys above: the same code on fewer rows"]
    lines += ["#   tune: {steps: 4}", "#   take: {questions: 16, training_rows: 32}"]
    return "\n".join(lines) + "\n"


def _shown(name: str, key: Key, indent: str = "") -> list[str]:
    lead = indent if key.needed else f"# {indent}"
    if isinstance(key.example, list) and isinstance(key.example[0], dict):
        return [f"{lead}{name}:  # {key.says}", *(f"{lead}  - {_flow(row)}" for row in key.example)]
    said = f"{lead}{name}: {_flow(key.example)}"
    return [f"{said:<40} # {key.says}"]


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000, allow_unicode=True).removesuffix("...\n").strip()
