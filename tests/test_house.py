"""Guards the architecture: who imports whom, heavy libraries behind their doors, light start, public names and docstrings, sizes, clean text."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import emlens

PACKAGE = Path(emlens.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

ARRAYS = {
    "stats", "resampling", "subspaces", "nulls", "_sides", "geometry", "shifts", "directions", "separation", "activations", "baselines", "ridge",
    "prediction", "positions", "prompts", "store", "_identity", "_exchange", "attribution", "measures", "covariance", "correlations", "_draws",
    "by_prompt", "calibration", "presets", "vectors", "fitting", "features", "folds", "learners", "crossvalidated", "effects", "comparing",
    "scores", "shuffles", "gains", "refusals", "predictor", "portables", "conformal", "threads", "summaries", "names",
}  # fmt: skip
"""Rooms that run on random arrays with no model installed."""

BELOW_STUDY = {
    "resampling", "subspaces", "_sides", "ridge", "baselines", "_identity", "_exchange", "attribution", "measures", "covariance", "correlations",
    "_draws", "by_prompt", "calibration", "presets", "vectors", "fitting", "features", "folds", "learners", "crossvalidated", "effects", "comparing",
    "scores", "shuffles", "gains", "refusals", "predictor", "portables", "conformal", "threads", "summaries", "names",
}  # fmt: skip
"""Array rooms that a study reaches through the rooms above them only."""

MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    "__main__": {"cli"},
    "resampling": set(),
    "stats": {"resampling"},
    "names": set(),
    "prompts": {"names"},
    "ridge": set(),
    "subspaces": set(),
    "threads": set(),
    "positions": {"prompts"},
    "store": {"prompts"},
    "_identity": set(),
    "_exchange": {"_identity", "prompts", "store"},
    "activations": {"_exchange", "_identity", "prompts", "positions", "store"},
    "formats": {"activations", "prompts", "store"},
    "attribution": {"_sides", "stats", "activations"},
    "measures": {"subspaces"},
    "covariance": {"measures", "nulls", "subspaces"},
    "correlations": {"resampling", "stats"},
    "presets": {"activations", "features", "learners"},
    "nulls": {"measures", "resampling", "stats", "subspaces"},
    "_draws": {"_sides", "resampling", "activations", "covariance", "measures", "nulls", "subspaces"},
    "by_prompt": {"threads", "_sides", "activations", "correlations", "nulls", "stats", "subspaces"},
    "calibration": {"activations", "folds", "gains", "geometry", "ridge", "shuffles", "stats"},
    "_sides": {"nulls", "stats", "activations"},
    "geometry": {"threads", "_draws", "_sides", "measures", "nulls", "stats", "subspaces", "activations"},
    "shifts": {"threads", "_sides", "by_prompt", "geometry", "nulls", "stats", "subspaces", "activations"},
    "vectors": {"activations", "formats", "store"},
    "directions": {"_sides", "nulls", "activations", "vectors"},
    "fitting": {"threads", "_sides", "activations", "covariance", "directions", "subspaces"},
    "separation": {"threads", "_sides", "fitting", "nulls", "stats", "subspaces", "activations"},
    "crossvalidated": {"resampling", "stats"},
    "effects": {"resampling", "stats"},
    "comparing": {"effects", "names", "resampling", "stats"},
    "embeddings": {"loading"},
    "baselines": {"_identity", "activations", "embeddings", "names", "prompts", "stats", "ridge"},
    "features": {"_identity", "_sides", "activations", "baselines", "names", "directions", "ridge", "subspaces"},
    "folds": {"ridge"},
    "learners": {"threads", "names", "ridge"},
    "scores": {"crossvalidated", "ridge", "stats"},
    "shuffles": {"stats"},
    "gains": {"baselines", "learners", "ridge", "scores", "stats"},
    "refusals": {"activations", "folds", "learners", "names", "scores", "shuffles"},
    "prediction": {
        "threads",
        "activations",
        "baselines",
        "features",
        "folds",
        "gains",
        "learners",
        "refusals",
        "ridge",
        "scores",
        "shuffles",
        "stats",
    },  # fmt: skip
    "conformal": {"ridge"},
    "portables": {"activations", "baselines", "directions", "features", "store"},
    "predictor": {
        "threads",
        "activations",
        "baselines",
        "conformal",
        "features",
        "folds",
        "portables",
        "prediction",
        "refusals",
        "ridge",
        "stats",
        "store",
    },  # fmt: skip
    "_engines": {"activations"},
    "_families": set(),
    "_passes": {"positions"},
    "_passing": {"positions"},
    "loading": {"names", "store", "prompts"},
    "adapters": {"loading", "names", "prompts", "store"},
    "_core": {"_engines", "_passes", "activations", "adapters", "loading", "positions", "prompts", "store"},
    "_recording": {"_core", "_engines", "_passes", "activations", "adapters", "positions", "prompts", "store"},
    "_scoring": {"_core", "_passes", "adapters", "loading", "positions", "prompts"},
    "showing": {"_core", "_recording", "activations", "adapters", "directions", "positions"},
    "patching": {"_core", "_engines", "_passes", "_passing", "activations", "adapters", "positions", "showing"},
    "lens": {"_core", "_engines", "directions"},
    "models": {
        "_core",
        "lens",
        "_passing",
        "_recording",
        "_scoring",
        "_engines",
        "activations",
        "adapters",
        "attribution",
        "directions",
        "loading",
        "patching",
        "positions",
        "prompts",
        "showing",
        "store",
    },
    "_training": {"_engines", "_passes", "models", "positions", "prompts", "store"},
    "laws": {"models", "_engines", "_families", "_passes", "activations", "adapters", "directions", "loading", "positions", "prompts", ""},
    "tuning": {"_training", "models", "loading", "_engines", "_passes", "positions", "prompts", "store"},
    "convergence": {"models", "activations", "directions", "prompts", "stats", "steering"},
    "coherence": {"models", "patching", "prompts"},
    "steering": {"models", "activations", "coherence", "directions", "stats", "prompts"},
    "personas": {"_sides", "models", "activations", "correlations", "directions", "positions", "prompts", "stats"},
    "screening": {"models", "directions", "positions", "prompts", "stats", "store"},
    "dynamics": {"models", "tuning"},  # reads the noun that tuning makes, a Run
    "study": {
        *ARRAYS - BELOW_STUDY,
        "baselines",
        "coherence",
        "loading",
        "names",
        "personas",
        "models",
        "tuning",
        "steering",
        "dynamics",
        "laws",
        "report",
        "",
    },
    "summaries": set(),
    "plots": {"summaries"},
    "report": {"store", "plots"},
    "cli": {"laws", "models", "study", "report", "store", ""},
}
"""Room -> the rooms of ours it may import ("" is the package itself, for ``__version__``). A new room is entered here on purpose."""

MODEL_ROOMS = {
    "loading", "adapters", "models", "tuning", "_core", "_engines", "_families", "_passes", "_passing", "_recording", "_scoring", "_training",
    "coherence", "lens", "embeddings",
}  # fmt: skip
"""Where a model is loaded, read, edited or trained."""

DOORS: dict[str, set[str]] = {
    "torch": {*MODEL_ROOMS, "formats", "laws", "patching", "study"},
    "transformers": {*MODEL_ROOMS, "patching"},
    "peft": {"adapters", "tuning", "_training", "_engines", "laws"},
    "transformer_lens": {"_engines"},
    "nnsight": {"_engines"},
    "datasets": {"prompts", "_exchange"},
    "sklearn": {"baselines", "fitting", "folds", "learners"},
    "plotly": {"plots"},
    "inspect_ai": {"evaluate"},
    "ray": {"study"},
    "matplotlib": set(),
    "seaborn": set(),
}


def room(file: Path) -> str:
    """``emlens/plots/style.py`` is of the room ``plots``; ``emlens/__init__.py`` of ``""``."""
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(file: Path, source: str | None = None) -> Iterator[str]:
    """Every module a file imports anywhere in it, relative ones resolved: ``numpy.random``, ``emlens.store``, ``emlens`` itself."""
    package = ["emlens", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            if base == "emlens":
                yield from (f"emlens.{alias.name}" if alias.name in MAY_IMPORT else "emlens" for alias in node.names)
            else:
                yield base


def rooms_imported(file: Path, source: str | None = None) -> set[str]:
    ours = [name.split(".") for name in imported(file, source) if name.split(".")[0] == "emlens"]
    return {(parts[1] if len(parts) > 1 else "") for parts in ours} - {room(file)}


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- arrows and doors


def test_every_room_is_on_the_map() -> None:
    assert {room(file) for file in FILES} <= set(MAY_IMPORT)
    assert not {"utils", "helpers"} & {file.stem for file in FILES}


@pytest.mark.parametrize("name", sorted({room(file) for file in FILES}))
def test_rooms_import_only_what_they_may(name: str) -> None:
    crossed = {str(f.relative_to(ROOT)): sorted(rooms_imported(f) - MAY_IMPORT[name]) for f in FILES if room(f) == name}
    assert not {file: found for file, found in crossed.items() if found}


def test_the_map_has_no_circle() -> None:
    above = {name: {other for other in others if other} for name, others in MAY_IMPORT.items()}
    while above:
        floor = {name for name, others in above.items() if not others}
        assert floor, f"a circle among {sorted(above)}"
        above = {name: others - floor for name, others in above.items() if name not in floor}


def test_imports_are_seen_however_they_are_written() -> None:
    source = "from . import pieces\nfrom .. import stats\nfrom ..models import x\nimport emlens.tuning\n"
    source += "from emlens import plots, __version__\nfrom .grid import y\n"
    inner = "def f():\n    from emlens.report.page import z\n"
    assert rooms_imported(PACKAGE / "study" / "new.py", source + inner) == {"stats", "models", "tuning", "plots", "report", ""}
    assert rooms_imported(PACKAGE / "nulls.py", "from . import stats\nfrom .subspaces import a\nimport numpy") == {"stats", "subspaces"}


@pytest.mark.parametrize("library", sorted(DOORS))
def test_heavy_libraries_stay_behind_their_doors(library: str) -> None:
    users = {room(file) for file in FILES if any(name.split(".")[0] == library for name in imported(file))}
    assert users <= DOORS[library]


def test_the_analysis_rooms_run_with_no_model_library_installed() -> None:
    code = """
