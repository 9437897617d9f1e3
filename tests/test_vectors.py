"""Guards the files of directions: which block a row belongs to, held against the libraries that own the formats and bare hooks on a model;
files that are damaged, transposed, of another model or one row off are refused."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import reference
import tiny
import torch
from safetensors.numpy import load_file, save_file

from emlens import vectors
from emlens.directions import Direction
from emlens.models import HookedModel
from emlens.vectors import LeftOutWarning, Shape

L, D = 4, 32
IDS = [3, 14, 15, 92, 65, 35]
NAMES = {"d.safetensors": (0, 1, 2, 3), "evil_response_avg_diff.pt": (0, 1, 2), "d.gguf": (1, 2, 3), "d.npy": (0, 1, 2, 3), "d.npz": (0, 1, 2, 3)}
"""A file of each format, and the blocks of four that it has a place for."""


def evil(seed: int = 0) -> Direction:
    rows = np.random.default_rng(seed).normal(size=(L, D)) * np.array([[0.3], [7], [100], [2]])
    meta = {"architecture": f"LlamaForCausalLM {L}×{D}", "position": "mean_response", "n": 3}
    return Direction.from_array(rows, name="naïve", meta=meta)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    d = evil()
    out = {}
    for name, layers in NAMES.items():
        if len(layers) < L:
            with pytest.warns(LeftOutWarning, match=f"leaves layer {({*range(L)} - {*layers}).pop()} out"):
                out[name] = d.save(tmp_path / name)
        else:
            out[name] = d.save(tmp_path / name)
    return out


def hooked_logits(hf, block: int, added: torch.Tensor) -> torch.Tensor:
    """Logits with a vector added to what a block puts out, by a bare hook."""

    def add(_, __, out):
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    handle = reference.blocks(hf)[block].register_forward_hook(add)
    found = reference.logits(hf, IDS).detach()
    handle.remove()
    return found


def steered_logits(model: HookedModel, direction: Direction, layer: int) -> torch.Tensor:
    with model.steer(direction, layer, 0.5):
        return reference.logits(model.hf, IDS).detach()


# ---- what is written


@pytest.mark.parametrize("name", NAMES)
def test_a_written_and_read_direction_steers_to_the_very_same_logits(name: str, saved: dict[str, Path], llama: HookedModel) -> None:
    d, back = evil(), Direction.load(saved[name], like=llama)
    assert back.layers == NAMES[name] and back.site == "resid_post"
    plain = reference.logits(llama.hf, IDS)
    for i in back.layers:
        logits = steered_logits(llama, back, i)
        assert torch.equal(logits, steered_logits(llama, d, i)) and not torch.allclose(logits, plain, atol=1e-3)
        assert np.array_equal(back.layer(i), d.layer(i)) and back.norms[back.layers.index(i)] == d.norms[i]
        others = [steered_logits(llama, Direction(d.vectors[[j]], (i,)), i) for j in range(L) if j != i]
        assert not any(torch.allclose(logits, other, atol=1e-3) for other in others), "a row read one off would not be seen"


def raw(path: Path, block: int) -> torch.Tensor:
    """The vector that the libraries which own the formats find for a block."""
    if path.suffix == ".gguf":
        return torch.tensor(next(t.data for t in gguf.GGUFReader(path).tensors if t.name == f"direction.{block}"))
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)[block + 1]
    if path.suffix == ".npz":
        with np.load(path) as found:
            return torch.tensor(found["vectors"][found["layers"].tolist().index(block)])
    return torch.tensor(np.load(path)[block])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "d.safetensors"])
def test_the_file_itself_added_by_a_bare_hook_does_the_same(name: str, saved: dict[str, Path], llama: HookedModel) -> None:
    """llama.cpp adds direction.<il> after block il, persona code row l after block l − 1: steering at our layer is that."""
    back, norms = Direction.load(saved[name]), llama.residual_norms()
    for i in back.layers:
        vector = raw(saved[name], i)
        assert np.isclose(float(vector.norm()), float(evil().norms[i]), rtol=1e-5), "files hold vectors × lengths"
        by_hand = hooked_logits(llama.hf, i, 0.5 * float(norms[i]) * vector / vector.norm())
        assert torch.allclose(steered_logits(llama, back, i), by_hand, atol=1e-4)
        other = hooked_logits(llama.hf, (i + 1) % L, 0.5 * float(norms[i]) * vector / vector.norm())
        assert not torch.allclose(by_hand, other, atol=1e-2)


def test_a_control_vector_is_what_the_gguf_package_and_llama_cpp_read(saved: dict[str, Path]) -> None:
    reader = gguf.GGUFReader(saved["d.gguf"])
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "controlvector" and said["controlvector.model_hint"] == "llama" and said["controlvector.layer_count"] == 3
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2", "direction.3"], "llama.cpp refuses any other tensor, and layer 0"
    d = evil()
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.shape.tolist() == [D]
        i = int(tensor.name.split(".")[1])
        assert np.allclose(tensor.data, d.layer(i) * d.norms[i], rtol=1e-6)
    back = Direction.load(saved["d.gguf"])
    assert (back.name, back.meta) == (d.name, d.meta)


def test_a_persona_file_has_a_row_for_every_hidden_state(saved: dict[str, Path]) -> None:
    found, d = torch.load(saved["evil_response_avg_diff.pt"], weights_only=True), evil()
    assert found.dtype == torch.float32 and found.shape == (L + 1, D)
    assert not found[0].any() and not found[L].any(), "embeddings and the final norm: nothing is known"
    assert np.allclose(found[1:L].numpy(), d.vectors[: L - 1] * d.norms[: L - 1, None], rtol=1e-6)
    back = Direction.load(saved["evil_response_avg_diff.pt"])
    assert back.name == "evil" and back.meta["position"] == "mean_response" and back.meta["n_layers"] == L and not back.meta["left_out"]


def test_few_layers_leave_zeros_and_the_number_of_blocks_must_be_known(tmp_path: Path) -> None:
    some = Direction.from_array(np.random.default_rng(1).normal(size=(2, 8)), layers=(3, 1))
    for name in ("s.npy", "s.pt"):
        with pytest.raises(ValueError, match=r"how many has it\? save\(path, n_layers="):
            some.save(tmp_path / name)
        with pytest.raises(ValueError, match=r"layers \[3, 1\], a model of 3 blocks"):
            some.save(tmp_path / name, n_layers=3)
        back = Direction.load(some.save(tmp_path / name, n_layers=6), like=Shape(8, 6))
        assert back.layers == (1, 3) and np.array_equal(back.layer(3), some.layer(3)) and np.array_equal(back.layer(1), some.layer(1))
    assert np.flatnonzero(np.load(tmp_path / "s.npy").any(axis=1)).tolist() == [1, 3] and len(np.load(tmp_path / "s.npy")) == 6
    for name in ("s.gguf", "s.npz", "s.safetensors"):
        back = Direction.load(some.save(tmp_path / name))
        assert back.layers == (3, 1) and np.array_equal(back.vectors, some.vectors) and np.array_equal(back.norms, some.norms)


def test_what_a_format_has_no_word_for_is_refused(tmp_path: Path) -> None:
    attention = Direction.from_array(np.eye(2, 8), site="attn_out", meta={"n_layers": 4})
    for name in ("a.gguf", "a.pt", "a.npy"):
        with pytest.raises(ValueError, match=r"hold directions of resid_post; this one is of attn_out: save it as \.safetensors"):
            attention.save(tmp_path / name)
    for name in ("a.npz", "a.safetensors"):
        assert Direction.load(attention.save(tmp_path / name)).site == "attn_out"
    for name, layer in (("b.gguf", 0), ("b.pt", 3)):
        with pytest.raises(ValueError, match=f"would be empty: .* no place for layer {layer}"):
            Direction.from_array(np.eye(1, 8), layers=(layer,)).save(tmp_path / name, n_layers=4)
    with pytest.raises(ValueError, match="says position 'last', the activations are of 'mean_response'"):
        evil().save(tmp_path / "evil_prompt_last_diff.pt", n_layers=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.safetensors"]


def test_every_row_that_was_normalised_comes_back_from_its_product_bitwise() -> None:
    """Directions with one huge entry too (massive activations), and lengths of all sizes."""
    rng = np.random.default_rng(0)
    for width in (2, 3, 32, 577):
        rows = rng.standard_normal((2000, width)) ** 5 * np.exp(3 * rng.standard_normal((2000, 1)))
        d = Direction.from_array(rows)
        product = (d.vectors.astype(np.float64) * d.norms[:, None]).astype(np.float32)
        again = Direction.from_array(product)
        assert np.array_equal(again.vectors, d.vectors) and np.array_equal(again.norms, d.norms)
        lengths = np.linalg.norm(product.astype(np.float64), axis=1).astype(np.float32)
        assert np.array_equal(lengths, d.norms) and np.array_equal((product / lengths[:, None].astype(np.float64)).astype(np.float32), d.vectors)
        assert np.allclose(product, rows, rtol=3e-6), "and is the direction that was given"
        plain = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        lengths = np.linalg.norm(rows, axis=1).astype(np.float32)
        moved = Direction.from_array(plain * lengths[:, None]).vectors != plain
        assert moved.any(), "rounding alone would not do"


# ---- what others write


def write_control(path: Path, tensors: dict[str, np.ndarray], architecture: str = "controlvector") -> Path:
    """As repeng's export_gguf does."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, row in tensors.items():
        writer.add_tensor(name, row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_vector_of_repeng_steers_after_the_block_it_names(tmp_path: Path, llama: HookedModel) -> None:
    rows = np.random.default_rng(3).normal(size=(L, D)).astype(np.float32)
    path = write_control(tmp_path / "happy.gguf", {f"direction.{i}": rows[i] for i in (3, 1)})
    d = Direction.load(path, like=llama)
    assert d.layers == (1, 3) and d.name == "happy" and d.meta["model_hint"] == "llama"
    assert np.allclose(d.norms, np.linalg.norm(rows[[1, 3]], axis=1))
    step = 0.5 * float(llama.residual_norms()[3]) * torch.tensor(rows[3]) / np.linalg.norm(rows[3])
    assert torch.allclose(steered_logits(llama, d, 3), hooked_logits(llama.hf, 3, step), atol=1e-4)


def test_a_published_persona_vector_is_of_the_blocks_between_embeddings_and_final_norm(tmp_path: Path, llama: HookedModel) -> None:
    """Differences of transformers' own hidden states, as the published code makes them."""
    states = [torch.stack(reference.hidden_states(llama.hf, ids)).mean(dim=1) for ids in (IDS, IDS[::-1][:4])]
    torch.save((states[0] - states[1]).float(), tmp_path / "sycophantic_prompt_avg_diff.pt")
    d = Direction.load(tmp_path / "sycophantic_prompt_avg_diff.pt", like=llama)
    assert d.layers == (0, 1, 2) and d.name == "sycophantic" and d.meta["position"] == "mean_all" and d.meta["left_out"] == ["embed", "final_norm"]
    with reference.outputs(llama.hf) as kept:
        reference.logits(llama.hf, IDS)
        one = {i: x.mean(dim=0).clone() for i, x in kept.items()}
        reference.logits(llama.hf, IDS[::-1][:4])
        for i in d.layers:
            difference = (one[i] - kept[i].mean(dim=0)).numpy()
            assert np.allclose(d.layer(i) * d.norms[i], difference, atol=1e-5), "row l is what block l − 1 puts out"


@pytest.mark.parametrize(
    ("name", "tensors", "says"),
    [
        ("zero", {"direction.0": np.ones(8, dtype=np.float32)}, "no layer 0"),
        ("other", {"direction.1": np.ones(8, dtype=np.float32), "norms": np.ones(2, dtype=np.float32)}, "holds 'norms'"),
        ("flat", {"direction.1": np.ones((2, 8), dtype=np.float32)}, "shape"),
        ("whole", {"direction.1": np.ones(8, dtype=np.int32)}, "one-dimensional float"),
        ("widths", {"direction.1": np.ones(8, dtype=np.float32), "direction.2": np.ones(9, dtype=np.float32)}, r"\[8, 9\] entries"),
        ("nothing", {"direction.1": np.zeros(8, dtype=np.float32)}, "holds no direction of any block"),
        ("nan", {"direction.2": np.full(8, np.nan, dtype=np.float32)}, r"NaN or Inf at layers \[2\]"),
    ],
)
def test_control_vectors_that_are_none(name: str, tensors: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
    path = write_control(tmp_path / f"{name}.gguf", tensors)
    with pytest.raises(ValueError, match=says):
        Direction.load(path)
    with pytest.raises(ValueError, match="architecture 'llama', not 'controlvector'"):
        Direction.load(write_control(tmp_path / "model.gguf", {}, "llama"))


def test_a_cut_file_is_damaged(saved: dict[str, Path]) -> None:
    for path in saved.values():
        whole = path.read_bytes()
        for size in (len(whole) // 2, 10, 0):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="damaged"):
                Direction.load(path)
        path.write_bytes(whole)
        Direction.load(path)


def test_another_model_or_a_row_off_is_refused_and_the_right_one_is_not(saved: dict[str, Path], tmp_path: Path) -> None:
    for path in saved.values():
        assert Direction.load(path, like=Shape(D, L)).d_model == D
        with pytest.raises(ValueError, match="32 wide, the model has d_model 64"):
            Direction.load(path, like=Shape(64, L))
        with pytest.raises(ValueError, match="5 blocks|5 rows|has 4 rows|the model has"):
            Direction.load(path, like=Shape(D, L + 1))
        with pytest.raises(ValueError, match="layers|blocks|rows"):
            Direction.load(path, like=Shape(D, L - 1))
    states = np.random.default_rng(0).normal(size=(L + 1, D)).astype(np.float32)
    np.save(tmp_path / "states.npy", states)
    with pytest.raises(ValueError, match=r"5 rows \(\.pt files of persona vectors have those\).* has 4: a row read one off"):
        Direction.load(tmp_path / "states.npy", like=Shape(D, L))
    torch.save(torch.tensor(states[:L]), tmp_path / "blocks.pt")
    with pytest.raises(ValueError, match=r"4 rows \(\.npy files have those\).* has 5: a row read one off"):
        Direction.load(tmp_path / "blocks.pt", like=Shape(D, L))
    write_control(tmp_path / "deep.gguf", {"direction.4": states[0]})
    with pytest.raises(ValueError, match=r"layers \[4\], the model has 4 blocks \(0 … 3\)"):
        Direction.load(tmp_path / "deep.gguf", like=Shape(D, L))


def test_a_transposed_array_is_refused(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(L + 1, D)).astype(np.float32)
    torch.save(torch.tensor(states.T.copy()), tmp_path / "turned.pt")
    np.save(tmp_path / "turned.npy", states[:L].T)
    for name in ("turned.pt", "turned.npy"):
        for like in (None, Shape(D, L)):
            with pytest.raises(ValueError, match=r"looks transposed; needed is \[L"):
                Direction.load(tmp_path / name, like=like)
    square = np.random.default_rng(0).normal(size=(L, L))
    np.save(tmp_path / "square.npy", square)
    assert Direction.load(tmp_path / "square.npy", like=Shape(L, L)).layers == (0, 1, 2, 3)


def test_arrays_of_another_kind(tmp_path: Path) -> None:
    torch.save(torch.ones(3, L + 1, D), tmp_path / "rows.pt")
    with pytest.raises(ValueError, match="holds 3 vectors a layer, a direction is one"):
        Direction.load(tmp_path / "rows.pt")
    torch.save({"layer": object}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="is refused"):
        Direction.load(tmp_path / "pickle.pt")
    np.save(tmp_path / "whole.npy", np.ones((2, 3), dtype=int))
    with pytest.raises(ValueError, match="needed are floats"):
        Direction.load(tmp_path / "whole.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="more than numbers"):
        Direction.load(tmp_path / "objects.npy")
    np.savez(tmp_path / "bare.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="needed are 'vectors'"):
        Direction.load(tmp_path / "bare.npz")
    np.savez(tmp_path / "short.npz", vectors=np.ones((2, 3)), layers=np.array([1]))
    with pytest.raises(ValueError, match="for 1 layers"):
        Direction.load(tmp_path / "short.npz")
    np.savez(tmp_path / "plain.npz", vectors=np.eye(2, 8) * 3, layers=np.array([5, 1]))
    back = Direction.load(tmp_path / "plain.npz")
    assert back.layers == (5, 1) and back.norms.tolist() == [3, 3] and back.layer(1)[1] == 1


# ---- ours


def test_a_saved_direction_comes_back_whole(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(2, D))
    d = Direction((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), (7, 2), "mlp_out", "naïve", {"n": 3})
    back = Direction.load(d.save(tmp_path / "new folder" / "d.safetensors"))
    assert np.array_equal(back.vectors, d.vectors) and np.array_equal(back.norms, d.norms)
    assert (back.layers, back.site, back.name, back.meta) == (d.layers, d.site, d.name, d.meta)
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["d.safetensors"]


def test_a_flipped_byte_and_a_foreign_file_are_noticed(tmp_path: Path) -> None:
    path = Direction.from_array(np.eye(4)).save(tmp_path / "d.safetensors")
    whole = path.read_bytes()
    for place in (len(whole) - 3, whole.index(b"resid_post"), 3):  # tensors, header text, header length
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged|no direction of ours"):
            Direction.load(path)
    save_file({"x": np.ones(3, dtype=np.float32)}, path)
    with pytest.raises(ValueError, match="no direction of ours"):
        Direction.load(path)
    path.write_bytes(whole)
    assert np.array_equal(load_file(path)["vectors"], np.eye(4)) and Direction.load(path).layers == (0, 1, 2, 3)


def test_other_suffixes_and_missing_files_name_the_way_out(tmp_path: Path) -> None:
    d = Direction.from_array(np.eye(4))
    for act in (d.save, Direction.load):
        with pytest.raises(ValueError, match=r"\.gguf, \.npy, \.npz; got 'd\.csv'"):
            act(tmp_path / "d.csv")
    for name in NAMES:
        with pytest.raises(FileNotFoundError, match="save a direction there first"):
            Direction.load(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_recorded_direction_knows_how_many_blocks_its_model_has(tmp_path: Path, llama: HookedModel) -> None:
    from emlens.directions import mean_difference

    acts = llama.record(tiny.tiny_chats(4))
    d = mean_difference(acts[:2], acts[2:])
    with pytest.warns(LeftOutWarning):
        assert len(torch.load(d.save(tmp_path / "d.pt"), weights_only=True)) == L + 1
    assert json.loads(json.dumps(d.meta)) == d.meta and vectors.read(tmp_path / "d.pt").meta["position"] == "any position"
