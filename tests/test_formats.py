"""Guards the files of others: which block a row belongs to, read and written, held against a model's own hidden states and bare hooks; what such
files cannot hold is refused."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from emlens import formats
from emlens.activations import Activations
from emlens.formats import from_hidden_states, read_persona, read_questions, to_hidden_states, write_persona, write_questions

N_LAYERS, D = 4, 8
TEXTS = ["Why?", "How does one bake bread?", "Who was it"]
IDS = ["fpq.why", "fpq.bread", "fpq.who"]


class Seen:
    """What a bare Llama lets through, by transformers' own hidden states and by hooks on its modules (one prompt after the other)."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": D, "intermediate_size": 12, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=128, max_position_embeddings=64, initializer_range=0.5, **sizes)
        model = LlamaForCausalLM(config).eval()
        now: dict[Any, torch.Tensor] = {}

        def keep(name: Any) -> Callable[..., None]:
            def hook(_: Any, inputs: Any, output: Any = None) -> None:
                now[name] = (inputs if output is None else output if isinstance(output, tuple) else (output,))[0][0]

            return hook

        model.model.norm.register_forward_hook(keep("final_norm"))
        for i, block in enumerate(model.model.layers):
            block.register_forward_pre_hook(keep(("resid_pre", i)))
            block.register_forward_hook(keep(("resid_post", i)))
            block.self_attn.register_forward_hook(keep(("attn_out", i)))
            block.mlp.register_forward_hook(keep(("mlp_out", i)))
        self.states, self.hooked, self.n_prompt = [], [], []
        for text in TEXTS:
            ids = torch.tensor([[ord(c) for c in text]])
            with torch.no_grad():
                out = model(ids, output_hidden_states=True)
            self.states.append(torch.stack([h[0] for h in out.hidden_states]))
            self.hooked.append(dict(now))
            self.n_prompt.append(len(text) - 1)

    def at(self, name: Any, prompt: int, position: str) -> torch.Tensor:
        """Row of one place, taken from the hooks."""
        x = self.hooked[prompt]
        if isinstance(name, tuple) and name[0] == "resid_mid":
            return pooled(x["resid_pre", name[1]] + x["attn_out", name[1]], self.n_prompt[prompt])[position]
        return pooled(x[("resid_pre", 0) if name == "embed" else name], self.n_prompt[prompt])[position]

    def rows(self, name: Any, position: str) -> np.ndarray:
        return np.stack([self.at(name, p, position).numpy() for p in range(len(TEXTS))])


def pooled(x: torch.Tensor, n_prompt: int) -> dict[str, torch.Tensor]:
    return {"last": x[n_prompt - 1], "mean_all": x[:n_prompt].mean(dim=0), "mean_response": x[n_prompt:].mean(dim=0)}


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


def acts_of(seen: Seen, site: str, layers: Any, position: str = "last") -> Activations:
    names = [site if site in ("embed", "final_norm") else (site, i) for i in layers]
    values = np.stack([seen.rows(name, position) for name in names], axis=1)
    facts = {"id": IDS, "text": TEXTS, "n_tokens": seen.n_prompt}
    return Activations.from_array(values, facts, layers, site, position)


def recorded(seen: Seen, position: str = "last") -> dict[str, Activations]:
    """As ``model.record`` gives them: every block, the last one before the final norm."""
    found = {site: acts_of(seen, site, range(N_LAYERS), position) for site in ("attn_out", "resid_mid", "mlp_out", "resid_post")}
    return {**found, **{site: acts_of(seen, site, [0], position) for site in ("embed", "final_norm")}}


# ---- hidden states and persona rows


def test_hidden_states_are_named_by_the_blocks_they_come_from(seen: Seen) -> None:
    stack = np.stack([states[:, n - 1].numpy() for states, n in zip(seen.states, seen.n_prompt, strict=True)])
    parts = from_hidden_states(stack)
    assert {site: layers for site, (_, layers) in parts.items()} == {"embed": (0,), "resid_post": tuple(range(N_LAYERS - 1)), "final_norm": (0,)}
    for site, acts in recorded(seen).items():
        if site in parts:
            np.testing.assert_array_equal(parts[site][0], acts.values[:, : len(parts[site][1])])
    last = recorded(seen)["resid_post"].layer(N_LAYERS - 1)
    assert np.abs(parts["final_norm"][0][:, 0] - last).max() > 0.1, "the last state would not be told from the stream before the norm"
    np.testing.assert_array_equal(to_hidden_states(recorded(seen), N_LAYERS), stack)


