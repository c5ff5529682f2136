"""Slices of the loss around a checkpoint: exact on quadratics, equal to single evaluations, and drawn whole."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from torch import nn

from disam_theory.errors import ComputationError, UsageError
from disam_theory.landscape import (
    Slice2D,
    between,
    eigen_direction,
    random_direction,
    slice_1d,
    slice_2d,
)
from disam_theory.losses import DomainLosses, model_losses, parameters_of, quadratic_losses
from disam_theory.operators import flatten, hessian
from figures.landscape import contour, contours, lines, surface
from figures.style import WIDTH

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64: a few dozen roundings
SIZES = (6, 17, 9)
GRID = torch.linspace(-1.5, 2.0, 8, dtype=torch.float64)


class Branching(nn.Module):
    """Looks at a value to choose its path, which vmap does not take."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        outputs = self.linear(x)
        return outputs if float(outputs.sum()) > 0 else 2 * outputs


class InPlace(nn.Module):
    """Adds a batched value into a tensor that is not, which vmap does not take."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return torch.zeros(len(x), 3, dtype=x.dtype).add_(self.linear(x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def conv():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3))


MODELS = {
    "mlp": (mlp, (4,)),
    "conv": (conv, (2, 4, 4)),
    "transformer": (Transformer, (5, 4)),
    "branching": (Branching, (4,)),
    "in place": (InPlace, (4,)),
}


@pytest.fixture
def build(make_domain):
    """``build(name)``: the losses of a model on three domains, in two micro-batches or more, and its params."""

    def make(name="mlp", dtype=torch.float64):
        factory, shape = MODELS[name]
        torch.manual_seed(0)
        model = factory().to(dtype)
        domains = [make_domain(f"d{i}", n, shape, rng=i).to(dtype=dtype) for i, n in enumerate(SIZES)]
        return model_losses(model, domains, chunk=5), parameters_of(model)

    return make


@pytest.fixture
def quadratic():
    """Three quadratics of four parameters, their matrices, minima and offsets, and a point."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, minima, offsets = draw(3, 4, 4), draw(3, 4), draw(3)
    curvatures = a + a.mT
    return quadratic_losses(minima, curvatures, offsets, sizes=(1, 2, 5)), {"w": draw(4)}, curvatures, minima, offsets


@pytest.fixture
def plane(build):
    losses, params = build()
    directions = random_direction(params, rng=0), random_direction(params, rng=1)
    return slice_2d(losses, params, directions, x=GRID, y=torch.linspace(-1, 1, 5))


def moved(params, *steps):
    return {name: p + sum(a * d[name] for a, d in steps) for name, p in params.items()}


# --- slices ---


def test_a_line_through_quadratics_is_the_exact_parabola(quadratic):
    r"""$L_i(w+ad)=L_i(w)+a\,g_i^\top d+\frac12a^2\,d^\top A_id$."""
    losses, params, curvatures, minima, _ = quadratic
    d = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    line = slice_1d(losses, params, {"w": d}, at=GRID, points_per_pass=3)
    slope = torch.einsum("ijk,ik,j->i", curvatures, params["w"] - minima, d)
    bend = torch.einsum("ijk,j,k->i", curvatures, d, d)
    expected = losses(params) + GRID[:, None] * slope + 0.5 * GRID[:, None] ** 2 * bend
    torch.testing.assert_close(line.losses, expected, **EXACT)
    assert line.names == losses.names
    assert torch.equal(line.coordinates, GRID)


def test_a_plane_through_quadratics_is_the_exact_paraboloid_with_rows_y(quadratic):
    losses, params, curvatures, minima, offsets = quadratic
    d1 = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    d2 = torch.tensor([1.0, 3.0, 0.0, -0.5], dtype=torch.float64)
    x, y = GRID, torch.tensor([-1.0, 0.25, 3.0], dtype=torch.float64)
    plane = slice_2d(losses, params, ({"w": d1}, {"w": d2}), x=x, y=y)
    assert plane.losses.shape == (3, 8, 3)
    r = params["w"] + x[None, :, None] * d1 + y[:, None, None] * d2 - minima[:, None, None]
    expected = 0.5 * torch.einsum("iyxj,ijk,iyxk->yxi", r, curvatures, r) + offsets
    torch.testing.assert_close(plane.losses, expected, **EXACT)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_every_point_is_the_loss_of_the_moved_params(build, name):
    """Also for the two models that vmap does not take."""
    losses, params = build(name)
    d1, d2 = random_direction(params, rng=0), random_direction(params, rng=1, normalisation="none")
    x, y = (-0.5, 0.0, 0.7), (-1.0, 0.2)
    plane = slice_2d(losses, params, (d1, d2), x=x, y=y, points_per_pass=4)
    line = slice_1d(losses, params, d1, at=x)
    for i, a in enumerate(x):
        torch.testing.assert_close(line.losses[i], losses(moved(params, (a, d1))), **EXACT)
        for j, b in enumerate(y):
            torch.testing.assert_close(plane.losses[j, i], losses(moved(params, (a, d1), (b, d2))), **EXACT)


