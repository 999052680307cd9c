"""Adds a data set and its plan, trains them and an arm that no plan has, and prints where each was found.

A process of its own: what is read at import must find the new rows.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from moe_study.columns import SCORE, frame_of
from moe_study.configs import snnl
from moe_study.data.datasets import DATASETS, DatasetInfo, Split


def stripes(root: Path) -> tuple[Split, Split]:
    """Images whose bright column is their label."""

    def split(count: int, seed: int) -> Split:
        draw = torch.Generator().manual_seed(seed)
        labels_N = torch.arange(count) % 4
        images_NCHW = torch.randint(0, 60, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)
        images_NCHW[torch.arange(count), 0, :, 2 * labels_N] += 150
        return Split(images_NCHW, labels_N)

    return split(200, 0), split(80, 1)


DATASETS["stripes"] = DatasetInfo(title="Stripes", splits=stripes, classes=("a", "b", "c", "d"))
plain = snnl.SETTINGS["digits"]["digits"]
snnl.SETTINGS["digits"]["stripes"] = replace(plain, train=replace(plain.train, epochs=2))
snnl.SEED_COUNTS["digits"]["stripes"] = [(("base", "snnl"), 2)]

if __name__ == "__main__":
    from moe_study import plan, study
    from moe_study.report import collapse_plots, overview, plots, snnl_plots, tables

    torch.set_num_threads(1)
    runs = study.runs("digits", "snnl", "stripes")
    planned = plan.plan(runs)
    for run in runs:
        study.write(run, study.execute(run, "cpu"))
    snnl_too = next(run for run in runs if run.arm == "snnl")
    mine = [replace(run, arm="mine", objective=snnl_too.objective) for run in runs if run.arm == "base"]
    for run in mine:
        study.write(run, study.execute(run, "cpu"))
    results = study.results([*runs, *mine])
    frame = frame_of(results)
    by_arm, cloud = plots.accuracy_by_arm(results), collapse_plots.collapse_and_accuracy(results)
    heatmap = snnl_plots.routing_heatmap(results)
    found = {
        "plan": planned,
        "accuracy": [result["task"]["accuracy"] for result in results],
        "page": overview.accuracy_table("digits").columns.tolist(),
        "summary": tables.summary(frame, SCORE).index.tolist(),
        "contrast": tables.contrasts(frame, [("mine", "base")], ["accuracy"]).reset_index().to_string(),
        "rows": [label.get_text() for label in by_arm.axes[0].get_yticklabels()],
        "classes": [text.get_text() for text in heatmap.axes[0].get_yticklabels()],
        "legend": [text.get_text() for text in cloud.legends[0].get_texts()],
        "colours": [plots.arm_style(arm)[0] for arm in ("mine", "base", "snnl")],
    }
    json.dump(found, sys.stdout)
