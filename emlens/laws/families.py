"""The laws on tiny random models of many families, each as it is and with a LoRA: what ``emlens doctor --families`` prints."""

import copy
import warnings
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from peft import LoraConfig

from .._families import FAMILIES, tiny_hf, tiny_tokenizer
from .._passes import bar
from ..loading import quiet
from ..models import HookedModel
from .examine import LAWS, doctor
from .law import Law
from .text import bound, mark, number, tally

LORA = "LoRA"


def family_table(names: Iterable[str] = FAMILIES, laws: Iterable[Law | str] | None = None) -> pd.DataFrame:
    """The doctor's rows with a column ``family`` before them; built in memory, no network."""
    chosen = list(LAWS if laws is None else laws)
    found = []
    for name in bar("families", "family", list(names)):
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")  # PEFT's and transformers' on models without a name
            report = doctor(tiny_with_lora(name), laws=chosen)
        found.append(report.assign(family=name)[["family", *report.columns]])
    out = pd.concat(found, ignore_index=True)
    out.attrs = {"versions": found[0].attrs["versions"], "seconds": sum(report.attrs["seconds"] for report in found)}
    return out


def tiny_with_lora(family: str) -> HookedModel:
    """A tiny random model with a random LoRA, and a tokenizer that has a BOS (the template writes it, as SmolLM2's does)."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.bos_token = "<|im_start|>"
    model = HookedModel(tiny_hf(family), tokenizer, name=f"tiny {family}")
    add_random_lora(model)
    return model


def add_random_lora(model: HookedModel, name: str = LORA, seed: int = 0, rank: int = 2) -> None:
    """A LoRA on every linear module of the blocks, both halves random."""
    model.adapters.new(name, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    made = torch.Generator().manual_seed(seed)
    for path, parameter in model.hf.named_parameters():
        if f".{name}." in path:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=made))
    model.hf.requires_grad_(False)


def family_text(table: pd.DataFrame) -> str:
    """Family × laws: ✓ holds, ✗ broken, – does not apply, blank where it is asked of another row; below, the laws by number with the worst that
    was measured, and why some do not apply."""
    order = {law.name: i for i, law in enumerate(LAWS)}
    laws = sorted(dict.fromkeys(table["law"]), key=lambda name: order.get(name, len(order)))
    named = table.assign(row=[family if pd.isna(on) else f"{family} + {on}" for family, on in zip(table["family"], table["adapter"], strict=True)])
    wide = int(named["row"].str.len().max())
    lines = [" " * wide + "".join(f"{i + 1:>3}" for i in range(len(laws)))]
    for row, group in named.groupby("row", sort=False):
        marks = dict(zip(group["law"], group["holds"].map(mark), strict=True))
        lines.append(f"{row:<{wide}}" + "".join(f"{marks.get(law, ''):>3}" for law in laws).rstrip())
    lines.append("")
    for i, law in enumerate(laws):
        lines += _told(i + 1, law, named[named["law"] == law])
    return "\n".join([*lines, "", f"{table['family'].nunique()} families · {tally(table)} · {table.attrs['seconds']:.0f} s"])


def _told(index: int, law: str, rows: pd.DataFrame) -> list[str]:
    line, asked = f"{index:>3} {law}", rows[rows["measured"].notna()]
    if len(asked):
        above = asked["relation"].iloc[0] == ">"
        worst = asked.loc[asked["measured"].idxmin() if above else asked["measured"].idxmax()]
        line += f": {number(worst['measured'])} at worst ({worst['row']}), {bound(worst['relation'], worst['tolerance'])} {worst['unit']}"
    why = rows[rows["holds"].isna()].groupby("remedy", sort=False)["family"].unique()
    lines = [f"      – {_names(who)}: {str(reason).removeprefix('does not apply: ').splitlines()[0][:200]}" for reason, who in why.items()]
    broken = rows[~rows["holds"].fillna(True)].to_dict("records")
    return [line, *lines, *(f"      ✗ {row['row']}: {number(row['measured'])} {row['remedy'][:300]}" for row in broken)]


def _names(families: Sequence[str]) -> str:
    return ", ".join(families) if len(families) <= 8 else f"{len(families)} families"
