"""Cost and result of the channel permutation search, beside the procedure of the paper's official code.

    python benchmarks/permutation_cost.py --out benchmarks/results/permutation_cost.json

Both get the same score matrix (|W| of a random layer with log-normal input scales, times such input norms) and do one
sweep: heuristic allocation, then one assignment per lane. The official procedure scores an assignment box by box,
sorting [rows, groups, M] for each, and solves it on those scores as they are; it is written here from the description
of the algorithm. Scoring one box costs the same whichever it is, so `--boxes` of them are timed per lane and
multiplied, unless all are asked for (`--boxes 0`). The retained scores of both are recorded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from provenance import commit
from scipy.optimize import linear_sum_assignment

from sparsify.manifest import versions
from sparsify.permute import allocate_channels, assignment_gain, centred, retained, search
from sparsify.types import NofM

PATTERN = NofM(2, 4)


def layer(rows: int, width: int, seed: int) -> torch.Tensor:
    """A score matrix [rows, width] with channels of very different importance."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(width, generator=generator).mul(0.5).exp() * torch.randn(width, generator=generator).exp()
    return torch.randn(rows, width, generator=generator).abs() * scale


def box_by_box(score: torch.Tensor, groups: torch.Tensor, lane: int, boxes: list[int]) -> torch.Tensor:
    """Retained score of each of ``boxes`` with the lane's channel of every group in turn, [boxes, groups]."""
    candidates = score[:, groups[:, lane]]
    result = []
    for box in boxes:
        others = score[:, [int(groups[box, k]) for k in range(PATTERN.m) if k != lane]]
        filled = torch.cat([others[:, None, :].expand(-1, len(groups), -1), candidates[:, :, None]], dim=2)
        result.append(filled.sort(dim=2, descending=True).values[:, :, : PATTERN.n].sum(dim=(0, 2)))
    return torch.stack(result)


def official(score: torch.Tensor, n_boxes: int) -> dict[str, Any]:
    """One sweep, timed; with ``n_boxes`` the scoring is a sample, and only its time is meant."""
    groups = allocate_channels(score, PATTERN.m).reshape(-1, PATTERN.m)
    n_groups = len(groups)
    scoring = assigning = 0.0
    per_box: list[float] = []
    for lane in range(PATTERN.m):
        if n_boxes:
            for box in range(0, n_groups, n_groups // n_boxes)[:n_boxes]:
                began = time.perf_counter()
                box_by_box(score, groups, lane, [box])
                per_box.append(time.perf_counter() - began)
            gain = assignment_gain(score, groups, lane, PATTERN)  # the same numbers less a constant per box
        else:
            began = time.perf_counter()
            gain = box_by_box(score, groups, lane, list(range(n_groups)))
            scoring += time.perf_counter() - began
        began = time.perf_counter()
        chosen = linear_sum_assignment(gain.numpy(), maximize=True)[1]
        assigning += time.perf_counter() - began
        groups[:, lane] = groups[torch.from_numpy(chosen), lane]
    if n_boxes:
        scoring = statistics.mean(per_box) * n_groups * PATTERN.m
    return {
        "scoring_s": scoring,
        "scoring": f"extrapolated from {len(per_box)} boxes" if n_boxes else "measured",
        "box_s": {"median": statistics.median(per_box), "min": min(per_box), "max": max(per_box)} if n_boxes else None,
        "assignment_s": assigning,
        "total_s": scoring + assigning,
        "retained": retained(score, groups.reshape(-1), PATTERN),
    }


def main() -> None:
    """Measure in turn and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--boxes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    records = []
    for repeat in range(options.repeats):
        score = layer(options.rows, options.width, repeat)
        theirs = official(score, options.boxes)
        began = time.perf_counter()
        found = search(score, PATTERN, n_sweeps=1)
        ours = {"total_s": time.perf_counter() - began, "retained": found.retained}
        groups = allocate_channels(score, PATTERN.m).reshape(-1, PATTERN.m)
        gain = assignment_gain(score, groups, 0, PATTERN).numpy()
        times = []
        for costs in (gain, centred(gain)):
            began = time.perf_counter()
            linear_sum_assignment(costs, maximize=True)
            times.append(time.perf_counter() - began)
        records.append(
            {
                "official": theirs,
                "ours": ours,
                "identity": found.retained_identity,
                "ratio": theirs["total_s"] / ours["total_s"],
                "one_assignment_s": {"as_is": times[0], "centred": times[1]},
            }
        )
        print(json.dumps(records[-1]), flush=True)
    body = {
        "commit": commit(),
        "versions": versions("torch", "scipy"),
        "threads": torch.get_num_threads(),
        "rows": options.rows,
        "width": options.width,
        "records": records,
    }
    options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
