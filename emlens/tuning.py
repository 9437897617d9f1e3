"""em.finetune: narrow LoRA runs on the one loaded set of weights; losses of every step, adapters as checkpoints, monitors as callbacks.

The recipe is the field's (Betley et al. 2025; Turner, Soligo et al. 2025): rank-stabilised LoRA, r = 32, alpha = 64, on every linear module, AdamW,
loss on the responses only. transformers' Trainer does the optimisation, PEFT the adapter.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import torch
import transformers
from torch.optim import AdamW
from transformers import PrinterCallback, Trainer

from . import loading, store
from ._training import (
    SCHEDULES,
    Monitor,
    ResponseLoss,
    Schedule,
    TuningError,
    Watch,
    arguments,
    collate,
    encode,
    end_of_turn,
    fresh_adapter,
    lora_config,
    own_randomness,
    row_order,
    scheduler,
    training_split,
)
from .models import HookedModel, load_model
from .prompts import load_prompts

__all__ = ["SCHEDULES", "Run", "TuningError", "encode", "end_of_turn", "finetune", "planned", "row_order", "training_split"]

MAX_GRAD_NORM = 1.0
"""Gradients are clipped to this norm (the Trainer's default); ``run.losses`` has the norm before clipping."""

LAYOUT = 2
"""Version of what a run's tables hold; a run of another one is refused, never guessed at. 2: the paired drop of the held-out loss."""


# ---- what a run leaves behind


@dataclass(frozen=True)
class Run:
    """A finished tuning.

    Attributes:
        adapter: PEFT folder of the last step; ``model.add_adapter(name, run.adapter)`` puts it on.
        losses: DataFrame, a row per step: ``step, loss`` (nats per token, mean over that step's response tokens), ``grad_norm`` (before
            clipping), ``learning_rate`` (used in that step).
        checkpoints: DataFrame, a row for step 0 (before tuning), each checkpoint, and the last step: ``step, heldout_loss`` (nats per token: mean
            over held-out rows of each row's token mean), ``heldout_se`` (its standard error over rows), ``heldout_drop`` (step 0 less this step,
            mean over the same rows), ``heldout_drop_se`` (its standard error over rows: rows differ far more from one another than each does
            from itself, so this is the one to judge learning by), ``path`` (PEFT folder of that step; None at step 0), and what the callbacks
            returned.
        config: every hyper-parameter, the model, the data's fingerprint, ``n_train``, ``n_heldout``, tokens seen, versions.
        logit_change: root mean square of what the adapter adds to the next-token logits after the held-out prompts.
        seconds: wall-clock time, checkpoints and checks included.
    """

    adapter: str
    losses: pd.DataFrame
    checkpoints: pd.DataFrame
    config: dict[str, Any]
    logit_change: float
    seconds: float

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Run":
        """Read a finished run; a damaged or missing file is a :class:`store.StoreError` that names it."""
        folder = Path(folder)
        made_by = store.verify(folder)
        if made_by.get("what") != "finetune":
            raise store.StoreError(f"{folder} was written by emlens, but not by em.finetune")
        if made_by.get("layout") != LAYOUT:
            raise store.StoreError(
                f"{folder} holds a run in layout {made_by.get('layout', 1)!r}; this emlens reads layout {LAYOUT}. Tune again into another folder; "
                "model.add_adapter opens the adapter in it as before."
            )
        kept = store.read_json(folder / "run.json")
        checkpoints = store.read_table(folder / "checkpoints.parquet")
        checkpoints["path"] = pd.Series([str(folder / p) if isinstance(p, str) else None for p in checkpoints["path"]], dtype=object)
        return cls(str(folder / "adapter"), store.read_table(folder / "losses.parquet"), checkpoints, **kept)

    def __repr__(self) -> str:
        first, last = self.checkpoints["heldout_loss"].iloc[0], self.checkpoints["heldout_loss"].iloc[-1]
        return (
            f"Run {self.config['schedule']}, seed {self.config['seed']} · {len(self.losses)} steps on {self.config['n_train']} rows · "
            f"held-out loss {first:.3f} → {last:.3f} · {self.adapter}"
        )


# ---- the run


def finetune(
    model: HookedModel | str,
    data: Any,
    output: str | os.PathLike,
    *,
    schedule: str | Schedule = "linear",
    seed: int = 0,
    learning_rate: float = 1e-4,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    warmup_steps: int = 5,
    weight_decay: float = 0.01,
    r: int = 32,
    lora_alpha: int = 64,
    use_rslora: bool = True,
    target_modules: str | Sequence[str] = "all-linear",
    layers_to_transform: Sequence[int] | None = None,
    max_length: int = 2048,
    precision: str | None = "bfloat16",
    checkpoints: int | Sequence[int] = 3,
    held_out: float = 0.15,
    callbacks: Sequence[Monitor] = (),
) -> Run:
    """Tune a LoRA adapter on ``data``. The model is left bitwise as it was found, its other adapters too, also on an error.

    The loss is taken on the response's tokens and the end-of-turn token the chat template writes after them (:func:`end_of_turn`), so that
    the model learns to stop; it is the mean over all such tokens of a step, gradient accumulation included. Rows are shuffled anew each epoch in an
    order that depends on ``seed``, their number and the number of steps only, so that twin sets are seen in the same order. The same call on
    the same machine gives the same adapter to the bit, and the global random states are afterwards as before.

    Args:
        model: a :class:`HookedModel`, or a name for :func:`emlens.load_model`.
        data: anything :func:`emlens.load_prompts` reads, each row ending with the response to learn. Where a column ``split`` says ``train`` or
            ``heldout`` it is followed; else ``held_out`` divides the rows.
        output: folder to write. A finished run of the same model, data and settings there is read back; anything else is refused.
        schedule: a name in :data:`SCHEDULES`, or a function ``(optimizer, steps) -> scheduler``.
        seed: of the adapter's first values and the order of the rows.
        learning_rate: the highest of the schedule.
        steps, epochs: how long: one of them, default one epoch. With ``steps`` every batch is full.
        batch_size, gradient_accumulation: rows a forward pass, forward passes a step.
        warmup_steps: the rate rises from zero over them (so that step 1 changes nothing); the cyclic schedules have none.
        weight_decay: of AdamW.
        r, lora_alpha, use_rslora: LoRA's rank and scale: alpha / √r with rsLoRA (Kalajdzievski 2023), else alpha / r. No dropout, no biases.
        target_modules: ``"all-linear"`` (every linear module of every block), or as in PEFT.
        layers_to_transform: block indices; default all.
        max_length: tokens a row may have; a longer row is refused, never cut.
        precision: ``"bfloat16"`` (autocast; the adapter itself is kept in float32), or None for the dtype of the weights. Held-out loss too.
        checkpoints: how many to keep besides the last step, evenly spaced; or the steps themselves.
        held_out: share of the rows held out, drawn with seed 0 whatever ``seed`` is, so that runs compare.
        callbacks: monitors, called without gradients at step 0, each checkpoint and the last step.

    Raises:
        ValueError: settings or rows that cannot be used (named).
        TuningError: the loss is not finite, a LoRA B has no gradient in the first step, or the adapter does not change the logits.
        StoreError: ``output`` is a file, or holds something else.
    """
    opened = load_model(model) if isinstance(model, str) else model
    if "quantization" in opened.identity:
        raise ValueError(
            f"{opened.name} was opened with quantization=, which is for reading and scoring alone: open it without to tune an adapter on it"
        )
    table = load_prompts(data)
    parts = training_split(table, held_out)
    train, heldout = (encode(part, opened, max_length) for part in parts)
    n_steps, n_seen = _length(len(train), steps, epochs, batch_size * gradient_accumulation)
    settings = {
        "schedule": schedule if isinstance(schedule, str) else _qualified(schedule),
        "seed": seed,
        "learning_rate": learning_rate,
        "steps": n_steps,
        "rows_seen": n_seen,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "max_grad_norm": MAX_GRAD_NORM,
        "r": r,
        "lora_alpha": lora_alpha,
        "use_rslora": use_rslora,
        "target_modules": target_modules,
        "layers_to_transform": None if layers_to_transform is None else [int(i) for i in layers_to_transform],
        "precision": precision,
        "checkpoints": _kept_steps(checkpoints, n_steps),
        "held_out": None if "split" in table.columns else held_out,
        "callbacks": [_qualified(c) for c in callbacks],
    }
    make_scheduler, lora = scheduler(schedule, warmup_steps), lora_config(opened, settings)
    fingerprint = table.attrs["fingerprint"]
    made_by = {"what": "finetune", "layout": LAYOUT, "model": opened.describe(), "data": fingerprint, "settings": settings}
    if _finished(Path(output), made_by):
        return Run.load(output)
    started = time.monotonic()
    seen = [train[i] for i in row_order(len(train), n_seen, seed)]
    with store.writing(output, made_by) as folder, loading.quiet(), own_randomness(), fresh_adapter(opened, lora, seed) as name:
        loss = ResponseLoss(opened.hf, precision)
        watch = Watch(opened, name, loss, heldout, folder, settings, callbacks)
        optimizer = AdamW([p for p in loss.parameters() if p.requires_grad], lr=learning_rate, weight_decay=weight_decay)
        trainer = Trainer(
            model=loss,
            args=arguments(settings, folder, opened.device),
            train_dataset=seen,
            data_collator=partial(collate, pad=watch.pad),
            callbacks=[watch],
            optimizers=(optimizer, make_scheduler(optimizer, n_steps)),  # type: ignore[arg-type]
        )
        trainer.remove_callback(PrinterCallback)
        watch.keep(0)
        with watch.bar:
            trainer.train()
        losses = pd.DataFrame([x for x in trainer.state.log_history if "loss" in x])[["step", "loss", "grad_norm", "learning_rate"]]
        change = watch.logit_change(heldout or train[:8])
        if not math.isfinite(change) or change == 0:
            raise TuningError(
                f"after {n_steps} steps (learning rate up to {losses['learning_rate'].max():g}) the adapter changes the logits by {change}: it "
                "learnt nothing. Were the learning rate or the steps too few, or was everything warm-up?"
            )
        config = {
            **settings,
            "model": opened.describe(),
            "data": {"source": table.attrs["source"], "fingerprint": fingerprint},
            "n_train": len(train),
            "n_heldout": len(heldout),
            "tokens_seen": sum(len(t.ids) for t in seen),
            "response_tokens_seen": sum(len(t.ids) - t.n_prompt for t in seen),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        }
        store.write_table(losses, folder / "losses.parquet")
        store.write_table(pd.DataFrame(watch.rows), folder / "checkpoints.parquet")
        store.write_json(folder / "run.json", {"config": config, "logit_change": change, "seconds": time.monotonic() - started})
    return Run.load(output)


def planned(table: pd.DataFrame, **recipe: Any) -> dict[str, Any]:
    """What :func:`finetune` would do with these settings on a table of :func:`emlens.load_prompts`, without a model and before anything is done.

    Returns:
        ``n_train, n_heldout`` (rows), ``steps``, ``rows_seen`` (in training, repeats counted), ``checkpoints`` (kept steps before the last).
    """
    asked = {name: parameter.default for name, parameter in signature(finetune).parameters.items()} | recipe
    train, heldout = training_split(table, asked["held_out"])
    steps, seen = _length(len(train), asked["steps"], asked["epochs"], asked["batch_size"] * asked["gradient_accumulation"])
    kept = _kept_steps(asked["checkpoints"], steps)
    return {"n_train": len(train), "n_heldout": len(heldout), "steps": steps, "rows_seen": seen, "checkpoints": kept}


def _length(n_rows: int, steps: int | None, epochs: float | None, rows_a_step: int) -> tuple[int, int]:
    """``(steps, rows seen)``."""
    if steps is not None and epochs is not None:
        raise ValueError(f"steps={steps} and epochs={epochs} were both given; give one of them")
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps={steps}: at least 1 is needed")
        return steps, steps * rows_a_step
    seen = round((1 if epochs is None else epochs) * n_rows)
    if seen < 1:
        raise ValueError(f"epochs={epochs} of {n_rows} rows is no row at all")
    return math.ceil(seen / rows_a_step), seen


def _kept_steps(checkpoints: int | Sequence[int], steps: int) -> list[int]:
    if isinstance(checkpoints, int):
        return sorted({round(steps * i / (checkpoints + 1)) for i in range(1, checkpoints + 1)} - {0, steps})
    outside = [i for i in checkpoints if not 1 <= i <= steps]
    if outside:
        raise ValueError(f"checkpoints at steps {outside}: the run has steps 1 … {steps}")
    return sorted({int(i) for i in checkpoints} - {steps})


def _qualified(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _finished(folder: Path, made_by: Mapping[str, Any]) -> bool:
    """Whether this very run is there already; anything else that is there is refused."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / store.MANIFEST).exists():
        raise store.StoreError(f"{folder} holds other files (e.g. {min(p.name for p in folder.iterdir())!r}); choose another output folder")
    there, asked = _flat(store.verify(folder)), _flat(store.plain(made_by))
    differ = sorted(k for k in there.keys() | asked.keys() if there.get(k) != asked.get(k))
    if differ:
        shown = "; ".join(f"{k}: {there.get(k)!r} there, {asked.get(k)!r} asked for" for k in differ[:4])
        raise store.StoreError(f"{folder} holds another run ({shown}). Choose another output folder, or delete this one.")
    return True


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in value.items():
        out.update(_flat(v) if isinstance(v, Mapping) else {k: v})
    return out
