"""Fig. 2: ascents, paths and end points on a toy problem, and how typical it is of the family it is drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from disam_theory.study import Study
from disam_theory.toy import (
    ANGLE_MARGIN,
    BOX,
    DISAM,
    ERM,
    FAMILY,
    LAMS,
    SAM,
    SHARPNESS_MARGIN,
    Count,
    M,
    Toys,
    flatter,
    nearer,
    outcome,
    toys,
)
from figures.style import ALGORITHM, PALETTE, WIDTH, FigureSpec, Row

DRAWN = {"erm": ERM, "sam": SAM, "disam": DISAM[-1]}
ARROWS = ("largest", "sam", "disam")
LARGEST = {"color": PALETTE[1], "label": "largest gradient of a domain"}
POINTS, AXIS = 33, 5  # of a surface along each axis; of the ascents along each axis
EDGE = BOX + 0.4
COLUMNS = ("panel", "name", "lam", "seed", "step", "x", "y", "u", "v", "loss", "sharpness", "angle")


def compute(study: Study) -> list[Row]:
    """Surfaces, ascents and paths of the family's first problem; angle and sharpness on every problem of it."""
    problem = toys(FAMILY[:1])
    paths = {name: problem.path(settings)[:, 0] for name, settings in DRAWN.items()}
    every = torch.cat(list(paths.values()))
    low, high = every.min(0).values, every.max(0).values
    middle, reach = (low + high) / 2, float((high - low).max()) / 2 + 0.35
    whole, near = _square(torch.zeros(2), EDGE), _square(middle, reach)
    rows = [*_surface("a", problem, whole), *_surface("b", problem, near), *_surface("c", problem, near)]
    return rows + _ascents(problem) + _paths(problem, paths) + _family()


def _row(panel: str, name: str, at: Tensor, loss: Tensor, **more: float) -> Row:
    return dict.fromkeys(COLUMNS, "") | {
        "panel": panel,
        "name": name,
        "x": float(at[0]),
        "y": float(at[1]),
        "loss": float(loss),
        **more,
    }


def _square(middle: Tensor, reach: float) -> Tensor:
    """The points (POINTS^2, 2) of a square grid."""
    steps = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    return middle + torch.cartesian_prod(steps, steps)


def _surface(panel: str, problem: Toys, points: Tensor) -> list[Row]:
    """The pooled loss of the sources, in panel c the unseen domain's."""
    losses = problem.losses(points[:, None])[:, 0]
    values = losses[:, M] if panel == "c" else losses[:, :M].mean(1)
    name = "unseen" if panel == "c" else "pooled"
    return [_row(panel, name, at, loss) for at, loss in zip(points, values, strict=True)]


def _ascents(problem: Toys) -> list[Row]:
    """Unit vectors along the ascents and along the largest domain gradient."""
    at = torch.linspace(-0.75 * EDGE, 0.75 * EDGE, AXIS, dtype=torch.float64)
    rows = []
    for point in torch.cartesian_prod(at, at):
        vectors = {name: problem.ascent(point[None], DRAWN[name]).epsilon["w"][0] for name in ("sam", "disam")}
        vectors["largest"] = problem.largest_gradient(point[None])[0]
        loss = problem.losses(point[None])[0, :M].mean()
        for name in ARROWS:
            u, v = (vectors[name] / vectors[name].norm()).tolist()
            rows.append(_row("a", name, point, loss, u=u, v=v))
    return rows


def _paths(problem: Toys, paths: dict[str, Tensor]) -> list[Row]:
    rows = []
    for name, path in paths.items():
        losses = problem.losses(path[:, None])[:, 0]
        for step, (at, loss) in enumerate(zip(path, losses[:, :M].mean(1), strict=True)):
            rows.append(_row("b", name, at, loss, step=step))
        end = path[-1]
        rows.append(_row("c", name, end, losses[-1, M], sharpness=float(problem.sharpness(end[None])[0])))
    return rows