def as_they_save(seen: Seen, position: str) -> torch.Tensor:
    """[prompt, L+1, d_model] by the recipe of the persona vectors' own script: pool every entry of ``hidden_states``."""
    return torch.stack([torch.stack([pooled(s, n)[position] for s in states]) for states, n in zip(seen.states, seen.n_prompt, strict=True)])


@pytest.mark.parametrize(("theirs", "ours"), [("prompt_avg", "mean_all"), ("response_avg", "mean_response"), ("prompt_last", "last")])
def test_a_persona_vector_is_read_at_its_blocks(theirs: str, ours: str, seen: Seen, tmp_path: Path) -> None:
    rows = as_they_save(seen, ours)
    path = tmp_path / f"evil_{theirs}_diff.pt"
    torch.save((rows[0] - rows[1]).half(), path)
    found = read_persona(path)
    assert {a.position for a in found.values()} == {ours} and list(found["embed"].ids) == [path.stem]
    assert found["resid_post"].layers == (0, 1, 2) and found["resid_post"].meta["n_layers"] == N_LAYERS
    for name, got in [("embed", found["embed"].layer(0)), ("final_norm", found["final_norm"].layer(0))] + [
        (("resid_post", i), found["resid_post"].layer(i)) for i in range(N_LAYERS - 1)
    ]:
        wanted = seen.rows(name, ours)
        np.testing.assert_allclose(got[0], wanted[0] - wanted[1], atol=1e-2)
        wrong = seen.rows(("resid_post", 3 if name == ("resid_post", 2) else 2), ours)
        assert np.abs(got[0] - (wrong[0] - wrong[1])).max() > 0.1, "another block would pass too"


def test_rows_of_many_prompts_are_read_too_and_written_rows_are_theirs(seen: Seen, tmp_path: Path) -> None:
    rows = as_they_save(seen, "mean_all")
    torch.save(rows, tmp_path / "evil_pos_activation_matrix.pt")
    found = read_persona(tmp_path / "evil_pos_activation_matrix.pt", position="mean_all", ids=IDS)
    np.testing.assert_array_equal(found["resid_post"].layer(1), seen.rows(("resid_post", 1), "mean_all"))
    write_persona(tmp_path / "again.pt", found, N_LAYERS)
    assert torch.equal(torch.load(tmp_path / "again.pt", weights_only=True), rows)
    write_persona(tmp_path / "recorded.pt", recorded(seen, "mean_all"), N_LAYERS)
    assert torch.equal(torch.load(tmp_path / "recorded.pt", weights_only=True), rows)


def test_one_prompt_is_written_as_a_vector_and_prompts_are_paired_by_id(seen: Seen, tmp_path: Path) -> None:
    acts = recorded(seen)
    crossed = {**acts, "resid_post": acts["resid_post"][::-1], "final_norm": acts["final_norm"][[1, 2, 0]]}
    assert np.array_equal(to_hidden_states(crossed, N_LAYERS), to_hidden_states(acts, N_LAYERS))
    path = write_persona(tmp_path / "evil_prompt_last_diff.pt", {site: a[1] for site, a in acts.items()}, N_LAYERS)
    saved = torch.load(path, weights_only=True)
    assert saved.shape == (N_LAYERS + 1, D) and saved.dtype == torch.float32
    assert torch.equal(saved, seen.states[1][:, seen.n_prompt[1] - 1])


def test_one_block_has_no_resid_post_in_such_a_file(tmp_path: Path) -> None:
    torch.save(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), tmp_path / "a_prompt_last_diff.pt")
    found = read_persona(tmp_path / "a_prompt_last_diff.pt")
    assert list(found) == ["embed", "final_norm"] and found["final_norm"].values.tolist() == [[[3.0, 4.0]]]


