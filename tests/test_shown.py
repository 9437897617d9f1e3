"""Everything shown is run: README's Python, the explore notebook on a quick demo, the page in that run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import emlens as em

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory) -> Path:
    """``emlens demo --quick``: real weights, the whole chain. EMLENS_QUICK_RUN names a folder to keep it in."""
    out = Path(os.environ.get("EMLENS_QUICK_RUN") or tmp_path_factory.mktemp("quick") / "demo")
    done = subprocess.run([sys.executable, "-m", "emlens", "demo", "--quick", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(out / "report.html") in done.stdout
    return out


@pytest.mark.slow
def test_quick_demo_is_a_real_study(quick_demo):
    runs = em.store.read_table(quick_demo / "tables" / "runs.parquet")
    assert len(runs) == 6 and (runs["logit_change"] > 0).all()
    assert (runs["heldout_after"] < runs["heldout_before"]).all()
    record = em.store.read_json(quick_demo / "study.json")
    assert record["peak_memory_gib"] < 6
    page = (quick_demo / "report.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']https?:", page)


def run_notebook(name: str, folder: Path) -> list:
    """Every cell runs; the outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "analyses" / name, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(folder))
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


@pytest.mark.slow
def test_explore_notebook_runs(quick_demo, tmp_path, monkeypatch):
    monkeypatch.setenv("EMLENS_RUN", str(quick_demo))
    outputs = run_notebook("explore.ipynb", tmp_path)
    assert not [o for o in outputs if o.output_type == "error"] and len(outputs) > 12


@pytest.mark.slow
def test_new_family_notebook_runs(tmp_path, monkeypatch):
    """From a folder nobody has seen to a certificate: a tiny random model stands for it."""
    import tiny

    model = tiny.tiny_model("olmo2")
    model.hf.save_pretrained(str(tmp_path / "model"))
    model.tokenizer.save_pretrained(str(tmp_path / "model"))
    monkeypatch.setenv("EMLENS_MODEL", str(tmp_path / "model"))
    outputs = run_notebook("new_family.ipynb", tmp_path)
    assert not [o for o in outputs if o.output_type == "error"] and len(outputs) > 5


@pytest.mark.slow
def test_steer_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EMLENS_STEER_FEW", "1")
    outputs = run_notebook("steer.ipynb", tmp_path)
    assert not [o for o in outputs if o.output_type == "error"] and len(outputs) > 12


@pytest.mark.slow
def test_the_steering_analysis_runs(quick_demo, tmp_path):
    """The same code on few rows: three tables, each row beside its null or its rivals."""
    script = str(ROOT / "analyses" / "4_steering.py")
    done = subprocess.run([sys.executable, script, "--run", str(quick_demo), "--out", str(tmp_path), "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    personas, ablation, screening = (pd.read_csv(tmp_path / f"steering-{name}.csv") for name in ("personas", "ablation", "screening"))
    assert personas["persona"].tolist() == list(em.personas.TRAITS) and personas[["null_low", "null_high", "p"]].notna().all(axis=None)
    assert ablation["domain"].tolist() == ["money"] * 3 + ["repair"] * 3 and ablation[["null_low", "p", "share"]].notna().all(axis=None)
    assert screening.groupby("metric").size().to_dict() == {"auc": 10, "auc minus TF-IDF's": 4, "precision at the top tenth": 10}


@pytest.mark.slow
def test_readme_python_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks and len(blocks[0].strip().splitlines()) <= 14
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
def test_the_demos_adapters_loaded_together_shift_as_each_alone(quick_demo):
    """One set of weights, every adapter on it: bitwise the shift of each loaded by itself."""
    runs = em.store.read_table(quick_demo / "tables" / "runs.parquet")["run"].tolist()[:3]
    keys = em.store.read_table(quick_demo / "tables" / "pieces.parquet").set_index("piece")["key"]
    folders = {f"run{i}": quick_demo / "pieces" / keys[f"tune {run}"] for i, run in enumerate(runs)}
    few = em.load_prompts("emlens:questions").groupby("category").head(1)
    together = em.load_model("smollm2-135m-instruct", adapters=folders)
    before, *after = together.record(few, adapters=[None, *folders])
    alone = em.load_model("smollm2-135m-instruct")
    for (name, folder), acts in zip(folders.items(), after, strict=True):
        alone.add_adapter(name, folder)
        shift = alone.record(few, adapter=name) - alone.record(few)
        assert ((acts - before).values == shift.values).all() and shift.values.any()
        alone.drop_adapter(name)