def _family() -> list[Row]:
    """The end point of each algorithm on each problem, its loss and sharpness on the unseen domain, and the angle."""
    rows = []
    for settings in (ERM, SAM, *DISAM):
        found = outcome(settings)
        for seed, at, loss, top, angle in zip(
            FAMILY, found.ends, found.losses, found.sharpness.tolist(), found.angles.tolist(), strict=True
        ):
            ascends = {"angle": angle} if settings.radius else {}
            more = {"lam": settings.strength, "seed": seed, "sharpness": top, **ascends}
            rows.append(_row("d", settings.algorithm, at, loss, **more))
    return rows


def draw(rows: list[Row]) -> Figure:
    """Above, the problem: ascents, paths, the unseen domain; below, the family's counts."""
    figure = Figure(figsize=(WIDTH, 4.1))
    above, below = np.asarray(figure.subfigures(2, height_ratios=(2.4, 1.7)))  # apart: their labels do not align
    axes = dict(zip("abc", above.subplots(1, 3), strict=True)) | {"d": below.subplots()}
    for panel, title in (
        ("a", "(a) ascents, pooled loss"),
        ("b", "(b) paths, pooled loss"),
        ("c", "(c) unseen domain"),
    ):
        mine = [row for row in rows if row["panel"] == panel]
        _contours(axes[panel], [row for row in mine if row["name"] in ("pooled", "unseen")])
        axes[panel].set_title(title)
    _draw_ascents(axes["a"], [row for row in rows if row["panel"] == "a" and row["name"] in ARROWS])
    _frame(axes["a"], axes["b"])
    for name in DRAWN:
        _draw_path(axes["b"], [row for row in rows if row["panel"] == "b" and row["name"] == name], name)
    _draw_ends(axes["c"], [row for row in rows if row["panel"] == "c" and row["name"] in DRAWN])
    _draw_counts(axes["d"], [row for row in rows if row["panel"] == "d"])
    handles = [_handle(**ALGORITHM[name]) for name in DRAWN]
    handles.append(_handle(**LARGEST))
    above.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def _handle(**look: Any) -> Line2D:
    return Line2D([], [], **look)


def _contours(place: Axes, rows: list[Row]) -> None:
    x, y, loss = (np.array([row[axis] for row in rows]).reshape(POINTS, POINTS) for axis in ("x", "y", "loss"))
    light = {"vmin": loss.min(), "vmax": 2 * loss.max()}  # pale, so that what is drawn on it stands out
    place.contourf(x, y, loss, levels=14, cmap="Greys", **light).set_edgecolor("face")
    place.contour(x, y, loss, levels=14, colors="#777777", linewidths=0.3)
    place.grid(visible=False)
    place.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), box_aspect=1, xlabel="$w_1$")


def _draw_ascents(place: Axes, rows: list[Row]) -> None:
    place.set_ylabel("$w_2$")
    for name, width in zip(ARROWS, (0.02, 0.011, 0.011), strict=True):
        mine = [row for row in rows if row["name"] == name]
        look = LARGEST if name == "largest" else ALGORITHM[name]
        x, y, u, v = ([row[axis] for row in mine] for axis in ("x", "y", "u", "v"))
        place.quiver(
            x, y, u, v, color=look["color"], width=width, scale=1.6, scale_units="xy", angles="xy", headwidth=3.5
        )


def _frame(place: Axes, inner: Axes) -> None:
    """Where the panel ``inner`` lies in ``place``."""
    (left, right), (low, high) = inner.get_xlim(), inner.get_ylim()
    place.add_patch(Rectangle((left, low), right - left, high - low, fill=False, lw=0.7, ec="black", ls=":"))


def _draw_path(place: Axes, rows: list[Row], name: str) -> None:
    x, y = ([row[axis] for row in rows] for axis in ("x", "y"))
    look = ALGORITHM[name]
    place.plot(x, y, color=look["color"], linestyle=look["linestyle"], lw=0.9)
    place.plot(x[0], y[0], marker="*", color="white", mec="black", mew=0.7, ms=8, zorder=4)
    place.plot(x[-1], y[-1], marker=look["marker"], color=look["color"], mec="white", mew=0.7, ms=6, zorder=5)


