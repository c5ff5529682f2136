"""Loss landscapes around a checkpoint: a slice along a line or over a plane -> a figure. And the study's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from disam_theory.errors import ComputationError, UsageError
from disam_theory.landscape import Slice, Slice2D, random_direction, slice_2d
from disam_theory.losses import model_losses
from disam_theory.study import Study
from figures.style import LINES, PALETTE, FigureSpec, Row, panels, styled

COLOURS = "viridis"  # perceptually uniform, and legible in grey and to colour-blind readers
NOT_FINITE = "#bbbbbb"
LEVELS = 25  # of the filled contours; every third of them is a line too
DECADES = 2.0  # a wider range is drawn on a logarithmic scale
CHECKPOINT: dict[str, Any] = {"marker": "X", "color": "white", "mec": "black", "mew": 0.7, "ms": 6, "ls": "none"}
X_LABEL, Y_LABEL = "$a$, step along $d_1$", "$b$, step along $d_2$"


def contour(plane: Slice2D, *, column: str) -> Figure:
    """Filled contours of one loss, a domain's by name or ``"pooled"``; grey where it is not finite."""
    return _contours(plane, (column,), across=1, height=3.3)


def contours(plane: Slice2D) -> Figure:
    """Filled contours of every domain's loss and of the pooled one, all on one scale; grey where not finite."""
    columns = (*plane.names, "pooled")
    across, height = (2, 2.6) if len(columns) in (2, 4) else (3, 2.1)
    return _contours(plane, columns, across=across, height=height)


def surface(plane: Slice2D, *, column: str) -> Figure:
    """One loss, a domain's by name or ``"pooled"``, as a surface in space; a hole where it is not finite."""
    grid = _grid(plane, column)
    levels, norm = _scale(grid)
    values = np.ma.maximum(grid, levels[0])
    height = (np.ma.log10(values) if isinstance(norm, LogNorm) else values).filled(np.nan)
    x, y = plane.x.numpy(), plane.y.numpy()
    with styled():
        figure, axes = panels(1, height=3.6, subplot_kw={"projection": "3d", "computed_zorder": False})
        place = axes[0, 0]
        colours = ScalarMappable(norm, COLOURS).to_rgba(values)
        place.plot_surface(*np.meshgrid(x, y), height, facecolors=colours, rstride=1, cstride=1, shade=False)
        if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
            at_zero = np.interp(0.0, y, [np.interp(0.0, x, row) for row in height])
            place.plot(0.0, 0.0, at_zero, zorder=5, **CHECKPOINT)
        if isinstance(norm, LogNorm):
            place.zaxis.set_major_locator(MaxNLocator(5, integer=True))
            place.zaxis.set_major_formatter(FuncFormatter(lambda decade, _: f"$10^{{{decade:g}}}$"))
        place.set(title=column, xlabel=X_LABEL, ylabel=Y_LABEL, zlabel="loss")
        place.view_init(elev=38, azim=-60)
        place.set_box_aspect(None, zoom=0.85)
        figure.colorbar(ScalarMappable(norm, COLOURS), ax=place, shrink=0.7, pad=0.12, label="loss")
        _legend(figure, masked=False)
    return figure


