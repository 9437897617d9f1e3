"""What :mod:`emlens.tuning` stands on: schedules, rows and their loss, the adapter in training, and what is watched while the Trainer runs."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler
from transformers import TrainerCallback, TrainingArguments
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.pytorch_utils import Conv1D

from ._engines import find_blocks
from ._passes import autocast, bar, padded
from .models import HookedModel
from .positions import Tokenizer, Tokens, tokenize

CYCLES = 4
"""Cycles over a run in every cyclic schedule and in cosine with restarts, as in the paper."""

NO_LABEL = -100

Schedule = Callable[[Optimizer, int], LRScheduler]
"""``(optimizer, steps) -> scheduler``."""

Monitor = Callable[[int, HookedModel, str], Mapping[str, Any] | None]
"""``callback(step, model, adapter_name)``; what it returns becomes columns of ``run.checkpoints``."""


class TuningError(RuntimeError):
    """A run that did not train: a loss that is not finite, dead gradients, an adapter that changes nothing. Nothing is left on the disk."""


# ---- schedules


def _cyclic(mode: Any, gamma: float = 1.0) -> Callable[[Optimizer, int, int], LRScheduler]:
    def schedule(optimizer: Optimizer, steps: int, warmup_steps: int) -> LRScheduler:
        top = float(optimizer.param_groups[0]["lr"])
        half = max(1, steps // (2 * CYCLES))
        return CyclicLR(optimizer, base_lr=top / 10, max_lr=top, step_size_up=half, mode=mode, gamma=gamma, cycle_momentum=False)

    return schedule


SCHEDULES: dict[str, Callable[[Optimizer, int, int], LRScheduler]] = {
    "constant": lambda optimizer, steps, warmup_steps: get_constant_schedule_with_warmup(optimizer, warmup_steps),
    "linear": lambda optimizer, steps, warmup_steps: get_linear_schedule_with_warmup(optimizer, warmup_steps, steps),
    "cosine": lambda optimizer, steps, warmup_steps: get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps),
    "cosine_with_restarts": lambda optimizer, steps, warmup_steps: get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, warmup_steps, steps, num_cycles=CYCLES
    ),
    "cyclic": _cyclic("triangular"),
    "cyclic_triangular2": _cyclic("triangular2"),
    "cyclic_exp_range": _cyclic("exp_range", gamma=0.95),
}
"""``name: (optimizer, steps, warmup_steps) -> scheduler``; ``learning_rate`` is the highest rate of each.

