"""Along a tuning: narrow loss against broad alignment, checkpoint by checkpoint, on the one set of loaded weights."""

from collections.abc import Collection
from typing import Any

import pandas as pd

from .models import HookedModel
from .tuning import Run

HELD_OUT = ["heldout_loss", "heldout_se", "heldout_drop", "heldout_drop_se"]
"""What a run's checkpoints tell of the loss on held-out rows (:class:`emlens.tuning.Run`)."""


def checkpoint_margins(
    model: HookedModel, run: Run, questions: Any, precision: str | None = None, steps: Collection[int] | None = None
) -> pd.DataFrame:
    """The margin at every kept checkpoint of a run: each adapter is put on, read and taken off again.

    Args:
        model: the model that was tuned.
        run: of :func:`emlens.finetune`.
        questions: with contrast answers; a stated subset if need be.
        precision: as in :meth:`HookedModel.margin`.
        steps: which of the kept steps; default all.

    Returns:
        DataFrame ``step``, the columns of :data:`HELD_OUT`, ``id, category, margin`` (nats/token); step 0 is the model before tuning.
    """
    rows = []
    for point in run.checkpoints.itertuples():
        if steps is not None and point.step not in steps:
            continue
        if isinstance(point.path, str) and point.path:
            name = f"checkpoint {point.step}"
            model.add_adapter(name, point.path)
            try:
                margins = model.margin(questions, adapter=name, precision=precision)
            finally:
                model.drop_adapter(name)
        else:
            margins = model.margin(questions, precision=precision)
        rows.append(margins.assign(step=point.step, **{column: getattr(point, column) for column in HELD_OUT}))
    if not rows:
        raise ValueError(f"none of the steps {sorted(steps or [])} was kept; kept are {run.checkpoints['step'].tolist()}")
    table = pd.concat(rows, ignore_index=True)
    return table[["step", *HELD_OUT, "id", *[c for c in ("category",) if c in table], "margin"]]
