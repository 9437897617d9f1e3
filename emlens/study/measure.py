"""The expensive half of a study: tune, score, record, generate, steer. Every step is a piece that is made once."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from .. import store
from ..activations import Activations
from ..directions import Direction, mean_difference, random_directions
from ..dynamics import HELD_OUT, checkpoint_margins
from ..laws import ENGINE_LAWS, LAWS, doctor
from ..loading import identify
from ..models import HookedModel, load_model, random_twin
from ..prompts import fingerprint
from ..steering import steered_margins
from ..tuning import LAYOUT, Run, finetune, planned
from .grid import PAIR_KINDS, RANDOM_TWIN, Cell, StudyError, cells, evenly, halves, questions_of, same_content, training_of, twins
from .moves import Arms, move_weights
from .pieces import Pieces

BEFORE = "before"
DRAWN = "drawn from the covariance of the untuned model's activations on the questions"


class Bench:
    """A study's model, prompts and pieces. The model is opened when the first missing piece needs it, and not before."""

    def __init__(self, config: Mapping[str, Any], root: Path, versions: Mapping[str, str]) -> None:
        self.config, self.grid = config, cells(config)
        self.questions = questions_of(config)
        self.questions_digest = fingerprint(self.questions)
        self.training = {cell.label: training_of(config, cell) for cell in self.grid}
        self.identity = {
            "model": identify(config["model"]),
            "dtype": config.get("dtype", "float32"),
            "chat_template": config.get("chat_template"),
            "versions": {k: versions[k] for k in ("emlens", "torch", "transformers", "peft")},
        }
        self.pieces = Pieces(root, self._weights())
        self.runs: dict[str, Run] = {}
        self._adapter_keys: dict[str, str] = {}
        self.opened = False

    @cached_property
    def model(self) -> HookedModel:
        self.opened = True
        self.pieces.say(f"opening {self.config['model']} …")
        model = load_model(self.config["model"], dtype=self.config.get("dtype", "float32"), chat_template=self.config.get("chat_template"))
        self._refuse_absent(model)
        return model

    def _refuse_absent(self, model: HookedModel) -> None:
        """StudyError for places that this model has not, before anything is tuned."""
        site, layers = self.config["record"]["site"], self.config["steer"]["layers"]
        if site not in model.engine.sites:
            raise StudyError(f"record.site is {site!r}: {model.name} has {', '.join(model.engine.sites)}")
        if max(layers) >= model.n_layers:
            raise StudyError(f"steer.layers are {layers}: {model.name} has blocks 0 … {model.n_layers - 1}")

    # ---- what will be done, with rough weights in seconds

    def _weights(self) -> dict[str, float]:
        """``{label: rough seconds}`` of every piece of the study; the rates are those of a 135M model on two cores, but only their ratios matter."""
        scored, read, n = 0.15, 0.065, len(self.questions)
        subset = min(n, self.config["score"]["checkpoint_questions"])
        trained = read * self.config["record"]["training_prompts"]
        written = 0.01 * self.config["generate"]["questions"] * self.config["generate"]["max_new_tokens"]
        weights = {"certificate": 25.0, f"margins {BEFORE}": scored * n, f"answers {BEFORE}": written, f"questions {BEFORE}": read * n}
        if RANDOM_TWIN in self.config["predict"]["baselines"]:
            weights[f"questions {RANDOM_TWIN}"] = 3.0 + read * n
        for domain in {c.domain for c in self.grid}:
            weights[f"training prompts {domain} {BEFORE}"] = trained
        for cell in self.grid:
            plan = planned(self.training[cell.label], **cell.recipe)
            kept = len(plan["checkpoints"])
            weights[f"tune {cell.label}"] = 0.2 * plan["rows_seen"] + 0.1 * plan["n_heldout"] * (kept + 2)
            weights[f"margins {cell.label}"] = scored * n
            if kept:
                weights[f"checkpoints {cell.label}"] = scored * subset * kept
            weights[f"questions {cell.label}"] = read * n
            weights[f"training prompts {cell.label}"] = trained
        for bad, _ in self.steered_pairs:
            weights[f"answers {bad.label}"] = written
        steer = self.config["steer"]
        for domain in [bad.domain for bad, _ in self.steered_pairs] + ["random"]:
            arms = steer["controls"] + 1 if domain == "random" else 1
            for layer in steer["layers"]:
                for strength in steer["strengths"]:
                    weights[f"steer {domain} layer {layer} strength {strength}"] = 0.12 * (arms + 1) * steer["questions"]
        pairs = len(self.steered_pairs)
        return {**weights, **move_weights(self.config, pairs), **analysis_weights(self.config, len(self.grid), pairs)}

    @cached_property
    def steered_pairs(self) -> list[tuple[Cell, Cell]]:
        """The first (bad, sound) pair of each domain: what directions and answers are taken from."""
        first: dict[str, tuple[Cell, Cell]] = {}
        for bad, sound in twins(self.grid):
            first.setdefault(bad.domain, (bad, sound))
        return list(first.values())

    # ---- tuning

    def tune(self) -> None:
        for cell in self.grid:
            data = self.training[cell.label]
            determined = {**self.identity, "data": fingerprint(data), "recipe": dict(cell.recipe), "layout": LAYOUT}

            def write(folder: Path, cell: Cell = cell, data: pd.DataFrame = data) -> None:
                finetune(self.model, data, folder, **cell.recipe)

            folder = self.pieces.own_folder("tune", f"tune {cell.label}", determined, write)
            self.runs[cell.label] = Run.load(folder)
            self.pieces.made[-1]["seconds"] = round(self.runs[cell.label].seconds, 2)
            self._adapter_keys[cell.label] = folder.name

    def _variant(self, label: str) -> dict[str, Any]:
        return {**self.identity, "adapter": None if label == BEFORE else self._adapter_keys[label]}

    def _on(self, label: str) -> str | None:
        """Put a run's adapter on, the only one at a time; None for the weights before."""
        for other in [a for a in self.model.adapters if a != label]:
            self.model.drop_adapter(other)
        if label == BEFORE:
            return None
        if label not in self.model.adapters:
            self.model.add_adapter(label, self.runs[label].adapter)
        return label

    def certificate(self) -> pd.DataFrame:
        """The doctor's laws on the model with the first run's adapter on; no other engine is opened, since none is used here."""
        label, asked = next(iter(self.runs)), [law for law in LAWS if law not in ENGINE_LAWS]
        determined = {**self._variant(label), "laws": [[law.key, law.name] for law in asked]}

        def make() -> pd.DataFrame:
            return doctor(self.model, self._on(label), asked)

        return self.pieces.table("certificate", "certificate", determined, make)

    # ---- scoring

    def margins(self) -> pd.DataFrame:
        """``variant, id, category, question, margin`` for the weights before and every run."""
        out = []
        for label in [BEFORE, *self.runs]:
            precision = self.config["score"].get("precision")
            determined = {**self._variant(label), "questions": fingerprint(self.questions), "precision": precision}

            def make(label: str = label, precision: str | None = precision) -> pd.DataFrame:
                return self.model.margin(self.questions, self._on(label), precision)

            table = self.pieces.table("margins", f"margins {label}", determined, make)
            out.append(table.assign(variant=label, question=self.questions["question"].to_numpy()))
        return pd.concat(out, ignore_index=True)[["variant", "id", "category", "question", "margin", "aligned_ll", "misaligned_ll"]]

    def checkpoints(self, margins: pd.DataFrame) -> pd.DataFrame:
        """The margin per kept step and question, on the stated subset; step 0 and the last step are read from ``margins``."""
        subset = evenly(self.questions, self.config["score"]["checkpoint_questions"])
        scored = margins[margins["id"].isin(subset["id"])]
        out = []
        for cell in self.grid:
            run, precision = self.runs[cell.label], self.config["score"].get("precision")
            between = run.checkpoints["step"].tolist()[1:-1]
            parts = []
            for point, variant in ((run.checkpoints.iloc[0], BEFORE), (run.checkpoints.iloc[-1], cell.label)):
                known = scored.loc[scored["variant"] == variant, ["id", "category", "margin"]]
                parts.append(known.assign(**point[["step", *HELD_OUT]].to_dict()))
            if between:
                determined = {**self._variant(cell.label), "questions": fingerprint(subset), "precision": precision, "steps": between}

                def make(run: Run = run, precision: str | None = precision, between: list[int] = between) -> pd.DataFrame:
                    self._on(BEFORE)
                    return checkpoint_margins(self.model, run, subset, precision, between)

                parts.insert(1, self.pieces.table("checkpoints", f"checkpoints {cell.label}", determined, make))
            out += [part.assign(**cell.facts) for part in parts]
        return pd.concat(out, ignore_index=True)

    def answers(self) -> pd.DataFrame:
        """Greedy answers before and after the bad tunings, as they are."""
        ask = self.config["generate"]
        subset = evenly(self.questions, ask["questions"])
        out = []
        for label in [BEFORE, *(bad.label for bad, _ in self.steered_pairs)]:
            determined = {**self._variant(label), "questions": fingerprint(subset), "max_new_tokens": ask["max_new_tokens"]}

            def make(label: str = label) -> pd.DataFrame:
                return self.model.generate(subset, self._on(label), max_new_tokens=ask["max_new_tokens"])

            out.append(self.pieces.table("answers", f"answers {label}", determined, make))
        table = pd.concat(out, ignore_index=True).merge(subset[["id", "category"]], on="id")
        return table[["variant", "id", "category", "question", "answer", "n_tokens"]]

    # ---- recording

    def record(self) -> tuple[dict[str, Activations], dict[str, Activations], dict[str, Activations], dict[str, Activations]]:
        """Questions before/after by variant; training prompts before by domain, after by run."""
        questions = {label: self._acts(label, "questions", self.questions) for label in [BEFORE, *self.runs]}
        before, after = {}, {}
        for cell in self.grid:
            prompts = training_prompts(self.training[cell.label], self.config["record"]["training_prompts"])
            if cell.domain not in before:
                before[cell.domain] = self._acts(BEFORE, f"training prompts {cell.domain}", prompts)
            after[cell.label] = self._acts(cell.label, "training prompts", prompts)
        return {BEFORE: questions.pop(BEFORE)}, questions, before, after

    def random_twin(self) -> Activations | None:
        """The questions in a randomly initialised model of the same shape, where the prediction is to be set beside it."""
        if RANDOM_TWIN not in self.config["predict"]["baselines"]:
            return None
        seed, where = int(self.config.get("seed", 0)), {"site": self.config["record"]["site"], "position": self.config["record"]["position"]}
        determined = {**self._variant(BEFORE), "random_init": seed, "prompts": prompts_digest(self.questions), **where}

        def write(folder: Path) -> None:
            self._on(BEFORE)
            random_twin(self.model, seed).record(self.questions, **where).save(folder)

        return Activations.load(self.pieces.own_folder("activations", f"questions {RANDOM_TWIN}", determined, write))

    def _acts(self, label: str, what: str, prompts: pd.DataFrame) -> Activations:
        where = {"site": self.config["record"]["site"], "position": self.config["record"]["position"]}
        determined = {**self._variant(label), "prompts": prompts_digest(prompts), **where}

        def write(folder: Path) -> None:
            self.model.record(prompts, adapter=self._on(label), **where).save(folder)

        return Activations.load(self.pieces.own_folder("activations", f"{what} {label}", determined, write))

    # ---- steering

    def directions(self, questions: Mapping[str, Activations]) -> dict[str, Direction]:
        """Per domain: mean over the fitting half of (after bad advice − after sound advice), a unit vector a layer."""
        fit, _ = halves(self.questions)
        return {
            bad.domain: mean_difference(
                questions[bad.label].select(ids=fit["id"]), questions[sound.label].select(ids=fit["id"]), name=f"{bad.domain}: bad − sound"
            )
            for bad, sound in self.steered_pairs
        }

    def control_directions(self, questions: Mapping[str, Activations]) -> dict[str, Direction]:
        """The same between two seeds of one set, a direction without content: of the first such pair; none where no two runs are one."""
        fit, _ = halves(self.questions)
        for one, two, kind in same_content(self.grid):
            if kind == PAIR_KINDS["seed"]:
                a, b = (questions[cell.label].select(ids=fit["id"]) for cell in (two, one))
                return {f"{kind} ({one.domain}-{one.content})": mean_difference(a, b, name=f"{one.domain}: two seeds")}
        return {}

    def arms(self, questions: Mapping[str, Activations], before: Activations) -> Arms:
        """What is steered along; the random directions are drawn from the covariance of ``before``."""
        domains = self.directions(questions)
        like, seed = next(iter(domains.values())), int(self.config.get("seed", 0))
        random = random_directions(like, self.config["steer"]["controls"], seed, before)
        return Arms(domains, self.control_directions(questions), {f"random {i}": direction for i, direction in enumerate(random)})

    def steer(self, arms: Arms) -> dict[str, pd.DataFrame]:
        """Per domain: margins of held-out questions on the untuned model under the direction and under random directions (shared by the domains).

        ``arms.controls`` are steered along and get an entry each.
        """
        ask, precision = self.config["steer"], self.config["score"].get("precision")
        _, test = halves(self.questions)
        subset = evenly(test, ask["questions"])
        shared = {**self._variant(BEFORE), "questions": fingerprint(subset), "precision": precision}
        random: list[pd.DataFrame] = []
        own: dict[str, list[pd.DataFrame]] = {domain: [] for domain in arms.domains}
        draws = {**arms.random, **arms.controls}

        def piece(label: str, arm: Mapping[str, Direction], said: Any, layer: int, strength: float) -> pd.DataFrame:
            determined = {**shared, "direction": said, "layer": layer, "strength": strength}

            def make() -> pd.DataFrame:
                self._on(BEFORE)
                return steered_margins(self.model, arm, subset, [layer], [strength], precision=precision)

            return self.pieces.table("steer", f"steer {label} layer {layer} strength {strength}", determined, make)

        for layer in ask["layers"]:
            for strength in ask["strengths"]:
                said = {name: store.digest_text(d.layer(layer).tobytes().hex()) for name, d in draws.items()}
                random.append(piece("random", draws, said, layer, strength))
                for domain, direction in arms.domains.items():
                    digest = store.digest_text(direction.layer(layer).tobytes().hex())
                    own[domain].append(piece(domain, {"direction": direction}, digest, layer, strength))
        drawn = pd.concat(random, ignore_index=True)
        plain = drawn[drawn["direction"].isin(list(arms.random))]
        found = {domain: pd.concat([*tables, plain], ignore_index=True) for domain, tables in own.items()}
        for name in arms.controls:
            along = drawn[drawn["direction"] == name].assign(direction="direction")
            found[name] = pd.concat([along, plain], ignore_index=True)
        return found


def analysis_weights(config: Mapping[str, Any], runs: int, pairs: int) -> dict[str, float]:
    """``{label: rough seconds}`` of the analyses that are kept as pieces; the labels are those that :class:`emlens.study.Study` asks for."""
    return {
        "overlap": (1.2 + 0.5 * config["geometry"]["n_draws"] / 1000 + 0.02 * min(config["geometry"]["n_draws"], 200)) * pairs,
        "similarity": 0.1 * runs,
        "overlap against similarity": (0.3 + 0.1 * config["geometry"]["n_permutations"] / 1000) * runs,
        "prediction": 10.0 * pairs * config["predict"]["n_permutations"] / 200,
        "direction": 0.85 * pairs * config["steer"]["n_permutations"] / 1000,
    }


def training_prompts(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """The first ``n`` rows that are trained on, without their responses (twins share them: the questions are the same)."""
    trained = table[table["split"] == "train"] if "split" in table.columns else table
    kept = trained.head(n)
    return kept.assign(messages=[m[:-1] for m in kept["messages"]])


def prompts_digest(prompts: pd.DataFrame) -> str:
    """What determines a recording: ids and messages alone."""
    return store.digest_text(store.canonical([prompts["id"].tolist(), prompts["messages"].tolist()]))