def _draw_ends(place: Axes, rows: list[Row]) -> None:
    """The last weights, each with the largest eigenvalue of the unseen domain's Hessian."""
    for row in rows:
        look = ALGORITHM[row["name"]]
        end: dict[str, Any] = {
            "marker": look["marker"],
            "color": look["color"],
            "mec": "white",
            "mew": 0.7,
            "ms": 6,
            "ls": "none",
        }
        place.plot(row["x"], row["y"], label=f"{row['sharpness']:.2f}", **end)
    place.legend(
        title=r"$\lambda_{\max}$", handletextpad=0.1, borderpad=0.3, labelspacing=0.3, frameon=True, framealpha=0.9
    )


def _draw_counts(place: Axes, rows: list[Row]) -> None:
    """A bar for each part of the claim and strength: problems where it holds, ties, and where the opposite does."""

    def column(name: str, lam: float, what: str) -> Tensor:
        return torch.tensor([r[what] for r in rows if r["name"] == name and r["lam"] == lam], dtype=torch.float64)

    counts: list[tuple[str, Count]] = []
    for lam in LAMS:
        angles = nearer(column("sam", 0.0, "angle"), column("disam", lam, "angle"))
        counts.append((rf"SAM pulled more than DISAM, $\lambda={lam:g}$", angles))
    for other in ("sam", "erm"):
        for lam in LAMS:
            tops = flatter(column("disam", lam, "sharpness"), column(other, 0.0, "sharpness"))
            counts.append((rf"DISAM flatter than {other.upper()}, $\lambda={lam:g}$", tops))
    for bar, (_, counted) in enumerate(counts):
        _draw_bar(place, bar, counted)
    place.set_yticks(range(len(counts)), [label for label, _ in counts])
    place.invert_yaxis()
    place.grid(visible=False)
    place.set(xlim=(0, len(FAMILY)), xlabel=f"random problems, of {len(FAMILY)}")
    place.set_title("(d) holds (blue), tied (grey), the opposite (yellow); share without ties")


def _draw_bar(place: Axes, bar: int, counted: Count) -> None:
    left = 0
    for number, colour, ink in (
        (counted.below, ALGORITHM["disam"]["color"], "white"),
        (counted.tied, "#dddddd", "black"),
        (counted.above, PALETTE[2], "black"),
    ):
        place.barh(bar, number, left=left, color=colour, height=0.72)
        place.text(left + number / 2, bar, str(number), ha="center", va="center", color=ink, fontsize=7)
        left += number
    low, high = counted.interval(0.95)
    share = counted.below / max(1, counted.below + counted.above)
    place.annotate(
        f"{share:.0%} [{low:.0%}, {high:.0%}]",
        (1.02, bar),
        xycoords=("axes fraction", "data"),
        va="center",
        annotation_clip=False,
    )


FIG2 = FigureSpec(
    id="fig2",
    title="A toy example of SAM and DISAM under domain shift, and how typical it is",
    caption="The first problem, not a chosen one, of a family drawn by seed: three source domains and an "
    "unseen one share a surface of four wells, each shifted and scaled at random. "
    "(a) Directions of the ascent, and of the largest domain "
    "gradient; dotted, the region of (b) and (c). (b) Paths from one start (star) on the pooled loss. (c) Where they "
    r"end on the unseen domain, with the largest eigenvalue of its Hessian there. $\rho=0.5$, $\lambda=0.7$. "
    rf"(d) In how many of the {len(FAMILY)} problems what the paper's figure shows holds, is a tie (below "
    f"{ANGLE_MARGIN:g}° or {100 * SHARPNESS_MARGIN:g} %), or its opposite holds; beside it the share without ties and "
    "its 95 % interval (Clopper and Pearson). The pull is that of the ascent at the start towards the largest domain "
    "gradient.",
    where="Fig. 2",
    compute=compute,
    draw=draw,
)
