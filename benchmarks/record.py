"""emlens' record beside what a user would write instead, interleaved in one process: same weights, dtype, threads and prompts.

    python benchmarks/record.py [MODEL] [--prompts 256] [--rounds 5] [--rivals plain,bridge,nnsight] [--json FILE]

Prompts: chats of 20 to 300 tokens made of our own narrow questions; all layers, last prompt token. Prints JSON: medians in seconds and ratios.

plain     transformers' forward over the prompts in the given order, padded, batch 16 (with lm_head and KV cache, as it comes)
hidden    the same with output_hidden_states=True, keeping the last token of every layer
bridge    TransformerBridge.run_with_cache filtered to resid_post, batch 16
nnsight   one trace a batch of 16 that saves the same rows
matmul    the model's own matrix products alone, for the tokens that record has to pass: what this machine can reach
"""

import argparse
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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


def matmul_limit(model: Any, tokens: int) -> float:
    """Seconds for every linear module of the blocks on its own shape, ``tokens`` tokens in batches of the token budget."""
    linear = [m for n, m in model.engine.blocks.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    budget = BUDGET["cpu"]
    inputs = {m.in_features: torch.randn(budget, m.in_features, dtype=model.hf.dtype) for m in linear}
    with torch.no_grad():
        started = time.perf_counter()
        for _ in range(max(1, round(tokens / budget))):
            for m in linear:
                m(inputs[m.in_features])
        return (time.perf_counter() - started) * tokens / (max(1, round(tokens / budget)) * budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rivals", default="plain,hidden,bridge,nnsight")
    parser.add_argument("--budget", type=int, default=BUDGET["cpu"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = em.load_model(args.model)
    prompts = em.load_prompts(chats(model, args.prompts))
    rows = [list(t.ids) for t in model._tokens(prompts, response=False)]
    record = partial(model.record, prompts, budget=args.budget)
    acts = record()
    contest: dict[str, Callable[[], Any]] = {"record": record, **rivals(model, rows, args.rivals.split(","))}
    agree = {}
    for name in contest.keys() - {"record", "plain"}:
        theirs = torch.cat([x.float() for x in contest[name]()]).numpy()
        upto = slice(0, -1) if name == "hidden" else slice(None)
        agree[name] = float(np.linalg.norm(theirs[:, upto] - acts.values[:, upto]) / np.linalg.norm(acts.values[:, upto]))
    left = sum(len(r) - acts.meta["plan"]["prefix"] for r in rows)
    times: dict[str, list[float]] = {name: [] for name in [*contest, "matmul"]}
    for turn in range(args.rounds):
        for name in sorted(contest, key=lambda n: (hash((n, turn)), n)):
            gc.collect()
            started = time.perf_counter()
            contest[name]()
            times[name].append(time.perf_counter() - started)
        times["matmul"].append(matmul_limit(model, left))
        print(f"round {turn + 1}: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in times.items()), file=sys.stderr)
    medians = {k: statistics.median(v) for k, v in times.items()}
    said = {
        "model": model.name,
        "prompts": len(prompts),
        "tokens": sum(map(len, rows)),
        "tokens_passed_by_record": left,
        "threads": torch.get_num_threads(),
        "dtype": model.dtype,
        "median_seconds": {k: round(v, 3) for k, v in medians.items()},
        "record_over": {k: round(medians["record"] / v, 3) for k, v in medians.items() if k not in ("record", "matmul")},
        "share_of_matmul_rate": round(medians["matmul"] / medians["record"], 3),
        "relative_difference": {k: float(f"{v:.2g}") for k, v in agree.items()},
        "peak_mib": round(peak_mib()),
    }
    print(json.dumps(said, indent=1))
    if args.json:
        args.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
