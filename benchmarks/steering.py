"""What an open edit costs in generation with KV cache: steered, ablated and clamped beside plain, interleaved in one process.

    python benchmarks/steering.py [--model FOLDER] [--rounds 9] [--prompts 1] [--tokens 32] [--json FILE]

Without --model a random Llama of 12 blocks and width 768 is built in memory. Every arm generates the same number of tokens greedily from the
same prompts; the time is that of one generation, the first pass over the prompts included. Arms: add at one layer and at all, ablate one
direction and the span of three at all layers, clamp at all layers, add to the response alone at all layers. Prints JSON: medians of wall and
CPU seconds, ratios to plain (the median over rounds of the ratio within a round), and "plain again": the same twice, the noise of a ratio.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emlens as em
from emlens._families import tiny_hf, tiny_tokenizer

PLAIN = "plain"


def model_of(folder: str | None) -> em.HookedModel:
    """The model of a folder, or a random one of middle size."""
    if folder:
        return em.load_model(folder)
    return em.HookedModel(tiny_hf("llama", 0, hidden=768, layers=12, heads=12, context=2048), tiny_tokenizer(), name="random llama, 12 x 768")


def arms(model: em.HookedModel) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What is open while text is generated."""
    rng = np.random.default_rng(0)
    one, two, three = (em.Direction.from_array(rng.normal(size=(model.n_layers, model.d_model))) for _ in range(3))
    middle = model.n_layers // 2
    return {
        PLAIN: nullcontext,
        "plain again": nullcontext,
        "add, one layer": lambda: model.steer(one, middle, 0.1),
        "add, all layers": lambda: model.steer(one, "all", 0.1),
        "add to the response, all layers": lambda: model.steer(one, "all", 0.1, positions="response"),
        "ablate, one layer": lambda: model.ablate(one, middle),
        "ablate, all layers": lambda: model.ablate(one),
        "ablate the span of three, all layers": lambda: model.ablate([one, two, three]),
        "clamp, all layers": lambda: model.clamp(one, "all", 0.1),
    }


def generation(model: em.HookedModel, open_edit: Callable[[], AbstractContextManager[Any]], prompts: list[str], tokens: int) -> tuple[float, float]:
    """Wall and CPU seconds of one generation of exactly so many tokens."""
    with open_edit():
        inputs = model.tokenize(prompts)
        inputs = {name: torch.as_tensor(np.asarray(inputs[name])) for name in ("input_ids", "attention_mask")}
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            model.hf.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, use_cache=True, pad_token_id=0)
        return time.perf_counter() - wall, time.process_time() - cpu


def measured(model: em.HookedModel, rounds: int, n_prompts: int, tokens: int) -> dict[str, Any]:
    """Every arm once a round, in another order each round; the first round warms up and does not count."""
    model.residual_norms()
    prompts = ["Tell me what you would do with a free afternoon, and why that."] * n_prompts
    contest = arms(model)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contest}
    for turn in range(rounds + 1):
        for name in np.random.default_rng(turn).permutation(list(contest)):
            found = generation(model, contest[name], prompts, tokens)
            if turn:
                times[name].append(found)
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    out = {}
    for name, each in times.items():
        pairs = list(zip(each, times[PLAIN], strict=True))
        out[name] = {
            "wall_s": round(statistics.median(w for w, _ in each), 4),
            "cpu_s": round(statistics.median(c for _, c in each), 4),
            "ratio_wall": round(statistics.median(a[0] / b[0] for a, b in pairs), 4),
            "ratio_cpu": round(statistics.median(a[1] / b[1] for a, b in pairs), 4),
        }
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a model folder; default: a random model in memory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = model_of(given.model)
    facts = {"model": repr(model), "threads": torch.get_num_threads(), "prompts": given.prompts, "tokens": given.tokens, "rounds": given.rounds}
    found = {**facts, "arms": measured(model, given.rounds, given.prompts, given.tokens)}
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
