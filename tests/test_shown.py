"""Everything shown is run: README's Python, the explore notebook on a quick demo, the page in that run."""

import os
import re
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_explore_notebook_runs(quick_demo, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("EMLENS_RUN", str(quick_demo))
    notebook = nbformat.read(ROOT / "analyses" / "explore.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"] and len(outputs) > 8


@pytest.mark.slow
def test_readme_python_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks and len(blocks[0].strip().splitlines()) <= 14
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