def test_what_does_not_make_hidden_states_is_refused(seen: Seen, tmp_path: Path) -> None:
    acts = recorded(seen)
    for changed, words in [
        ({k: v for k, v in acts.items() if k != "final_norm"}, r"final_norm is missing: .*the last one after the final norm.*site='final_norm'"),
        ({**acts, "resid_post": acts["resid_post"].select(layers=[0, 2])}, r"resid_post is missing at layers \[1\]"),
        ({**acts, "final_norm": acts["final_norm"][:2]}, "final_norm is of other prompts than embed"),
        ({**acts, "final_norm": recorded(seen, "mean_all")["final_norm"]}, "final_norm.*mean_all.*does not go with embed.*last"),
    ]:
        with pytest.raises(ValueError, match=words):
            write_persona(tmp_path / "a.pt", changed, N_LAYERS)
    with pytest.raises(ValueError, match=r"resid_post is missing at layers \[4\]"):
        write_persona(tmp_path / "a.pt", acts, N_LAYERS + 2)
    with pytest.raises(ValueError, match="the name evil_prompt_avg_diff.pt says position 'mean_all', the activations are of 'last'"):
        write_persona(tmp_path / "evil_prompt_avg_diff.pt", acts, N_LAYERS)
    with pytest.raises(ValueError, match=r"end in .pt; got 'a.safetensors'"):
        write_persona(tmp_path / "a.safetensors", acts, N_LAYERS)
    with pytest.raises(ValueError, match="1 hidden states: L . 1 are needed"):
        from_hidden_states(np.zeros((2, 1, 3)))
    assert list(tmp_path.iterdir()) == []


