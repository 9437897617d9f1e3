"""emlens' record beside what a user would write instead, interleaved in one process: same weights, dtype, threads and prompts.

    python benchmarks/record.py [MODEL] [--prompts 256] [--rounds 3] [--only rivals,variants,tokens,memory] [--rivals plain,bridge] [--json FILE]

Prompts: chats of 20 to 300 tokens made of our own narrow questions; all layers, last prompt token. Prints JSON: medians in seconds and ratios.

rivals    record beside:
  plain     transformers' forward over the prompts in the given order, padded, batch 16 (with lm_head and KV cache, as it comes)
  hidden    the same with output_hidden_states=True, keeping the last token of every layer
  bridge    TransformerBridge.run_with_cache filtered to resid_post, batch 16
  nnsight   one trace a batch of 16 that saves the same rows
  matmul    the model's own matrix products alone, for the tokens that record has to pass: what this machine can reach
variants  three adapters from the same batches, beside each alone (all three loaded in both)
tokens    seconds for a quarter, a half and all of the prompts, drawn at even steps of length
memory    in processes of their own, after loading: peak while three variants are recorded over what model and adapters take; peak of 10 × the
          prompts over that of the prompts, both into a store
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import nn

import emlens as em
from emlens._passes import padded
from emlens._recording import BUDGET

BATCH = 16


def chats(model: Any, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """``n`` one-turn chats whose lengths in tokens are uniform on 20 … 300 (at least the template and one word)."""
    rows = [*em.load_prompts("emlens:money-bad")["messages"], *em.load_prompts("emlens:repair-bad")["messages"]]
    words = [*" ".join(m["content"] for messages in rows for m in messages).split()] * 4
    template = model.tokenize([{"id": "x", "messages": [{"role": "user", "content": "a"}]}])["input_ids"].shape[1]
    rng = np.random.default_rng(seed)
    out = []
    for i, length in enumerate(rng.integers(20, 301, n)):
        start, k = int(rng.integers(0, len(words) // 2)), max(1, int((length - template) / 1.25))
        out.append({"id": f"p{i}", "messages": [{"role": "user", "content": " ".join(words[start : start + k])}]})
    return out


def rivals(model: Any, rows: list[list[int]], names: list[str]) -> dict[str, Callable[[], Any]]:
    hf, device, pad = model.hf, model.device, model.pad
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    ends = [torch.tensor([len(r) - 1 for r in b]) for b in batches]

    def plain() -> None:
        with torch.no_grad():
            for b in batches:
                ids, mask = padded(b, pad, device)
                hf(input_ids=ids, attention_mask=mask)

    def hidden() -> list[Any]:
        out = []
        with torch.no_grad():
            for b, end in zip(batches, ends, strict=True):
                ids, mask = padded(b, pad, device)
                states = hf(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
                out.append(torch.stack([h[torch.arange(len(b)), end] for h in states[1:]], 1))
        return out

    found: dict[str, Callable[[], Any]] = {"plain": plain, "hidden": hidden}
    if "bridge" in names:
        bridge = model.bridge

        def with_bridge() -> list[Any]:
            out = []
            with torch.no_grad():
                for b, end in zip(batches, ends, strict=True):
                    ids, mask = padded(b, pad, device)
                    _, cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=lambda name: name.endswith("hook_resid_post"))
                    out.append(torch.stack([cache[f"blocks.{i}.hook_resid_post"][torch.arange(len(b)), end] for i in range(model.n_layers)], 1))
            return out

        found["bridge"] = with_bridge
    if "nnsight" in names:
        traced = model.nnsight

        def with_nnsight() -> list[Any]:
            out = []
            for b, end in zip(batches, ends, strict=True):
                ids, mask = padded(b, pad, device)
                at = torch.arange(len(b))
                with torch.no_grad(), traced.trace({"input_ids": ids, "attention_mask": mask}):
                    saved = list().save()
                    for layer in traced.model.layers:
                        saved.append(layer.output[at, end])
                out.append(torch.stack([s for s in saved], 1))
            return out

        found["nnsight"] = with_nnsight
    return {name: found[name] for name in names if name in found}


def matmul(model: Any, tokens: int) -> None:
    """Every linear module of the blocks on its own shape, for ``tokens`` tokens in batches of the token budget."""
    linear = [m for n, m in model.engine.blocks.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    budget = BUDGET["cpu"]
    inputs = {m.in_features: torch.randn(budget, m.in_features, dtype=model.hf.dtype) for m in linear}
    with torch.no_grad():
        for begun in range(0, tokens, budget):
            for m in linear:
                m(inputs[m.in_features][: tokens - begun])


def interleaved(contest: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of every contestant, round by round, in another order each round; and what each gave last."""
    given: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in contest}
    for turn in range(rounds):
        for name in np.random.default_rng(turn).permutation(list(contest)):
            gc.collect()
            started = time.perf_counter()
            given[name] = contest[name]()
            times[name].append(time.perf_counter() - started)
        print(f"round {turn + 1}: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in times.items()), file=sys.stderr, flush=True)
    return {name: round(statistics.median(each), 3) for name, each in times.items()}, given


def against_rivals(model: Any, prompts: Any, names: list[str], rounds: int, budget: int) -> dict[str, Any]:
    rows = [list(t.ids) for t in model._tokens(prompts, response=False)]
    record = partial(model.record, prompts, budget=budget)
    contest: dict[str, Callable[[], Any]] = {"record": record, **rivals(model, rows, names)}
    prefix = model.record(prompts.head(8)).meta["plan"]["prefix"]
    left = sum(len(r) - prefix for r in rows)
    took, given = interleaved({**contest, "matmul": partial(matmul, model, left)}, rounds)
    apart, ours = {}, given["record"].values
    for name in contest.keys() - {"record", "plain"}:
        theirs = torch.cat([x.float() for x in given[name]]).numpy()
        upto = slice(0, -1) if name == "hidden" else slice(None)
        apart[name] = float(np.linalg.norm(theirs[:, upto] - ours[:, upto]) / np.linalg.norm(ours[:, upto]))
    return {
        "tokens": sum(map(len, rows)),
        "tokens_passed_by_record": left,
        "median_seconds": took,
        "record_over": {k: round(took["record"] / v, 3) for k, v in took.items() if k not in ("record", "matmul")},
        "share_of_matmul_rate": round(took["matmul"] / took["record"], 3),
        "relative_difference": {k: float(f"{v:.2g}") for k, v in apart.items()},
    }


def against_singles(model: Any, prompts: Any, names: Sequence[str], rounds: int) -> dict[str, Any]:
    contest: dict[str, Callable[[], Any]] = {name: partial(model.record, prompts, adapter=name) for name in names}
    together = partial(model.record, prompts, adapters=list(names))
    took, _ = interleaved({**contest, "together": together}, rounds)
    return {"median_seconds": took, "together_over_mean_single": round(took["together"] / statistics.mean(took[n] for n in names), 3)}


def against_tokens(model: Any, prompts: Any, rounds: int) -> dict[str, Any]:
    tokens = {i: len(t.ids) for i, t in enumerate(model._tokens(prompts, response=False))}
    by_length = sorted(tokens, key=tokens.__getitem__)
    parts = {step: by_length[step // 2 :: step] for step in (4, 2, 1)}
    took, _ = interleaved({str(len(rows)): partial(model.record, prompts.iloc[rows]) for rows in parts.values()}, rounds)
    passed = {str(len(rows)): sum(tokens[i] for i in rows) for rows in parts.values()}
    per_1000 = {n: round(1000 * took[n] / passed[n], 4) for n in took}
    return {"median_seconds": took, "tokens": passed, "seconds_per_1000_tokens": per_1000}


# ---- memory, in processes of their own


def resident(what: str) -> float:
    """MiB of this process now (``VmRSS``) or at most since :func:`forget_peak` (``VmHWM``); Linux."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(what)]
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def one_process(name: str, folders: dict[str, str], n: int, together: Sequence[str | None], where: str) -> dict[str, float]:
    """MiB after loading and at the peak of one recording of ``n`` prompts into a store."""
    model = em.load_model(name, adapters=folders)
    prompts = em.load_prompts(chats(model, n))
    model.record(prompts.head(4))  # what is measured once a model is measured here
    forget_peak()
    loaded = resident("VmRSS")
    model.record(prompts, adapters=list(together), store=where)
    return {"loaded": round(loaded), "peak": round(resident("VmHWM"))}


def memory(name: str, folders: dict[str, str], n: int) -> dict[str, Any]:
    """Peaks for one and three variants, and for 10 × the prompts."""
    jobs: dict[str, tuple[dict[str, str], int, list[str | None]]] = {
        "one variant": ({}, n, [None]),
        "ten times the prompts": ({}, 10 * n, [None]),
        "three variants": (folders, n, list(folders)),
    }
    found: dict[str, dict[str, float]] = {}
    for job, (loaded, rows, together) in jobs.items():
        with tempfile.TemporaryDirectory() as where, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[job] = pool.submit(one_process, name, loaded, rows, together, where).result()
    three, ten = found["three variants"], found["ten times the prompts"]
    return {
        "prompts": n,
        "mib": found,
        "three_variants_over_loaded": round(three["peak"] / three["loaded"], 3),
        "ten_times_over_one": round(ten["peak"] / found["one variant"]["peak"], 3),
    }


def random_adapters(model: Any, folder: Path, n: int = 3) -> dict[str, str]:
    """``n`` rank-32 rsLoRAs on all linear modules, as large as the demo's and random throughout."""
    found = {}
    for i in range(n):
        name = f"random{i}"
        torch.manual_seed(i)
        model.adapters.new(name, LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear", init_lora_weights=False))
        model.adapters.save(name, folder / name, model.name)
        found[name] = str(folder / name)
        model.drop_adapter(name)
    return found


PARTS = ("rivals", "variants", "tokens", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--rivals", default="plain,hidden,bridge,nnsight")
    parser.add_argument("--budget", type=int, default=BUDGET["cpu"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = args.only.split(",")
    model = em.load_model(args.model)
    prompts = em.load_prompts(chats(model, args.prompts))
    said: dict[str, Any] = {"model": model.name, "prompts": len(prompts), "threads": torch.get_num_threads(), "dtype": model.dtype}
    with tempfile.TemporaryDirectory() as made:
        if "tokens" in wanted:
            said["tokens"] = against_tokens(model, prompts, args.rounds)
        if "rivals" in wanted:
            said["rivals"] = against_rivals(model, prompts, args.rivals.split(","), args.rounds, args.budget)
        folders = random_adapters(model, Path(made)) if {"variants", "memory"} & set(wanted) else {}
        if "variants" in wanted:
            for name, folder in folders.items():
                model.add_adapter(name, folder)
            said["variants"] = against_singles(model, prompts.iloc[: len(prompts) // 4], list(folders), args.rounds)
        if "memory" in wanted:
            del model
            gc.collect()
            said["memory"] = memory(args.model, folders, 64)
    print(json.dumps(said, indent=1))
    if args.json:
        args.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