@pytest.mark.parametrize(("name", "batched"), [("mlp", True), ("conv", True), ("branching", False)])
def test_points_are_evaluated_together_where_vmap_takes_the_model(build, name, batched):
    losses, params = build(name)
    calls = []

    def counted(part):
        return lambda p: calls.append(1) or part(p)

    parts = tuple(tuple(counted(part) for part in of_domain) for of_domain in losses.parts)
    counting = DomainLosses(losses.names, losses.sizes, parts)
    slice_1d(counting, params, random_direction(params, rng=0), at=torch.linspace(-1, 1, 20), points_per_pass=10)
    passes = sum(len(of_domain) for of_domain in parts)
    assert len(calls) == 2 * passes if batched else len(calls) >= 20 * passes


@pytest.mark.parametrize("points_per_pass", [1, 2, 5, 7, 1000])
def test_points_per_pass_do_not_change_the_values(build, points_per_pass):
    losses, params = build()
    directions = random_direction(params, rng=0), random_direction(params, rng=1)
    whole = slice_2d(losses, params, directions, x=GRID, y=GRID)
    cut = slice_2d(losses, params, directions, x=GRID, y=GRID, points_per_pass=points_per_pass)
    torch.testing.assert_close(cut.losses, whole.losses, **EXACT)


def test_an_error_of_the_model_itself_is_not_hidden(build):
    _, params = build()

    def broken(p):
        raise RuntimeError("the model's own")

    losses = DomainLosses(("a",), (1,), ((broken,),))
    with pytest.raises(RuntimeError, match="the model's own"):
        slice_1d(losses, params, random_direction(params, rng=0), at=[0.0])


def test_the_pooled_and_domain_inspired_losses_are_eqs_3_and_6_at_each_point(plane):
    L, shares = plane.losses.numpy(), np.array(SIZES) / sum(SIZES)
    np.testing.assert_allclose(plane.pooled, sum(s * L[..., i] for i, s in enumerate(shares)), rtol=1e-12)
    np.testing.assert_allclose(plane.domain_inspired(0.3), L @ shares - 0.3 * L.var(-1), rtol=1e-12)
    assert torch.equal(plane.column("d1"), plane.losses[..., 1])
    assert torch.equal(plane.column("pooled"), plane.pooled)
    with pytest.raises(UsageError, match="unknown domain 'd11': did you mean 'd1'"):
        plane.column("d11")


def test_losses_that_overflow_far_away_are_kept():
    losses = quadratic_losses(torch.zeros(2, 1), torch.tensor([[[1.0]], [[0.0]]]), torch.zeros(2))
    line = slice_1d(losses, {"w": torch.ones(1)}, {"w": torch.ones(1)}, at=[-1e30, 0.0, 1e30])
    assert line.losses[:, 0].tolist() == [math.inf, 0.5, math.inf]
    assert line.losses[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert line.pooled.tolist() == [math.inf, 0.25, math.inf]
    assert bool(line.domain_inspired(0.1)[0].isnan())


def test_float32_params_give_float32_accuracy_in_a_float64_array(build):
    wide, params = build()
    narrow, params32 = build(dtype=torch.float32)
    direction = random_direction(params, rng=0)  # float64, also for the float32 params
    exact = slice_1d(wide, {name: p.double() for name, p in params32.items()}, direction, at=GRID).losses
    line = slice_1d(narrow, params32, direction, at=GRID)
    assert line.losses.dtype == line.coordinates.dtype == torch.float64
    torch.testing.assert_close(line.losses, exact, rtol=2e-5, atol=1e-6)
    assert not torch.equal(line.losses, exact)


def test_a_slice_leaves_the_params_as_they_were(build):
    losses, params = build()
    before = {name: p.clone() for name, p in params.items()}
    trained = {name: p.clone().requires_grad_(True) for name, p in params.items()}
    line = slice_1d(losses, trained, random_direction(trained, rng=0), at=[-1.0, 1.0])
    assert not line.losses.requires_grad
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trained.items())