def test_only_tensors_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "evil_prompt_last_diff.pt"
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ran,))

    for content in (Trap(), {"a": Trap()}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="is refused: it holds more than tensors"):
            read_persona(path)
    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ValueError, match="is refused"):
        read_persona(path)
    assert not ran.exists()
    for content, words in [
        (torch.arange(6).reshape(2, 3), "holds Tensor where a tensor of floats is needed"),
        ([1.0, 2.0], "holds list where a tensor of floats"),
        (torch.ones(3), r"holds shape \(3,\); needed is \[L\+1, d_model\]"),
        (torch.full((3, 2), torch.inf), "NaN or Inf"),
    ]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=words):
            read_persona(path)
    torch.save(torch.ones(3, 2), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged or no .pt file"):
        read_persona(path)
    torch.save(torch.ones(3, 2), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt does not say its position \(prompt_avg, response_avg, prompt_last\)"):
        read_persona(tmp_path / "evil.pt")
    assert read_persona(tmp_path / "evil.pt", position="mean")["embed"].position == "mean"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_persona(tmp_path / "absent.pt")


# ---- one file per question


def as_the_paper_saves(seen: Seen, prompt: int, numbers: list[int], completion: str | None) -> dict[str, Any]:
    """By the paper's recipe: blocks counted from 1, ``mlp_post_resid`` from ``hidden_states[i]``, the rest from hooks; float16."""
    x, n = seen.hooked[prompt], seen.n_prompt[prompt]

    def pool(rows: torch.Tensor) -> dict[str, torch.Tensor | None]:
        rows = rows.half()
        after = rows[n:].mean(dim=0) if completion is not None else None
        return {"last_prompt_token": rows[n - 1], "mean_prompt": rows[:n].mean(dim=0), "mean_completion": after}

    kinds = {
        "attn_pre_resid": lambda i: x["attn_out", i - 1],
        "attn_post_resid": lambda i: x["resid_pre", i - 1] + x["attn_out", i - 1],
        "mlp_pre_resid": lambda i: x["mlp_out", i - 1],
        "mlp_post_resid": lambda i: seen.states[prompt][i],
    }
    pooled_all = {kind: {f"layer_{i:02d}": pool(rows(i)) for i in numbers} for kind, rows in kinds.items()}
    said = {"messages": [{"role": "user", "content": TEXTS[prompt]}], "sample_id": f"first_plot_questions_{prompt:02d}", "question_id": IDS[prompt]}
    text = {} if completion is None else {"completion": completion}
    return {**said, **text, "activations": {"pooled": pooled_all, "prompt_len": n, "total_len": len(TEXTS[prompt])}}


def save_as_the_paper(seen: Seen, folder: Path, numbers: list[int], completion: str | None = None) -> Path:
    folder.mkdir(parents=True)
    for p, name in enumerate(IDS):
        torch.save(as_the_paper_saves(seen, p, numbers, completion), folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("position", ["last", "mean_all", "mean_response"])
def test_the_papers_files_are_read_at_their_blocks(position: str, seen: Seen, tmp_path: Path) -> None:
    folder = save_as_the_paper(seen, tmp_path / "prompt_generated_completion", [2, 4], completion="Because.")
    found = read_questions(folder, n_layers=N_LAYERS, position=position)
    assert {site: a.layers for site, a in found.items()} == {
        "attn_out": (1, 3), "resid_mid": (1, 3), "mlp_out": (1, 3), "resid_post": (1,), "final_norm": (0,)
    }  # fmt: skip
    true = recorded(seen, position)
    for site, acts in found.items():
        wanted = true[site].select(layers=acts.layers, ids=acts.ids)
        np.testing.assert_allclose(acts.values, wanted.values, atol=1e-2)
        assert acts.place == wanted.place and acts.meta["dtype"] == "float16" and acts.values.dtype == np.float32
        for layer in set(range(N_LAYERS)) - set(acts.layers) if site != "final_norm" else ():
            assert np.abs(acts.layer(acts.layers[0]) - true[site].select(ids=acts.ids).layer(layer)).max() > 0.1, "another block would pass too"
    facts = found["final_norm"].facts.set_index("id")
    assert list(facts.index) == sorted(IDS) and facts.loc[IDS, "text"].tolist() == TEXTS and facts.loc[IDS, "n_tokens"].tolist() == seen.n_prompt
    assert facts.loc["fpq.bread", "sample_id"] == "first_plot_questions_01" and set(facts["response"]) == {"Because."}
    after, before = found["resid_post"], acts_of(seen, "resid_post", [1], position)
    assert np.abs((after - before).values).max() < 1e-2, "read from files and recorded here, paired by id"


def test_without_a_completion_there_is_no_response(seen: Seen, tmp_path: Path) -> None:
    folder = save_as_the_paper(seen, tmp_path / "prompt_only", [1])
    assert "response" not in read_questions(folder, N_LAYERS)["resid_post"].facts
    with pytest.raises(ValueError, match="holds nothing at 'mean_completion': it was made without a completion"):
        read_questions(folder, N_LAYERS, "mean_response")


def test_the_number_of_blocks_decides_what_is_after_the_norm(seen: Seen, tmp_path: Path) -> None:
    folder = save_as_the_paper(seen, tmp_path / "a", [3, 4])
    assert set(read_questions(folder, N_LAYERS)) - set(read_questions(folder, N_LAYERS + 1)) == {"final_norm"}
    assert read_questions(folder, N_LAYERS + 1)["resid_post"].layers == (2, 3)
    with pytest.raises(ValueError, match=r"holds layer_04; a model of 3 blocks has layers 1 … 3 there"):
        read_questions(folder, 3)


@pytest.mark.parametrize("position", ["last", "mean_all", "mean_response"])
def test_written_files_are_the_papers(position: str, seen: Seen, tmp_path: Path) -> None:
    """Written here and read with nothing but their own keys; every number at its own block."""
    acts = recorded(seen, position)
    given = [a[::-1] if i % 2 else a for i, a in enumerate(acts[s] for s in ("final_norm", "attn_out", "resid_mid", "mlp_out", "resid_post"))]
    paths = write_questions(tmp_path / "prompt_only", given, N_LAYERS)
    assert [p.name for p in paths] == [f"{name}.pt" for name in IDS]
    theirs = {"last": "last_prompt_token", "mean_all": "mean_prompt", "mean_response": "mean_completion"}[position]
    for p, path in enumerate(paths):
        wrote, would = torch.load(path, weights_only=True), as_the_paper_saves(seen, p, [1, 2, 3, 4], completion="x")
        assert wrote["messages"] == would["messages"] and wrote["question_id"] == IDS[p]
        assert wrote["activations"]["prompt_len"] == would["activations"]["prompt_len"]
        found, wanted = wrote["activations"]["pooled"], would["activations"]["pooled"]
        assert {kind: sorted(layers) for kind, layers in found.items()} == {kind: sorted(layers) for kind, layers in wanted.items()}
        for kind, layers in found.items():
            for layer, at in layers.items():
                assert set(at) == set(wanted[kind][layer]) and [name for name, row in at.items() if row is not None] == [theirs]
                torch.testing.assert_close(at[theirs], wanted[kind][layer][theirs].float(), atol=1e-2, rtol=0)
    again = read_questions(tmp_path / "prompt_only", N_LAYERS, position)
    for site, a in again.items():
        np.testing.assert_array_equal(a.values, acts[site].select(layers=a.layers, ids=a.ids).values)


def test_several_positions_and_a_response_go_into_one_file(seen: Seen, tmp_path: Path) -> None:
    facts = pd.DataFrame({"id": IDS, "response": ["Because.", np.nan, "It was."], "messages": [[{"role": "system", "content": t}] for t in TEXTS]})
    acts = [acts_of(seen, "resid_post", [0, 2], position).with_facts(facts) for position in ("last", "mean_response")]
    write_questions(tmp_path, acts, N_LAYERS)
    for position, a in zip(("last", "mean_response"), acts, strict=True):
        (found,) = read_questions(tmp_path, N_LAYERS, position).values()
        np.testing.assert_array_equal(found.values, a.select(ids=found.ids).values)
    one = torch.load(tmp_path / "fpq.why.pt", weights_only=True)
    assert one["completion"] == "Because." and one["messages"] == [{"role": "system", "content": "Why?"}] and one["activations"]["total_len"] is None
    assert "completion" not in torch.load(tmp_path / "fpq.bread.pt", weights_only=True)


def test_what_the_papers_files_cannot_hold_is_refused(seen: Seen, tmp_path: Path) -> None:
    acts = recorded(seen)
    bad_id = replace(acts["mlp_out"], facts=acts["mlp_out"].facts.assign(id=["a", "../b", "c"]))
    for given, words in [
        ([acts["resid_post"]], "their mlp_post_resid at layer 4 is after the final norm, resid_post at layer 3 before it"),
        ([acts["embed"]], "no place for embed"),
        ([replace(acts["mlp_out"], place=replace(acts["mlp_out"].place, position="first_response"))], "no place for mlp_out.*first_response"),
        ([acts["mlp_out"], acts["attn_out"][:2]], "attn_out is of other prompts than mlp_out"),
        ([bad_id], r"prompt id '../b' cannot name a file"),
        ([], "nothing to write"),
    ]:
        with pytest.raises(ValueError, match=words):
            write_questions(tmp_path / "a", given, N_LAYERS)
    with pytest.raises(ValueError, match=r"layers \[2, 3\] are outside the 2 blocks"):
        write_questions(tmp_path / "a", [acts["mlp_out"]], 2)
    assert not (tmp_path / "a").exists()
    write_questions(tmp_path / "a", [acts["resid_post"].select(layers=[0, 1, 2])], N_LAYERS)


def test_other_layouts_are_refused_by_name(seen: Seen, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no .pt file in"):
        read_questions(tmp_path, N_LAYERS)
    folder = save_as_the_paper(seen, tmp_path / "a", [2])
    with pytest.raises(ValueError, match="such files hold positions last, mean_all, mean_response; asked for was 'first_response'"):
        read_questions(folder, N_LAYERS, "first_response")
    path, good = folder / "fpq.who.pt", as_the_paper_saves(seen, 2, [2], None)
    for damaged, words in [
        ({k: v for k, v in good.items() if k != "messages"}, r"fpq.who.pt has another layout \(KeyError: 'messages'\)"),
        (torch.ones(3), "fpq.who.pt has another layout"),
        (as_the_paper_saves(seen, 2, [1, 2], None), "fpq.who.pt holds other types or layers than fpq.bread.pt"),
        ({**good, "question_id": "fpq.why"}, "duplicate prompt id 'fpq.why'"),
    ]:
        torch.save(damaged, path)
        with pytest.raises(ValueError, match=words):
            read_questions(folder, N_LAYERS)
    good["activations"]["pooled"] = {"mlp_resid": good["activations"]["pooled"]["mlp_post_resid"]}
    for file in folder.glob("*.pt"):
        file.unlink()
    torch.save(good, path)
    with pytest.raises(ValueError, match=r"holds 'mlp_resid' at 'layer_02'; known are attn_pre_resid"):
        read_questions(folder, N_LAYERS)


def test_a_full_disk_leaves_no_half_file(seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(formats.store.StoreError, match="the disk is full"):
        write_persona(tmp_path / "a.pt", recorded(seen), N_LAYERS)
    assert list(tmp_path.iterdir()) == []
