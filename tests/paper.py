"""Where the paper's tables are, beside the checkout, and the mark of tests that read them: left out where they are absent, never in CI."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPER = ROOT.parent / "shared" / "paper"
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")


def needs(folder: Path, what: str) -> pytest.MarkDecorator:
    """Skip, with the reason, where a folder is not there; in CI the test runs and fails."""
    return pytest.mark.skipif(not folder.is_dir() and not IN_CI, reason=f"{what} are not at {folder}; with CI=true this fails instead")


needs_paper = needs(PAPER, "the paper's tables")