# --- directions ---


def test_filters_of_a_random_direction_are_as_long_as_those_of_the_params(build):
    """Li et al. (2018): row by row in every matrix and kernel; biases and norms do not move."""
    _, params = build("conv")
    direction = random_direction(params, rng=3)
    assert list(direction) == list(params)
    for name, w in params.items():
        d = direction[name]
        assert d.shape == w.shape
        if w.ndim == 1:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1), **EXACT)
            assert float(nn.functional.cosine_similarity(d.flatten(), w.flatten(), dim=0)) < 0.9


def test_the_slice_along_a_filter_scaled_direction_does_not_see_the_scale_of_relu_filters(make_domain):
    """Filters times 10, the next layer by 10 less: the same function, the same slice; not so without the scaling."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    losses, params = model_losses(model, [make_domain(n=20)]), parameters_of(model)
    rescaled = {"0.weight": 10 * params["0.weight"], "2.weight": params["2.weight"] / 10}

    def along(p, normalisation):
        return slice_1d(losses, p, random_direction(p, rng=0, normalisation=normalisation), at=GRID).losses

    torch.testing.assert_close(along(rescaled, "filter"), along(params, "filter"), **EXACT)
    assert float((along(rescaled, "none") - along(params, "none")).abs().max()) > 1e-2


def test_an_unscaled_random_direction_has_length_one_and_follows_the_seed(build):
    _, params = build()
    first = random_direction(params, rng=0, normalisation="none")
    assert float(flatten(first).norm()) == pytest.approx(1, abs=1e-14)
    again, other = (random_direction(params, rng=seed, normalisation="none") for seed in (0, 1))
    assert torch.equal(flatten(first), flatten(again))
    assert abs(float(flatten(first) @ flatten(other))) < 0.5


def test_the_line_between_two_checkpoints_ends_at_both(build):
    losses, a = build()
    b = moved(a, (0.3, random_direction(a, rng=5, normalisation="none")))
    line = slice_1d(losses, a, between(a, dict(reversed(b.items()))), at=[0.0, 0.5, 1.0])
    torch.testing.assert_close(line.losses[0], losses(a), **EXACT)
    torch.testing.assert_close(line.losses[2], losses(b), **EXACT)
    assert float((line.losses[0] - line.losses[2]).abs().max()) > 1e-3


def test_the_second_difference_along_an_eigenvector_is_its_eigenvalue(build):
    """And the mixed one over the plane of two eigenvectors is zero: they are orthogonal under the Hessian."""
    losses, params = build()
    values, vectors = torch.linalg.eigh(hessian(losses, params, weights=losses.shares).dense())
    h = 1e-3
    for j in (-1, -2, 0):
        line = slice_1d(losses, params, eigen_direction(vectors[:, j], params), at=[-h, 0.0, h])
        low, middle, high = line.pooled.tolist()
        assert (low - 2 * middle + high) / h**2 == pytest.approx(float(values[j]), abs=1e-5)
    directions = eigen_direction(vectors[:, -1], params), eigen_direction(vectors[:, -2], params)
    corners = slice_2d(losses, params, directions, x=[-h, h], y=[-h, h]).pooled
    mixed = float(corners[0, 0] - corners[0, 1] - corners[1, 0] + corners[1, 1]) / (4 * h**2)
    assert abs(mixed) < 1e-5
    assert float(values[-2]) > 0.05


# --- what is refused ---


def test_checkpoints_that_differ_are_refused_by_name(build):
    _, params = build()
    other = {**params, "0.bias": torch.zeros(7)}
    with pytest.raises(UsageError, match=r"misshapen 0.bias is \(7,\), the model has \(6,\)"):
        between(params, other)
    del other["0.bias"]
    with pytest.raises(UsageError, match=r"missing 0\.bias"):
        between(params, other)


@pytest.mark.parametrize("sign", [1.0, -3.0])
def test_parallel_directions_are_refused(build, sign):
    losses, params = build()
    d = random_direction(params, rng=0)
    near = moved({name: sign * v for name, v in d.items()}, (0.01, random_direction(params, rng=1)))
    with pytest.raises(UsageError, match=rf"parallel \(cosine {'-' if sign < 0 else ''}(0\.999|1\.0)"):
        slice_2d(losses, params, (d, near), x=GRID, y=GRID)


@pytest.mark.parametrize(
    ("factor", "message"), [(0.0, "has length 0.0"), (math.nan, "has length nan"), (math.inf, "has length (nan|inf)")]
)
def test_a_direction_without_a_length_is_refused(build, factor, message):
    losses, params = build()
    direction = {name: factor * p for name, p in params.items()}
    with pytest.raises(UsageError, match=message):
        slice_1d(losses, params, direction, at=GRID)


@pytest.mark.parametrize("at", [[], [0.0, 0.0], [1.0, 0.0], [0.0, math.nan], [0.0, math.inf], [[0.0, 1.0]]])
def test_coordinates_that_do_not_increase_are_refused(build, at):
    losses, params = build()
    with pytest.raises(UsageError, match="at must be finite, increasing"):
        slice_1d(losses, params, random_direction(params, rng=0), at=at)


def test_a_direction_of_another_model_and_impossible_settings_are_refused(build):
    losses, params = build()
    direction = random_direction(params, rng=0)
    with pytest.raises(UsageError, match=r"the direction does not fit the params: missing 0\.weight"):
        slice_1d(losses, params, {"w": torch.ones(3)}, at=GRID)
    with pytest.raises(UsageError, match="points_per_pass is 0"):
        slice_1d(losses, params, direction, at=GRID, points_per_pass=0)
    with pytest.raises(UsageError, match="did you mean 'filter'"):
        random_direction(params, rng=0, normalisation="filters")
    with pytest.raises(UsageError, match="ask for normalisation 'none'"):
        random_direction({"w": torch.ones(3)}, rng=0)
    with pytest.raises(UsageError, match=r"shape \(3,\)"):
        eigen_direction(torch.ones(3), params)


# --- figures ---


def bowl(names=("a", "b"), *, scale=(1.0, 1e4), floor=0.1):
    r"""$L_i=s_i(x^2+y^2+c)$ on a grid."""
    x, y = torch.linspace(-1, 1, 9, dtype=torch.float64), torch.linspace(-2, 2, 7, dtype=torch.float64)
    radius = x[None, :] ** 2 + y[:, None] ** 2 + floor
    losses = torch.stack([s * radius for s in scale], dim=-1)
    return Slice2D(names, tuple(1 / len(names) for _ in names), losses, x, y)


def shown(figure):
    """The figure's axes that are visible and not the colour bar's, drawn."""
    figure.draw_without_rendering()
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def colour_bar(figure):
    (axes,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    (mesh,) = [artist for artist in axes.collections if isinstance(artist, QuadMesh)]
    return axes, mesh.norm


def test_contours_show_every_domain_and_the_pooled_loss_on_one_scale():
    plane = bowl()
    figure = contours(plane)
    axes = shown(figure)
    bar, norm = colour_bar(figure)
    assert [place.get_title() for place in axes] == ["a", "b", "pooled"]
    assert figure.get_figwidth() == WIDTH
    assert bar.get_ylabel() == "loss"
    assert isinstance(norm, LogNorm)
    assert (norm.vmin, norm.vmax) == pytest.approx((0.1, 5.1e4))  # over all panels
    for place in axes:
        assert "d_1" in place.get_xlabel()
        assert place.get_xlim() == (-1, 1)
        assert place.get_ylim() == (-2, 2)
        filled = place.collections[0]
        assert (filled.norm.vmin, filled.norm.vmax) == (norm.vmin, norm.vmax)
        assert any(len(path.vertices) for path in filled.get_paths())
        assert all(np.isfinite(path.vertices).all() for path in filled.get_paths())
        (checkpoint,) = place.lines
        assert (*checkpoint.get_xdata(), *checkpoint.get_ydata()) == (0, 0)
    assert "d_2" in axes[0].get_ylabel()


def test_the_scale_is_logarithmic_over_more_than_two_decades_only():
    plane = bowl()
    for column, low in (("a", 0.1), ("b", 1e3)):  # 51-fold each
        _, norm = colour_bar(contour(plane, column=column))
        assert not isinstance(norm, LogNorm)
        assert norm.vmin == pytest.approx(low)
    plane.losses[3, 4] = 0.0  # a loss that underflowed is drawn at the least positive one
    _, norm = colour_bar(contours(plane))
    assert isinstance(norm, LogNorm)
    assert norm.vmin == pytest.approx(0.1 + 1 / 16)
    figure = surface(plane, column="b")
    assert not isinstance(colour_bar(figure)[1], LogNorm)
    plane.losses[...] -= 1.0  # no logarithm of what is negative
    assert not isinstance(colour_bar(contours(plane))[1], LogNorm)


def test_the_filled_region_is_where_the_loss_is_finite():
    """The overflowing corner is left to the grey background, which the legend explains."""
    plane = bowl(scale=(1.0, 2.0))
    whole = contour(plane, column="a")
    assert [text.get_text() for text in whole.legends[0].get_texts()] == ["checkpoint"]
    plane.losses[:2, :3] = torch.tensor([math.inf, math.nan], dtype=torch.float64)
    figure = contour(plane, column="a")
    (place,) = shown(figure)
    filled = place.collections[0]
    inside = [path.contains_point((-0.9, -1.8)) for path in filled.get_paths()]
    assert not any(inside)
    assert any(path.contains_point((0.9, 1.8)) for path in filled.get_paths())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["checkpoint", "not finite"]
    assert len(shown(contours(plane))) == 3
    shown(surface(plane, column="b"))


@pytest.mark.parametrize(("floor", "height"), [(0.1, 0.15), (0.001, math.log10(0.0015))])
def test_a_surface_has_the_height_of_the_loss_and_the_checkpoint_on_it(floor, height):
    """The height is the logarithm, and the ticks are powers of ten, where the colours are logarithmic."""
    plane = bowl(scale=(1.0, 2.0), floor=floor)
    figure = surface(plane, column="pooled")
    (place,) = shown(figure)
    assert place.get_zlabel() == "loss"
    assert "d_1" in place.get_xlabel()
    assert "d_2" in place.get_ylabel()
    (checkpoint,) = place.lines
    x, y, z = (float(v[0]) for v in checkpoint.get_data_3d())
    assert (x, y) == (0, 0)
    assert z == pytest.approx(height)
    assert place.get_zticklabels()[0].get_text().startswith("$10^{") == (floor < 0.1)
    mesh = place.collections[0]
    assert len(mesh.get_facecolors()) == 8 * 6
    assert colour_bar(figure)[0].get_ylabel() == "loss"


def test_lines_are_the_losses_of_each_domain_and_the_pooled_one(build):
    losses, params = build()
    line = slice_1d(losses, params, random_direction(params, rng=0), at=GRID)
    figure = lines(line)
    (place,) = shown(figure)
    labels = [drawn.get_label() for drawn in place.lines[:4]]
    assert labels == [*line.names, "pooled"]
    for drawn, name in zip(place.lines[:4], labels, strict=True):
        np.testing.assert_array_equal(drawn.get_ydata(), line.column(name))
    assert place.get_xlabel()
    assert place.get_ylabel() == "loss"
    assert place.get_yscale() == "linear"
    assert len({(d.get_color(), d.get_linestyle()) for d in place.lines[:4]}) == 4


def test_lines_leave_out_what_is_not_finite_and_go_logarithmic():
    losses = quadratic_losses(torch.zeros(1, 1), torch.ones(1, 1, 1), torch.ones(1))
    line = slice_1d(losses, {"w": torch.zeros(1)}, {"w": torch.ones(1)}, at=[-1e30, -50.0, 0.0, 50.0, 1e30])
    (place,) = shown(lines(line))
    assert place.get_yscale() == "log"
    assert np.ma.getmaskarray(place.lines[0].get_ydata(orig=True)).tolist() == [True, False, False, False, True]
    assert place.get_ylim()[1] < 1e5


def test_flat_losses_are_drawn_and_slices_without_a_plane_or_a_finite_loss_are_refused():
    plane = bowl()
    flat = dataclasses.replace(plane, losses=torch.full_like(plane.losses, 2.0))
    assert len(shown(contours(flat))) == 3
    with pytest.raises(UsageError, match="9 x 1 points"):
        contour(dataclasses.replace(plane, y=plane.y[:1], losses=plane.losses[:1]), column="a")
    with pytest.raises(ComputationError, match="no loss of the slice is finite"):
        surface(dataclasses.replace(plane, losses=torch.full_like(plane.losses, math.nan)), column="a")
    with pytest.raises(UsageError, match="unknown domain 'c'"):
        contour(plane, column="c")