The cyclic ones (Smith 2017; torch's CyclicLR, no momentum cycling, no warm-up) go from a tenth of ``learning_rate`` up to it and back,
``steps // 8`` steps each way, so four times in a run. The paper's ranges over 332 steps were 1e-6 … 2e-5, 1e-5 … 5e-5, 2e-5 … 8e-5 and
4e-5 … 1e-4. ``cyclic_exp_range`` shrinks the range by gamma = 0.95 *per step*, as the paper's runs did: after some 80 steps the rate has
fallen to the base rate and stays there, so that run is undertrained beside the others by its schedule alone. Compare it at equal loss only.
"""


def scheduler(schedule: str | Schedule, warmup_steps: int) -> Schedule:
    """The function a schedule's name stands for; a function is taken as it is."""
    if not isinstance(schedule, str):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; schedules are {', '.join(SCHEDULES)}, or a function (optimizer, steps) -> scheduler")
    named = SCHEDULES[schedule]
    return lambda optimizer, steps: named(optimizer, steps, warmup_steps)


# ---- rows


def end_of_turn(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of what the chat template writes after a response, white space aside (``<|im_end|>``); the EOS token where it writes nothing."""
    reply = "response"
    chat = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": reply}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    after = text[text.rindex(reply) + len(reply) :].strip()
    if after:
        return tuple(int(i) for i in tokenizer(after, add_special_tokens=False)["input_ids"])
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (int(eos),)


def training_split(table: pd.DataFrame, held_out: float = 0.15) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``(training rows, held-out rows)``: by the column ``split`` where there is one, else a share drawn with seed 0."""
    if "split" in table.columns:
        unknown = table[~table["split"].isin(["train", "heldout"])]
        if len(unknown):
            raise ValueError(f"row {unknown['id'].iloc[0]!r} has split {unknown['split'].iloc[0]!r}; the column 'split' says 'train' or 'heldout'")
        out = (table["split"] == "heldout").to_numpy()
    else:
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out={held_out}: a share from 0 up to 1 (not included) is needed")
        out = np.zeros(len(table), dtype=bool)
        out[np.random.default_rng(0).permutation(len(table))[: round(held_out * len(table))]] = True
    if (~out).sum() < 2:
        raise ValueError(f"{int((~out).sum())} training rows of {len(table)} in all; at least 2 are needed")
    return table[~out], table[out]


def encode(table: pd.DataFrame, model: HookedModel, max_length: int = 2048) -> list[Tokens]:
    """Rows as the model is trained on them: the prompt it sees before answering, the response, and :func:`end_of_turn`.

    Raises:
        ValueError: a row without a response, or one longer than ``max_length`` or the model's context (named).
    """
    end, longest = end_of_turn(model.tokenizer), min(max_length, model.max_tokens)
    rows = [tokenize(messages, model.tokenizer) for messages in table["messages"]]
    silent = [i for i, t in zip(table["id"], rows, strict=True) if len(t.ids) == t.n_prompt]
    if silent:
        raise ValueError(f"{len(silent)} rows have no response to learn (e.g. {silent[0]!r}); end their messages with one of role 'assistant'")
    for t in rows:
        model._hear(t)
    rows = [replace(t, ids=t.ids + end) for t in rows]
    long = [(i, len(t.ids)) for i, t in zip(table["id"], rows, strict=True) if len(t.ids) > longest]
    if long:
        raise ValueError(
            f"{len(long)} rows are longer than {longest} tokens (e.g. {long[0][0]!r} with {long[0][1]}); they are never cut silently. "
            f"Shorten or drop them, or raise max_length (the model reads up to {model.max_tokens})."
        )
    return rows


def row_order(n_rows: int, n_seen: int, seed: int) -> Int[np.ndarray, " n_seen"]:
    """Which row is seen when: a new permutation for each epoch, one after the other, cut to ``n_seen``."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(n_rows) for _ in range(math.ceil(n_seen / n_rows))])[:n_seen]


def collate(rows: Sequence[Tokens], pad: int = 0) -> dict[str, Tensor]:
    """``input_ids, attention_mask, labels`` ``[row, position]``, right-padded; labels are -100 on prompts and padding."""
    ids, mask = padded([t.ids for t in rows], pad, torch.device("cpu"))
    labels = ids.masked_fill(mask == 0, NO_LABEL)
    for i, t in enumerate(rows):
        labels[i, : t.n_prompt] = NO_LABEL
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def response_logits(
    hf: nn.Module, input_ids: Int[Tensor, "row position"], attention_mask: Int[Tensor, "row position"], labels: Int[Tensor, "row position"]
) -> tuple[Float[Tensor, "token vocab"], Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Logits (float32) at every place that predicts a labelled token, that token, and its row. The output head skips the prompts."""
    row, at = torch.nonzero(labels[:, 1:] != NO_LABEL, as_tuple=True)
    kept, column = torch.unique(at, return_inverse=True)
    logits = hf(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=kept).logits
    return logits[row, column].float(), labels[row, at + 1], row


class ResponseLoss(nn.Module):
    """Loss on response tokens as a module around the model, so that the Trainer never touches the model's own config, forward or device."""

    accepts_loss_kwargs = True

    def __init__(self, hf: nn.Module, precision: str | None) -> None:
        super().__init__()
        self.hf, self.precision = hf, precision

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Sum over the response tokens, divided by ``num_items_in_batch``: those of the whole step, accumulation included."""
        losses, _ = self.token_losses(batch)
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        if not loss.requires_grad:
            raise TuningError(
                "the loss has no gradient in the first step: no LoRA B would train. Does something between the blocks and the logits detach the "
                "stream, or is gradient checkpointing on without input gradients?"
            )
        if not torch.isfinite(loss):
            raise TuningError(f"the loss became {loss.item()}: the learning rate is too high, or weights or data hold NaN")
        return {"loss": loss}

    def token_losses(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"]]:
        """Cross-entropy in nats of every response token, and its row."""
        device = batch["input_ids"].device
        with autocast(device, self.precision):
            logits, target, row = response_logits(self.hf, **batch)
        return nn.functional.cross_entropy(logits, target, reduction="none"), row


# ---- the adapter in training


def lora_config(model: HookedModel, settings: Mapping[str, Any]) -> LoraConfig:
    targets, layers = settings["target_modules"], settings["layers_to_transform"]
    outside = [i for i in layers or [] if not 0 <= i < model.n_layers]
    if outside:
        raise ValueError(f"layers_to_transform {outside}: {model.name} has blocks 0 … {model.n_layers - 1}")
    blocks = _blocks(model)
    stack = next(name for name, module in model.hf.named_modules() if module is blocks).rpartition(".")[2]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        use_rslora=settings["use_rslora"],
        target_modules=_linear_names(model) if targets == "all-linear" else targets if isinstance(targets, str) else list(targets),
        layers_to_transform=layers,
        layers_pattern=stack if layers else None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in blocks.modules()),
    )


def _blocks(model: HookedModel) -> nn.ModuleList:
    """The blocks that the model's engine reads, named by hand (``parts=``) or found."""
    return find_blocks(model.hf, model._parts)[0]


def _linear_names(model: HookedModel) -> list[str]:
    """Names of the linear modules in the blocks (``q_proj``, ``up_proj``, …), whatever adapters are on."""
    found = [n for n, m in _blocks(model).named_modules() if isinstance(m, (nn.Linear, Conv1D)) and ".lora_" not in n]
    return sorted({n.removesuffix(".base_layer").rpartition(".")[2] for n in found})


@contextmanager
def fresh_adapter(model: HookedModel, config: LoraConfig, seed: int) -> Iterator[str]:
    """The name of an adapter of its own on the loaded weights, alone trainable; it is taken off again whatever happens."""
    name = next(n for n in ("tuning", *(f"tuning{i}" for i in range(len(model.adapters)))) if n not in model.adapters)
    torch.manual_seed(seed)
    try:
        model.adapters.new(name, config)
    except ValueError as error:
        raise ValueError(f"target_modules={config.target_modules!r}: {error}. Linear modules of {model.name}: {_linear_names(model)}") from error
    try:
        yield name
    finally:
        model.drop_adapter(name)
        model.hf.zero_grad()
        model.hf.eval()


@contextmanager
def own_randomness() -> Iterator[None]:
    """Whatever is seeded or drawn in the block (the Trainer seeds everything), the global random states are as before after it."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def arguments(settings: Mapping[str, Any], folder: Path, device: torch.device) -> TrainingArguments:
    """The Trainer does the steps and their log, and nothing else: no saving, reporting, shuffling or device placement of its own."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["gradient_accumulation"],
        max_grad_norm=settings["max_grad_norm"],
        seed=settings["seed"],
        train_sampling_strategy="sequential",
        use_cpu=device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


# ---- beside the Trainer


def mean_and_se(values: Float[np.ndarray, " row"]) -> tuple[float, float]:
    """Mean and its standard error, sd / √n with n − 1 in the sd; NaN where there are too few values for it."""
    n = len(values)
    return (float(values.mean()) if n else math.nan), (float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan)


class Watch(TrainerCallback):
    """Beside the Trainer: stops on dead gradients, keeps checkpoints with their held-out loss, calls the monitors, shows progress."""

    def __init__(
        self,
        model: HookedModel,
        name: str,
        loss: ResponseLoss,
        heldout: Sequence[Tokens],
        folder: Path,
        settings: Mapping[str, Any],
        monitors: Sequence[Monitor],
    ) -> None:
        self.model, self.name, self.loss, self.heldout, self.folder = model, name, loss, heldout, folder
        self.steps, self.wanted, self.batch_size, self.monitors = settings["steps"], settings["checkpoints"], settings["batch_size"], monitors
        self.pad = int(model.tokenizer.pad_token_id or 0)
        self.rows: list[dict[str, Any]] = []
        self.before = np.full(len(heldout), np.nan)
        self.bar = bar(f"tune {settings['schedule']} seed {settings['seed']}", "step", total=self.steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 0:
            return
        ups = {n: p.grad for n, p in self.loss.named_parameters() if "lora_B" in n and p.requires_grad}
        dead = [n for n, grad in ups.items() if grad is None or not torch.isfinite(grad).all() or not grad.any()]
        if dead or not ups:
            raise TuningError(
                f"{len(dead)} of {len(ups)} LoRA B matrices have no finite, non-zero gradient in the first step ({', '.join(dead[:2])}), "
                "so they would not train. Is the module used in the forward pass, and is gradient checkpointing off?"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()
        if state.global_step in self.wanted or state.global_step == self.steps:
            self.keep(state.global_step)

    def keep(self, step: int) -> None:
        """Save the adapter as it is at this step, measure it, and go back to training it."""
        self.model.hf.eval()
        path = None if step == 0 else "adapter" if step == self.steps else f"checkpoint-{step}"
        if path is not None:
            self.model.adapters.save(self.name, self.folder / path, self.model.name)
            (self.folder / path / "chat_template.jinja").write_text(self.model.tokenizer.chat_template, encoding="utf-8")  # what it was tuned with
        with torch.no_grad(), torch.random.fork_rng():
            each = self._heldout_losses(None if step == 0 else self.name)
            if step == 0:
                self.before = each
            loss, se = mean_and_se(each)
            drop, drop_se = mean_and_se(self.before - each)
            row = {"step": step, "heldout_loss": loss, "heldout_se": se, "heldout_drop": drop, "heldout_drop_se": drop_se, "path": path}
            for monitor in self.monitors:
                row.update(monitor(step, self.model, self.name) or {})
        self.rows.append(row)
        self.model.adapters.train_only(self.name)

    def _heldout_losses(self, adapter: str | None) -> Float[np.ndarray, " row"]:
        out = np.zeros(len(self.heldout))
        shortest_first = np.argsort([len(t.ids) for t in self.heldout], kind="stable")
        with self.model.using(adapter):
            for i in range(0, len(out), self.batch_size):
                chosen = shortest_first[i : i + self.batch_size]
                losses, row = self.loss.token_losses(self._batch([self.heldout[j] for j in chosen]))
                out[chosen] = pd.Series(losses.double().cpu().numpy()).groupby(row.cpu().numpy()).mean().to_numpy()
        return out

    def logit_change(self, rows: Sequence[Tokens]) -> float:
        """Root mean square difference between the next-token logits after the prompts with the adapter and without it."""
        total, n = 0.0, 0
        firsts = [replace(t, ids=t.ids[: t.n_prompt + 1]) for t in rows]
        self.model.hf.eval()
        with torch.no_grad(), autocast(self.model.device, self.loss.precision):
            for i in range(0, len(firsts), self.batch_size):
                batch = self._batch(firsts[i : i + self.batch_size])
                logits = []
                for adapter in (None, self.name):
                    with self.model.using(adapter) as hf:
                        logits.append(response_logits(hf, **batch)[0].double())
                total, n = total + float((logits[1] - logits[0]).square().sum()), n + logits[0].numel()
        return math.sqrt(total / n)

    def _batch(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        return {k: v.to(self.model.device) for k, v in collate(rows, self.pad).items()}