def lines(line: Slice) -> Figure:
    """Every domain's loss and, in black, the pooled one along the direction; gaps where they are not finite."""
    at = line.coordinates.numpy()
    losses = np.ma.stack([_finite(line.column(name).numpy()) for name in (*line.names, "pooled")])
    _, norm = _scale(losses)
    with styled():
        figure, axes = panels(1, height=2.6)
        place = axes[0, 0]
        for i, name in enumerate(line.names):
            style = LINES[(i + i // len(PALETTE)) % len(LINES)]
            place.plot(at, losses[i], color=PALETTE[i % len(PALETTE)], linestyle=style, label=name)
        place.plot(at, losses[-1], color="black", label="pooled")
        place.axvline(0.0, color="#555555", lw=0.6, zorder=0)
        place.set(xlabel="$a$, step along $d$ (0: the checkpoint)", ylabel="loss", xlim=(at[0], at[-1]))
        place.set_yscale("log" if isinstance(norm, LogNorm) else "linear")
        figure.legend(*place.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _contours(plane: Slice2D, columns: tuple[str, ...], *, across: int, height: float) -> Figure:
    grids = np.ma.stack([_grid(plane, column) for column in columns])
    levels, norm = _scale(grids)
    with styled():
        figure, axes = panels(across, rows=-(-len(columns) // across), height=height, sharex=True, sharey=True)
        figure.set_layout_engine("compressed")
        for place, column, values in zip(axes.flat, columns, grids, strict=False):
            _fill(place, plane, np.ma.maximum(values, levels[0]), levels, norm)
            place.set_title(column)
        for place in axes.flat[len(columns) :]:
            place.set_visible(False)
        for place in axes.flat[max(0, len(columns) - across) : len(columns)]:  # the lowest of each column
            place.set_xlabel(X_LABEL)
            place.tick_params(labelbottom=True)
        for place in axes[:, 0]:
            place.set_ylabel(Y_LABEL)
        figure.colorbar(ScalarMappable(norm, COLOURS), ax=list(axes.flat), label="loss")
        _legend(figure, masked=np.ma.is_masked(grids))
    return figure


def _fill(place: Axes, plane: Slice2D, values: np.ma.MaskedArray, levels: np.ndarray, norm: Normalize) -> None:
    x, y = plane.x.numpy(), plane.y.numpy()
    place.set_facecolor(NOT_FINITE)
    filled = place.contourf(x, y, values, levels=levels, norm=norm, cmap=COLOURS)
    filled.set_edgecolor("face")  # no seams between the levels in vector output
    crossed = [level for level in levels[::3] if values.min() < level < values.max()]
    if crossed:
        place.contour(x, y, values, levels=crossed, colors="white", linewidths=0.4, alpha=0.6)
    place.plot(0.0, 0.0, **CHECKPOINT)
    place.grid(visible=False)
    place.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), box_aspect=1)


def _legend(figure: Figure, *, masked: bool) -> None:
    """What the cross is and, where it occurs, the grey."""
    handles: list[Artist] = [Line2D([], [], label="checkpoint", **CHECKPOINT)]
    if masked:
        handles.append(Patch(color=NOT_FINITE, label="not finite"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _grid(plane: Slice2D, column: str) -> np.ma.MaskedArray:
    """The loss (Y, X) of ``column``, masked where it is not finite."""
    if min(len(plane.x), len(plane.y)) < 2:
        raise UsageError(f"the slice has {len(plane.x)} x {len(plane.y)} points; a plane needs at least 2 x 2")
    return _finite(plane.column(column).numpy())


def _finite(values: np.ndarray) -> np.ma.MaskedArray:
    return np.ma.masked_invalid(values)


def _scale(values: np.ma.MaskedArray) -> tuple[np.ndarray, Normalize]:
    """Contour levels over the finite values: logarithmic where the positive ones span more than two decades."""
    finite = values.compressed()
    if not len(finite):
        raise ComputationError("no loss of the slice is finite; take smaller coordinates")
    low, high = float(finite.min()), float(finite.max())
    least = float(finite.min(initial=np.inf, where=finite > 0))  # losses may underflow to zero
    if low >= 0 and high > 10**DECADES * least:
        return np.geomspace(least, high, LEVELS), LogNorm(least, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # flat to round-off
        margin = max(abs(low), 1.0) / 2
        low, high = low - margin, high + margin
    return np.linspace(low, high, LEVELS), Normalize(low, high)


SUITE, HELD_OUT, RHO = "digits-corrupted", "noise", 0.5


def compute(study: Study) -> list[Row]:
    """The losses around the last weights of one DISAM run, along two random filter-normalised directions."""
    records = study.records(SUITE, algorithm="disam", sampling="pooled", rho=RHO)
    record = next(record for record in records if record.held_out == HELD_OUT)
    step = next(block.snapshot_steps[-1] for block in study.blocks if block.suite == SUITE and block.snapshot_steps)
    params = record.weights(step)
    losses = model_losses(study.model(), study.split(record).sources, chunk=4096)
    directions = random_direction(params, rng=0), random_direction(params, rng=1)
    at = torch.linspace(-1, 1, 17, dtype=torch.float64)
    plane = slice_2d(losses, params, directions, x=at, y=at)
    place = {"suite": SUITE, "held_out": HELD_OUT, "algorithm": "disam", "seed": record.seed, "step": step}
    grid = [(a, b, x, y) for b, y in enumerate(at.tolist()) for a, x in enumerate(at.tolist())]
    sized = zip(plane.names, plane.shares, strict=True)
    return [
        {**place, "domain": name, "share": share, "a": x, "b": y, "loss": float(plane.column(name)[b, a])}
        for name, share in sized
        for a, b, x, y in grid
    ]


def draw(rows: list[Row]) -> Figure:
    """A panel a source domain and one for all of them."""
    shares = {row["domain"]: row["share"] for row in rows}
    x, y = (torch.tensor(sorted({row[axis] for row in rows}), dtype=torch.float64) for axis in ("a", "b"))
    values = torch.tensor([row["loss"] for row in rows], dtype=torch.float64).view(len(shares), len(y), len(x))
    return contours(Slice2D(tuple(shares), tuple(shares.values()), values.permute(1, 2, 0), x, y))


LANDSCAPE = FigureSpec(
    id="landscape",
    title="Loss of each domain around a minimum of DISAM",
    caption="Losses of the source domains (digits-corrupted, noise held out) and of all pooled, around the last "
    r"weights of one run of DISAM ($\rho=0.5$, $\lambda=0.1$), along two random directions normalised filter by "
    "filter: at a coordinate of 1 every filter has moved by its own length.",
    where="not in the paper",
    compute=compute,
    draw=draw,
)