import importlib, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "transformer_lens", "nnsight", "datasets", "plotly"):
            raise ModuleNotFoundError("not here: " + name, name=name)

sys.meta_path.insert(0, NotInstalled())
for name in sys.argv[1:]:
    importlib.import_module("emlens." + name)
import numpy as np, emlens as em
acts = em.Activations.from_array(np.random.default_rng(0).normal(size=(12, 2, 5)))
assert list(em.principal_angles(acts, acts, k=2)["layer"].unique()) == [0, 1]
"""
    run_python(code, *sorted(ARRAYS))


# ---- a light start

HEAVY = ("torch", "pandas", "numpy", "scipy", "sklearn", "transformers", "peft", "datasets", "plotly", "safetensors", "jaxtyping")


def loaded_by(code: str) -> set[str]:
    told = f"\nimport json as _j, sys as _s\nprint('LOADED' + _j.dumps([m for m in {HEAVY!r} if m in _s.modules]))"
    return set(json.loads(run_python(code + told).split("LOADED")[1]))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import emlens; dir(emlens); emlens.__version__") == set()


def test_a_folder_of_our_name_beside_a_script_is_not_taken_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "emlens").mkdir()
    (tmp_path / "script.py").write_text("import emlens; print(emlens.__file__)")
    found = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == Path(emlens.__file__)


def test_help_loads_nothing_heavy() -> None:
    code = """
