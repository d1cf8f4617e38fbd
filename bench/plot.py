"""Pictures of a results file: speed-up over each baseline, and how near each case is to its floor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..models.training.checkpoint import atomic_path
from .report import OURS, CaseKey, Row, by_case, ours_of, ratios

# Okabe and Ito's colours, which colour-blind readers tell apart, and a mark each, for print.
STYLES = {
    "torch": ("#0072B2", "o"),
    "torch channels_last": ("#E69F00", "s"),
    "torch.compile": ("#009E73", "D"),
    "torch.compile channels_last": ("#D55E00", "^"),
    "torch, weights apart": ("#CC79A7", "v"),
    "torch, step by step": ("#56B4E9", "P"),
}
FAMILIES = {
    "conv": "convolution",
    "atrous": "pyramid",
    "max": "pooling",
    "batch": "normalisation",
    "rnn": "recurrence",
    "network": "networks",
}
DIRECTIONS = ("forward", "input gradient", "weight gradient", "forward and backward", "pool and unpool")
FINE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8, 2)  # where a picture spans less than this
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
COARSE_TICKS = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000)  # where it spans more than 100
INK, FAINT = "#333333", "#DDDDDD"


def family(row: Row) -> str:
    return next(name for prefix, name in FAMILIES.items() if row.op.startswith(prefix))


def draw(rows: list[Row], folder: Path, stem: str) -> list[Path]:
    """Write two PNG files for each family of ops and dtype into `folder`; returns their paths.

    ValueError if no row can be drawn.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((family(row), row.dtype), []).append(row)
    paths = []
    for (name, dtype), group in groups.items():
        cases = {key: of_case for key, of_case in by_case(group).items() if ours_of(of_case)}
        if not cases:
            continue
        for kind, draw_panel in (("speedup", _speedups), ("floor", _floors)):
            path = folder / f"{stem}_{name}_{dtype}_{kind}.png"
            with atomic_path(path) as temporary:
                _figure(cases, f"{name}, {dtype}, {group[0].gpu}", draw_panel).savefig(temporary, dpi=110, format="png")
            paths.append(path)
    if not paths:
        raise ValueError("no case of this file passed its check, so there is nothing to draw")
    return paths


def _figure(cases: dict[CaseKey, list[Row]], title: str, draw_panel: Callable[..., str]) -> Figure:
    """One panel for each direction, one line for each shape."""
    directions = [d for d in DIRECTIONS if any(key[-1] == d for key in cases)]
    labels = list(dict.fromkeys(key[1] for key in cases))
    place = {label: index for index, label in enumerate(labels)}
    height = 0.24 * len(labels) + 1.7
    with matplotlib.rc_context({"font.size": 9, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(4.2 + 3.1 * len(directions), height), layout="constrained")
        panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
        label = ""
        for axes, direction in zip(panels, directions, strict=True):
            chosen = {place[key[1]]: of_case for key, of_case in cases.items() if key[-1] == direction}
            label = draw_panel(axes, chosen)
            axes.margins(x=0.06)
            axes.set_title(direction, fontsize=10)
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
        panels[0].set_yticks(range(len(labels)), labels)
        figure.suptitle(f"{title}\n{label}", fontsize=11)
        handles = {
            text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _speedups(axes: Axes, chosen: dict[int, list[Row]]) -> str:
    """A mark for each baseline; a bar to the fastest of them, green where ours is faster still and red where not."""
    marks: dict[str, tuple[list[float], list[int]]] = {}
    for index, of_case in chosen.items():
        against = ratios(of_case)
        best = min(against.values())
        axes.plot([1, best], [index, index], color="#2E8B57" if best >= 1 else "#C0392B", linewidth=4, alpha=0.35)
        for name, ratio in against.items():
            xs, ys = marks.setdefault(name, ([], []))
            xs.append(ratio)
            ys.append(index)
    for name, (xs, ys) in marks.items():
        colour, mark = STYLES.get(name, ("#999999", "x"))
        axes.plot(xs, ys, mark, color=colour, markersize=5, markeredgewidth=0, label=name, alpha=0.9)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = FINE_TICKS if high < 3 * low else COARSE_TICKS if high > 100 * low else TICKS
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    return "a baseline's time / ours: right of 1× ours is faster; the bar ends at the fastest baseline"


def _floors(axes: Axes, chosen: dict[int, list[Row]]) -> str:
    """Bars of ours, a mark at the fastest baseline."""
    for position, (index, of_case) in enumerate(chosen.items()):
        ours = ours_of(of_case)
        assert ours is not None
        best = min((row for row in of_case if row.variant != OURS), key=lambda row: row.ms)
        first = position == 0
        axes.barh(index, ours.percent_of_floor, color="#0072B2", height=0.55, label="ours" if first else None)
        axes.plot(
            best.percent_of_floor, index, "|", color="#D55E00", markersize=9, markeredgewidth=2,
            label="fastest baseline" if first else None,
        )  # fmt: skip
    axes.axvline(100, color=INK, linewidth=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    return "per cent of the floor max(FLOP / matmul rate, bytes / copy rate): 100 % can't be passed"
