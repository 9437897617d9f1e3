"""Guards em.finetune: the loss it minimises, the run it writes, the model it leaves behind, and what it refuses."""

import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import emlens as em
from emlens import store, tuning
from emlens._training import collate
from emlens.models import HookedModel

FAST = {"steps": 6, "batch_size": 4, "learning_rate": 2e-3, "precision": None, "checkpoints": 1, "warmup_steps": 2}


def weights(run):
    return load_file(Path(run.adapter) / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logits(model, adapter=None):
    tokens = model.tokenize(["What should I do?", "Tell me more about the market."])
    with model.using(adapter) as hf, torch.no_grad():
        return hf(**tokens).logits.clone()


def oracle(model, rows):
    """Each row's (sum, number) of response-token losses: one row at a time, unpadded, whole logits, transformers' own forward."""
    out = []
    for row in rows:
        with torch.no_grad():
            logp = model.hf(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        targets = range(row.n_prompt, len(row.ids))
        out.append((-sum(logp[k - 1, row.ids[k]].item() for k in targets), len(targets)))
    return np.array(out)


@pytest.fixture
def tuned(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    return model, em.finetune(model, tiny_chats, tmp_path / "run", **FAST)


# ---- what is learnt


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3_text", "gpt_neox"])
def test_every_family_learns_and_is_left_as_found(family, tiny_model, tiny_chats, tmp_path):
    model = tiny_model(family)
    before, modules = logits(model), [(n, type(m)) for n, m in model.hf.named_modules()]
    config = model.hf.config.to_dict()
    run = em.finetune(model, tiny_chats, tmp_path / "run", **FAST)
    assert run.checkpoints["heldout_loss"].iloc[-1] < run.checkpoints["heldout_loss"].iloc[0] - 0.1
    assert torch.equal(logits(model), before)
    assert [(n, type(m)) for n, m in model.hf.named_modules()] == modules
    assert model.hf.config.to_dict() == config and not model.hf.training and not any(p.requires_grad for p in model.hf.parameters())
    assert model.adapters == {}
    model.add_adapter("new", run.adapter)
    assert not torch.equal(logits(model, "new"), before)


def test_losses_are_those_of_an_independent_count(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    table = em.load_prompts(tiny_chats)
    train, heldout = (tuning.encode(t, model) for t in tuning.training_split(table))
    run = em.finetune(model, table, tmp_path / "run", **{**FAST, "steps": 2, "gradient_accumulation": 2})
    first = oracle(model, [train[i] for i in tuning.row_order(len(train), 16, 0)[:8]])
    assert run.losses["loss"].iloc[0] == pytest.approx(first[:, 0].sum() / first[:, 1].sum(), abs=1e-4)
    each = oracle(model, heldout)
    means = each[:, 0] / each[:, 1]
    assert run.checkpoints["heldout_loss"].iloc[0] == pytest.approx(means.mean(), abs=1e-4)
    assert run.checkpoints["heldout_se"].iloc[0] == pytest.approx(means.std(ddof=1) / len(means) ** 0.5, abs=1e-4)
    assert run.config["response_tokens_seen"] > 0 and run.config["tokens_seen"] > run.config["response_tokens_seen"]


def test_the_drop_of_the_heldout_loss_is_paired_row_by_row(tuned, tiny_chats):
    model, run = tuned
    heldout = tuning.encode(tuning.training_split(em.load_prompts(tiny_chats))[1], model)
    before = oracle(model, heldout)
    for step, path in run.checkpoints[["step", "path"]].iloc[1:].itertuples(index=False):
        model.add_adapter("at", path)
        with model.using("at"):
            after = oracle(model, heldout)
        model.drop_adapter("at")
        drop = before[:, 0] / before[:, 1] - after[:, 0] / after[:, 1]
        row = run.checkpoints.set_index("step").loc[step]
        assert row["heldout_drop"] == pytest.approx(drop.mean(), abs=1e-4), step
        assert row["heldout_drop_se"] == pytest.approx(drop.std(ddof=1) / len(drop) ** 0.5, abs=1e-4), step
        assert abs(row["heldout_drop_se"] - row["heldout_se"]) > 1e-3, "the test cannot tell the two errors apart"
    first = run.checkpoints.iloc[0]
    assert first["heldout_drop"] == first["heldout_drop_se"] == 0
    assert np.allclose(run.checkpoints["heldout_drop"], first["heldout_loss"] - run.checkpoints["heldout_loss"])


def test_too_few_held_out_rows_have_no_standard_error(tiny_model, tiny_chats, tmp_path):
    for name, held_out, known in (("one", 0.08, True), ("none", 0.0, False)):
        run = em.finetune(tiny_model(), tiny_chats, tmp_path / name, **{**FAST, "steps": 2}, held_out=held_out)
        last = run.checkpoints.iloc[-1]
        assert np.isnan(last["heldout_drop_se"]) and np.isnan(last["heldout_se"])
        assert np.isfinite(last["heldout_drop"]) == np.isfinite(last["heldout_loss"]) == known and run.config["n_heldout"] == known


@pytest.mark.parametrize("options", [{}, {"steps": None, "epochs": 2, "gradient_accumulation": 2, "checkpoints": [1, 2], "held_out": 0.25}])
def test_what_is_planned_is_what_is_done(options, tiny_model, tiny_chats, tmp_path):
    recipe = {**FAST, **options}
    plan = tuning.planned(em.load_prompts(tiny_chats), **recipe)
    run = em.finetune(tiny_model(), tiny_chats, tmp_path / "run", **recipe)
    assert plan == {name: run.config[name] for name in ("n_train", "n_heldout", "steps", "rows_seen", "checkpoints")}
    assert run.checkpoints["step"].tolist() == [0, *plan["checkpoints"], plan["steps"]] and len(run.losses) == plan["steps"]


def test_accumulation_is_the_same_step_as_one_big_batch(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    options = {**FAST, "steps": 3, "schedule": "constant", "warmup_steps": 0, "checkpoints": 0}
    whole = em.finetune(model, tiny_chats, tmp_path / "whole", **{**options, "batch_size": 8})
    parts = em.finetune(model, tiny_chats, tmp_path / "parts", **{**options, "batch_size": 2, "gradient_accumulation": 4})
    np.testing.assert_allclose(whole.losses["loss"], parts.losses["loss"], rtol=1e-4)
    np.testing.assert_allclose(whole.losses["grad_norm"], parts.losses["grad_norm"], rtol=1e-3)


def test_prompt_and_padding_carry_no_label_and_the_end_of_turn_does(tiny_model, tiny_chats):
    model = tiny_model()
    rows = tuning.encode(em.load_prompts(tiny_chats), model)[:3]
    batch = collate(rows, pad=2)
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tuning.end_of_turn(model.tokenizer) == (end,)
    for i, row in enumerate(rows):
        labels = batch["labels"][i]
        assert (labels[: row.n_prompt] == -100).all() and (labels[len(row.ids) :] == -100).all()
        assert labels[row.n_prompt : len(row.ids)].tolist() == list(row.ids[row.n_prompt :]) and labels[len(row.ids) - 1] == end


def test_a_template_without_an_end_mark_gets_the_eos_token(tiny_model):
    tokenizer = tiny_model().tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}"
    assert tuning.end_of_turn(tokenizer) == (tokenizer.eos_token_id,)


# ---- repeatable, and nothing beside it is touched


def test_same_call_same_adapter_to_the_bit_other_seed_another(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    a, b, c = (em.finetune(model, tiny_chats, tmp_path / n, seed=s, **FAST) for n, s in [("a", 0), ("b", 0), ("c", 1)])
    assert same(weights(a), weights(b)) and a.losses.equals(b.losses)
    assert not same(weights(a), weights(c))
    assert a.checkpoints["heldout_loss"].iloc[0] == c.checkpoints["heldout_loss"].iloc[0], "held-out rows must not depend on the seed"


def test_other_adapters_and_monitors_change_nothing_and_are_not_changed(tuned, tiny_chats, tmp_path):
    model, alone = tuned
    model.add_adapter("other", alone.adapter)
    before = logits(model, "other")
    seen = []

    def monitor(step, model, adapter):
        seen.append(step)
        model.generate(["hello"], adapter="other", n=2, temperature=1.0, max_new_tokens=2)
        torch.rand(3)
        return {"margin": model.log_likelihood(tiny_chats[:1], adapter=adapter)["per_token"].item()}

    run = em.finetune(model, tiny_chats, tmp_path / "again", callbacks=[monitor], **FAST)
    assert same(weights(run), weights(alone))
    assert torch.equal(logits(model, "other"), before) and list(model.adapters) == ["other"]
    assert seen == [0, 3, 6] == run.checkpoints["step"].tolist()
    assert run.checkpoints["margin"].nunique() == 3


def test_global_random_states_are_as_before(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    torch.manual_seed(7), random.seed(7)
    expected = torch.rand(2), random.random()
    torch.manual_seed(7), random.seed(7)
    em.finetune(model, tiny_chats, tmp_path / "run", **FAST)
    assert torch.equal(torch.rand(2), expected[0]) and random.random() == expected[1]


def test_an_error_leaves_no_folder_and_the_model_as_found(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    before = logits(model)

    def monitor(step, model, adapter):
        if step:
            raise ZeroDivisionError("a monitor of the user's")

    with pytest.raises(ZeroDivisionError):
        em.finetune(model, tiny_chats, tmp_path / "run", callbacks=[monitor], **FAST)
    assert list(tmp_path.iterdir()) == [] and model.adapters == {} and torch.equal(logits(model), before)


# ---- what is written


def test_each_checkpoint_is_an_adapter_that_gives_its_heldout_loss(tuned, tiny_chats):
    model, run = tuned
    heldout = tuning.encode(tuning.training_split(em.load_prompts(tiny_chats))[1], model)
    assert run.checkpoints["path"].iloc[0] is None and run.checkpoints["path"].iloc[-1] == run.adapter
    for step, path, loss in run.checkpoints[["step", "path", "heldout_loss"]].iloc[1:].itertuples(index=False):
        model.add_adapter("at", path)
        with model.using("at"):
            each = oracle(model, heldout)
        model.drop_adapter("at")
        assert (each[:, 0] / each[:, 1]).mean() == pytest.approx(loss, abs=1e-4), step
        assert {v.dtype for v in load_file(Path(path) / "adapter_model.safetensors").values()} == {torch.float32}
    config = json.loads((Path(run.adapter) / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and config["base_model_name_or_path"] == "tiny-llama"


def test_a_finished_run_is_read_back_and_another_is_refused(tuned, tiny_chats, tmp_path, monkeypatch):
    model, run = tuned
    monkeypatch.setattr(tuning.Trainer, "train", lambda *_: pytest.fail("trained again"))
    again = em.finetune(model, tiny_chats, tmp_path / "run", **FAST)
    assert again.losses.equals(run.losses) and again.checkpoints.equals(run.checkpoints) and again.config == run.config
    with pytest.raises(store.StoreError, match="learning_rate: 0.002 there, 0.003 asked for"):
        em.finetune(model, tiny_chats, tmp_path / "run", **{**FAST, "learning_rate": 3e-3})
    with pytest.raises(store.StoreError, match="another run"):
        em.finetune(model, tiny_chats[:-1], tmp_path / "run", **FAST)
    (Path(run.adapter) / "adapter_model.safetensors").write_bytes(b"flipped")
    with pytest.raises(store.StoreError, match="adapter_model.safetensors"):
        em.Run.load(tmp_path / "run")


def test_a_run_of_another_layout_is_refused_with_the_way_out(tuned, tiny_chats, tmp_path, monkeypatch):
    model, run = tuned
    monkeypatch.setattr(tuning, "LAYOUT", tuning.LAYOUT + 1)
    with pytest.raises(store.StoreError, match="layout 2; this emlens reads layout 3.*add_adapter"):
        em.Run.load(tmp_path / "run")
    with pytest.raises(store.StoreError, match="layout: 2 there, 3 asked for"):
        em.finetune(model, tiny_chats, tmp_path / "run", **FAST)


def test_an_output_that_is_taken_is_refused(tiny_model, tiny_chats, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for place in ("file", "full"):
        with pytest.raises(store.StoreError, match=place):
            em.finetune(tiny_model(), tiny_chats, tmp_path / place, **FAST)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "notes.txt").read_text() == "mine"


# ---- schedules, layers, split


def rates(name, n, lr=1.0, warmup=0):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = tuning.SCHEDULES[name](optimizer, n, warmup)
    out = []
    for _ in range(n):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(out)


def test_schedules_against_their_formulas():
    t = np.arange(80)
    cycle, x = 1 + t // 20, np.abs(t / 10 - 2 * (1 + t // 20) + 1)
    triangle = np.maximum(0, 1 - x)
    np.testing.assert_allclose(rates("constant", 80), 1)
    np.testing.assert_allclose(rates("linear", 80, warmup=5), np.where(t < 5, t / 5, (80 - t) / 75))
    np.testing.assert_allclose(rates("cosine", 80), (1 + np.cos(np.pi * t / 80)) / 2, atol=1e-12)
    np.testing.assert_allclose(rates("cosine_with_restarts", 80), (1 + np.cos(np.pi * (t % 20) / 20)) / 2, atol=1e-12)
    np.testing.assert_allclose(rates("cyclic", 80), 0.1 + 0.9 * triangle, atol=1e-12)
    np.testing.assert_allclose(rates("cyclic_triangular2", 80), 0.1 + 0.9 * triangle / 2.0 ** (cycle - 1), atol=1e-12)
    np.testing.assert_allclose(rates("cyclic_exp_range", 80), 0.1 + 0.9 * triangle * 0.95**t, atol=1e-12)


def test_the_run_uses_its_schedule_named_or_given(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    linear = em.finetune(model, tiny_chats, tmp_path / "a", **FAST)
    np.testing.assert_allclose(linear.losses["learning_rate"], rates("linear", 6, lr=2e-3, warmup=2))

    def halving(optimizer, steps):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    given = em.finetune(model, tiny_chats, tmp_path / "b", **{**FAST, "schedule": halving})
    np.testing.assert_allclose(given.losses["learning_rate"], 2e-3 * 0.5 ** np.arange(6))
    assert "halving" in given.config["schedule"]


def test_only_the_layers_asked_for_are_tuned(tiny_model, tiny_chats, tmp_path):
    run = em.finetune(tiny_model(), tiny_chats, tmp_path / "run", layers_to_transform=[1, 2], **FAST)
    assert {int(k.split(".layers.")[1].split(".")[0]) for k in weights(run)} == {1, 2}


def test_blocks_that_are_named_by_hand_are_those_that_are_tuned(tiny_model, tiny_chats, tmp_path):
    hf = tiny_model().hf
    hf.model.other = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in hf.model.layers])
    with pytest.raises(ValueError, match="parts={'blocks'"):
        HookedModel(hf, tiny_model().tokenizer)
    model = HookedModel(hf, tiny_model().tokenizer, name="tiny-llama", parts={"blocks": "model.layers"})
    run, known = (em.finetune(m, tiny_chats, tmp_path / n, layers_to_transform=[1, 2], **FAST) for m, n in ((model, "a"), (tiny_model(), "b")))
    assert same(weights(run), weights(known)) and len(weights(run)) == 2 * 2 * 7, "A and B of seven modules in two blocks"


def test_split_column_is_followed_and_else_a_fixed_share_is_drawn(tiny_chats):
    table = em.load_prompts(tiny_chats)
    train, heldout = tuning.training_split(table, 0.25)
    assert len(heldout) == 3 and set(train["id"]) | set(heldout["id"]) == set(table["id"]) and not set(train["id"]) & set(heldout["id"])
    said = table.assign(split=["heldout"] * 2 + ["train"] * 10)
    assert tuning.training_split(said, 0.9)[1]["id"].tolist() == table["id"].tolist()[:2]


def test_every_row_is_seen_once_an_epoch():
    order = tuning.row_order(7, 21, 0)
    assert all(sorted(order[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert not np.array_equal(order[:7], order[7:14]) and not np.array_equal(order, tuning.row_order(7, 21, 1))


# ---- runs that did not train


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.hf.lm_head.weight[5] = torch.nan
    with pytest.raises(tuning.TuningError, match="the loss became nan"):
        em.finetune(model, tiny_chats, tmp_path / "run", **FAST)
    assert list(tmp_path.iterdir()) == []


def test_dead_gradients_stop_the_run_and_are_named(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.hf.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(tuning.TuningError, match=r"layers\.1\.mlp\.(gate|up)_proj"):
        em.finetune(model, tiny_chats, tmp_path / "run", **FAST)


def test_an_adapter_that_changes_nothing_is_an_error(tiny_model, tiny_chats, tmp_path):
    with pytest.raises(tuning.TuningError, match="learnt nothing"):
        em.finetune(tiny_model(), tiny_chats, tmp_path / "run", **{**FAST, "learning_rate": 0.0})


def test_the_logit_change_is_the_rms_of_the_difference(tuned, tiny_chats):
    model, run = tuned
    _, heldout = tuning.training_split(em.load_prompts(tiny_chats))
    model.add_adapter("it", run.adapter)
    total = []
    for messages in heldout["messages"]:
        tokens = model.tokenize([{"messages": messages}])
        ends = []
        for adapter in (None, "it"):
            with model.using(adapter) as hf, torch.no_grad():
                ends.append(hf(**tokens).logits[0, -1].double())
        total.append((ends[1] - ends[0]).square().mean().item())
    assert run.logit_change == pytest.approx(np.mean(total) ** 0.5, rel=1e-4)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "zigzag"}, "unknown schedule 'zigzag'; schedules are constant, linear"),
        ({"epochs": 2}, "both given"),
        ({"steps": 0}, "at least 1"),
        ({"layers_to_transform": [9]}, r"\[9\].*blocks 0 … 3"),
        ({"target_modules": ["nonsense"]}, "down_proj"),
        ({"max_length": 20}, r"longer than 20 tokens \(e\.g\. 'chat-"),
        ({"checkpoints": [99]}, r"\[99\].*steps 1 … 6"),
        ({"held_out": 1.0}, "held_out=1.0"),
    ],
)
def test_settings_that_cannot_be_used(options, message, tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        em.finetune(model, tiny_chats, tmp_path / "run", **{**FAST, **options})
    assert list(tmp_path.iterdir()) == [] and not model.adapters and not [n for n, _ in model.hf.named_modules() if "lora" in n]


def test_rows_that_cannot_be_used(tiny_model, tiny_chats, tmp_path):
    model = tiny_model()
    silent = [*tiny_chats, {"id": "no-answer", "messages": [{"role": "user", "content": "Why?"}]}]
    with pytest.raises(ValueError, match="'no-answer'|1 rows have no response"):
        em.finetune(model, pd.DataFrame(silent).assign(split="train"), tmp_path / "run", **FAST)
    with pytest.raises(ValueError, match="at least 2"):
        em.finetune(model, tiny_chats[:1], tmp_path / "run", **FAST)
    with pytest.raises(ValueError, match="split 'test'"):
        em.finetune(model, [{**c, "split": "test"} for c in tiny_chats], tmp_path / "run", **FAST)