import runpy, sys
sys.argv = ["emlens", *{args!r}]
try:
    runpy.run_module("emlens", run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
"""
    for args in (["--help"], ["demo", "--help"], ["study", "run", "--help"], ["report", "--help"], ["--version"]):
        assert loaded_by(code.format(args=args)) == set(), args


def test_a_heavy_library_would_be_seen() -> None:
    assert {"pandas", "numpy"} <= loaded_by("import emlens; emlens.load_prompts") and "torch" not in loaded_by("import emlens; emlens.load_prompts")


def test_help_shows_an_example() -> None:
    for args in (["--help"], ["demo", "--help"], ["study", "run", "--help"], ["report", "--help"]):
        done = subprocess.run([sys.executable, "-m", "emlens", *args], capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0 and "example" in done.stdout, args


# ---- names, docstrings, sizes


@pytest.mark.parametrize("name", [name for name in emlens.__all__ if name != "__version__"])
def test_public_names_resolve_and_say_what_they_are(name: str) -> None:
    value = getattr(emlens, name)
    assert name in dir(emlens)
    if isinstance(value, Mapping):  # no place for a docstring: the string below the assignment is it
        source = Path(importlib.import_module(f"emlens.{emlens._WHERE[name]}").__file__ or "").read_text(encoding="utf-8")
        assert re.search(rf'^{name}: .*?^\)\n""".+?"""$', source, re.MULTILINE | re.DOTALL)
        return
    assert (value.__doc__ or "").strip(), f"emlens.{name} has no docstring"
    # a dataclass without a docstring gets its signature as one
    assert not value.__doc__.startswith(f"{name}("), f"emlens.{name} has no docstring of its own"


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(AttributeError, match="emlens has no 'load_promts'.*load_prompts"):
        emlens.load_promts  # noqa: B018


def test_no_public_function_shares_its_rooms_name() -> None:
    for name in set(emlens.__all__) - set(emlens._ROOMS) - {"__version__"}:
        assert name not in MAY_IMPORT
        assert isinstance(getattr(emlens, name), Mapping) or getattr(emlens, name).__module__.split(".")[1] in MAY_IMPORT
        assert getattr(importlib.import_module(f"emlens.{emlens._WHERE[name]}"), name) is getattr(emlens, name)


def test_every_module_and_public_thing_has_a_docstring() -> None:
    bare = []
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        where = str(file.relative_to(ROOT))
        bare += [where] if not ast.get_docstring(tree) else []
        if file.parent != PACKAGE or (file.stem.startswith("_") and file.stem != "__init__"):
            continue
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{where}:{node.lineno} {node.name}")
    assert not bare


def test_no_file_is_longer_than_a_room() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {name: n for name, n in lengths.items() if n > 420}


def test_habits() -> None:
    forbidden = {
        "postponed annotations (they hide shapes from the checker)": r"^from __future__ import annotations",
        "a bare or catch-all except": r"^\s*except( Exception| BaseException)?( as \w+)?:",
        "an unfinished thing": r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError",
    }
    found: dict[str, list[str]] = defaultdict(list)
    for file in FILES:
        for what, pattern in forbidden.items():
            found[what] += [f"{file.relative_to(ROOT)}: {m.group()}" for m in re.finditer(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)]
    assert not {what: places for what, places in found.items() if places}


# ---- clean text

LEFT_OUT = {
    ".git",
    ".venv",
    "runs",
    "__pycache__",
    ".ruff_cache",
    ".mypy_cache",
    ".pytest_cache",
    ".ipynb_checkpoints",
    ".hypothesis",
    "build",
    "dist",
}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".cff", ".cfg", ".ipynb", ".html", ".csv", ".lock", ".sh", ""}

MACHINE = re.compile(r"(?<![\w.~$}])/(?:work|root|tmp|scratch|home/[a-z]\w*|Users/[A-Za-z]\w*)/\w")
WORKSHOP = re.compile(r"\b(sub-?agents?|claude|(?:this|my|earlier|previous) session|work order|co-authored-by|issues show)\b", re.IGNORECASE)


def kept_files() -> list[Path]:
    found = [p for p in ROOT.rglob("*") if not any(part in LEFT_OUT or part.endswith(".egg-info") for part in p.relative_to(ROOT).parts)]
    return [p for p in found if p.is_file() and p.suffix in TEXT and p != Path(__file__)]


def test_no_path_of_one_machine_and_no_talk_of_how_it_was_written() -> None:
    found = {}
    for file in kept_files():
        text = file.read_text(encoding="utf-8")
        for pattern in (MACHINE, WORKSHOP):
            if match := pattern.search(text):
                found[str(file.relative_to(ROOT))] = text[max(0, match.start() - 30) : match.end() + 30]
    assert not found


def test_such_text_would_be_seen() -> None:
    assert MACHINE.search("see /work/main/x.py") and MACHINE.search("'/home/jo/x'") and MACHINE.search("=/tmp/a")
    assert not MACHINE.search("../work/x") and not MACHINE.search("https://a.org/tmp/x") and not MACHINE.search("runs/tmp/x")
    assert WORKSHOP.search("as the previous session found") and not WORKSHOP.search('scope="session"')
    assert len(kept_files()) > 40
