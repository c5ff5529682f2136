r"""Symmetric operators -> their largest (or smallest) algebraic eigenpairs, each in a certified interval.

One process works for every start: a subspace $Q$ (n, m) and pending directions $U$ (n, o) with
$HQ=QT+UC$. From a random vector it is Lanczos' (1950); after a restart, or from given vectors, it goes on along the
residual of the pair that is least converged (Stathopoulos and McCombs 2010, without a preconditioner). It is written
as a generator that yields a vector and is sent its image, so that many spectra share each pass over the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from disam_theory.errors import ComputationError, UsageError
from disam_theory.operators import Curvature, SymmetricOperator, covariance_term, domain_gradients, weights_at

ROUND_OFF = 100.0  # a residual below this many machine epsilons times the norm is the products' own error
PROBE_STEPS = (4, 8)  # products that a search for a missed eigenvalue costs at least and at most
SMALL = 64  # in a space so small the search goes on to the end
BASIS_BYTES = 2**30  # the basis is restarted before it takes more memory than this

Found = TypeVar("Found")
Process = Generator[Tensor, Tensor, Found]  # yields a vector (n,), is sent its image, returns what it found


@dataclass(frozen=True)
class Eigenpairs:
    r"""The ``k`` largest algebraic eigenvalues (or smallest), and how sure each is.

    ``lower[j]`` and ``upper[j]`` enclose the true j-th eigenvalue: on one side because a Ritz value never passes the
    eigenvalue of its rank (Cauchy), on the other by the residual, $\theta+r$, or where the next eigenvalue
    is far enough by $\theta+r^2/\text{gap}$ (Temple 1928). The second side supposes that no eigenvalue was missed: a
    random probe orthogonal to all that was found is followed until it shows none. Round-off of the products is added.
    """

    values: Tensor  # (k,) float64, largest first (smallest first for the bottom)
    vectors: Tensor  # (n, k), orthonormal columns
    residuals: Tensor  # (k,) float64, |H v - theta v| recomputed from the returned vectors
    lower: Tensor  # (k,) float64
    upper: Tensor  # (k,) float64
    converged: bool  # every residual is at most tol * |theta|, or at the round-off of the products
    at_round_off: bool  # converged, and ``tol`` is below what the products' round-off allows
    products: int  # matrix-vector products spent

    def __repr__(self) -> str:
        pairs = ", ".join(f"{v:.6g} ± {r:.1g}" for v, r in zip(self.values, self.residuals, strict=True))
        state = ("converged to round-off" if self.at_round_off else "converged") if self.converged else "NOT converged"
        return f"Eigenpairs({pairs}; {state} after {self.products} products)"


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    tol: float = 1e-4,
    max_products: int = 300,
    rng: int = 0,
    start: Tensor | None = None,
) -> Eigenpairs:
    r"""The ``k`` largest *algebraic* eigenvalues of $H$ with vectors.

    Sharpness is the largest algebraic eigenvalue, not the largest in magnitude: at a saddle the two differ. Stops once
    $\lVert Hv-\theta v\rVert\le$ ``tol`` $|\theta|$ for the k leading Ritz pairs (or at round-off, which an
    eigenvalue of zero needs) and a random probe shows none that was missed, such as the second of two
    equal ones; then recomputes the residuals from the vectors it returns. ``start`` (n, j): vectors to start from, such
    as those of the checkpoint before.

    Raises:
        UsageError: ``k`` is not in 1..n, or ``max_products`` is too few.
        ComputationError: a product is NaN or Inf.
    """
    process = eigen_process(operator, k, tol=tol, max_products=max_products, rng=rng, start=start)
    return run_together({"": process}, lambda vectors: {"": operator.matvec(vectors[""])})[""]


def bottom_eigenpairs(operator: SymmetricOperator, k: int = 1, **options: object) -> Eigenpairs:
    """The ``k`` smallest algebraic eigenvalues, smallest first; options as for :func:`top_eigenpairs`."""
    negated = SymmetricOperator(operator.size, operator.dtype, operator.device, lambda v: -operator.matvec(v))
    top = top_eigenpairs(negated, k, **options)  # type: ignore[arg-type]
    return replace(top, values=-top.values, lower=-top.upper, upper=-top.lower)


def domain_spectra(
    curvature: Curvature,
    k: int = 1,
    *,
    lam: float | None = None,
    tol: float = 1e-4,
    max_products: int = 300,
    rng: int = 0,
    start: Mapping[str, Eigenpairs] | None = None,
    progress: Callable[[int, int], None] = lambda products, running: None,
) -> dict[str, Eigenpairs]:
    r"""The top ``k`` eigenpairs of each domain's matrix and of ``pooled`` $\sum_i\alpha_iA_i$, all in lockstep.

    With ``lam`` (of Hessians) also ``beta-weighted`` $\sum_i\beta_i\nabla^2L_i$ and ``L_DI``, see
    :func:`~disam_theory.operators.domain_inspired_hessian`. Every round is one pass over the data for all spectra that
    have not converged. ``start``: the spectra of a nearby checkpoint, whose vectors are started from. ``progress`` is
    called after each round with the products spent and the number of spectra still running.
    """
    losses = curvature.losses
    weights = dict(zip(losses.names, torch.eye(losses.M, dtype=torch.float64), strict=True))
    weights["pooled"] = torch.tensor(losses.shares, dtype=torch.float64)
    if lam is not None:
        weights["beta-weighted"] = weights["L_DI"] = weights_at(losses, curvature.params, lam).double().cpu()
        correction = covariance_term(domain_gradients(losses, curvature.params), lam)
    spent = 0

    def products(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal spent
        rows = torch.stack([weights[name] for name in wanted])
        images = dict(zip(wanted, curvature.products(list(wanted.values()), rows), strict=True))
        if "L_DI" in wanted and lam is not None:
            images["L_DI"] += correction(wanted["L_DI"])
        spent += len(wanted)
        progress(spent, len(wanted))
        return images

    given = start or {}

    def process(name: str) -> Process[Eigenpairs]:
        vectors = given[name].vectors if name in given else None
        return eigen_process(curvature, k, tol=tol, max_products=max_products, rng=rng, start=vectors)

    return run_together({name: process(name) for name in weights}, products)


def run_together(
    processes: Mapping[str, Process[Found]], products: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Found]:
    """Advance the processes in lockstep: each round asks ``products`` for one image for each that is still running."""
    wanted = {name: next(process) for name, process in processes.items()}
    found: dict[str, Found] = {}
    while wanted:
        images = products(wanted)
        following = {}
        for name in wanted:
            if not bool(torch.isfinite(images[name]).all()):
                raise ComputationError(
                    f"a Hessian product{f' of {name}' if name else ''} is NaN or Inf; check the weights, "
                    "or use --dtype float64"
                )
            try:
                following[name] = processes[name].send(images[name])
            except StopIteration as stop:
                found[name] = stop.value
        wanted = following
    return {name: found[name] for name in processes}


def eigen_process(
    operator: SymmetricOperator | Curvature,
    k: int,
    *,
    tol: float = 1e-4,
    max_products: int = 300,
    rng: int = 0,
    start: Tensor | None = None,
) -> Process[Eigenpairs]:
    """The process behind :func:`top_eigenpairs`; of ``operator`` it uses size, dtype and device."""
    n = operator.size
    if not 1 <= k <= n:
        raise UsageError(f"k is {k}; ask for 1 to {n} eigenpairs of a {n} x {n} operator")
    if max_products < 2 * k:
        raise UsageError(f"max_products is {max_products}; {k} eigenpairs need at least {2 * k}")
    if start is not None and (start.ndim != 2 or len(start) != n):
        raise UsageError(f"start has shape {tuple(start.shape)}; give vectors as columns, ({n}, j)")
    return _search(Subspace(operator, torch.Generator().manual_seed(rng), start), k, tol, max_products)


def _search(space: Subspace, k: int, tol: float, max_products: int) -> Process[Eigenpairs]:
    """Expand the subspace until k pairs are settled and a probe finds no other that belongs to them."""
    given = len(space.pending)
    capacity = max(BASIS_BYTES // (space.n * space.pending.element_size()), 3 * k + 10)
    spent, probe = 0, None  # probe: the column of the basis where the probe begins
    while True:
        values, mixing, errors = space.ritz(k)
        goal = (tol * values.abs()).clamp(min=space.noise)
        excess = (errors / goal).nan_to_num(0.0)  # 0/0: a zero operator, solved exactly
        settled = len(values) == k and bool((excess <= 1).all())
        if space.m == space.n or spent + k >= max_products:
            break
        direction = None
        if settled and space.m >= given:
            if probe is None:
                probe, direction = space.m, space.add_random()
            else:
                height, direction = space.height_from(probe)
                steps, (least, most) = space.m - probe, PROBE_STEPS
                if steps >= least and (height < values[-1] - errors[-1] or steps >= max(most, min(space.n, SMALL))):
                    break
        else:
            probe = None
            if space.m >= given and len(excess):
                direction = space.residual_direction(mixing[:, int(excess.argmax())])
        image = yield space.choose(direction)
        space.expand(image)
        spent += 1
        if space.m == capacity:
            space.restart(2 * k + 4)
            probe = None
    vectors = torch.linalg.qr(space.basis.T @ mixing.to(space.basis)).Q
    images = []
    for column in vectors.T:
        images.append((yield column.contiguous()))
    return _checked(vectors, torch.stack(images, dim=1), tol, space.noise, spent + k)


class Subspace:
    r"""Orthonormal rows ``basis`` $Q^\top$ (m, n) and ``pending`` $U^\top$ (o, n) with $HQ=QT+UC$.

    Orthogonality is kept by two passes of Gram-Schmidt (Kahan, in Parlett 1980). ``projected`` $T$ (m, m) and
    ``coupling`` $C$ (o, m) are float64 on the CPU; their diagonal comes from dot products accumulated in float64.
    """

    def __init__(
        self, operator: SymmetricOperator | Curvature, generator: torch.Generator, start: Tensor | None = None
    ) -> None:
        self.n, self._like = operator.size, (operator.device, operator.dtype)
        self._generator = generator
        self.basis = torch.empty(0, self.n, dtype=operator.dtype, device=operator.device)
        rows = self._random(1) if start is None else start.T.to(*self._like)
        self.pending = torch.linalg.qr(rows.T).Q.T.contiguous()
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.coupling = torch.zeros(len(self.pending), 0, dtype=torch.float64)

    @property
    def m(self) -> int:
        """Dimension of the basis."""
        return len(self.basis)

    @property
    def noise(self) -> float:
        """What round-off alone can put into a residual."""
        scale = float(torch.linalg.eigvalsh(self.projected).abs().max()) if self.m else 0.0
        return ROUND_OFF * torch.finfo(self.basis.dtype).eps * scale

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading (up to) k Ritz values (k,), their coordinates (m, k), and the norms of their residuals (k,)."""
        values, vectors = torch.linalg.eigh(self.projected)
        mixing = vectors[:, -k:].flip(1) if self.m else vectors
        return values[-k:].flip(0), mixing, (self.coupling @ mixing).norm(dim=0)

    def height_from(self, column: int) -> tuple[float, Tensor | None]:
        """A bound of what the basis from ``column`` on has yet to show, and where to look next.

        The largest Ritz value plus the norm of the remainder: seldom below the largest eigenvalue (Zhou and Li 2011).
        """
        values, vectors = torch.linalg.eigh(self.projected[column:, column:])
        coordinates = torch.zeros(self.m, dtype=torch.float64)
        coordinates[column:] = vectors[:, -1]
        remainder = torch.linalg.matrix_norm(self.coupling[:, column:], ord=2) if len(self.coupling) else 0.0
        return float(values[-1] + remainder), self.residual_direction(coordinates)

    def residual_direction(self, coordinates: Tensor) -> Tensor | None:
        """The residual of a Ritz vector as a unit combination (o,) of the pending rows; None where there is none."""
        direction = self.coupling @ coordinates
        length = direction.norm()
        return direction / length if length > 0 else None

    def add_random(self) -> Tensor | None:
        """Put a random row, orthogonal to all others, last among the pending; its direction, None without room."""
        if self.m + len(self.pending) >= self.n:
            return None
        row = self._orthogonal(self._random(1)[0])
        self.pending = torch.cat([self.pending, (row / row.norm())[None]])
        self.coupling = torch.cat([self.coupling, torch.zeros(1, self.m, dtype=torch.float64)])
        return torch.eye(len(self.pending), dtype=torch.float64)[-1]

    def choose(self, direction: Tensor | None) -> Tensor:
        """Rotate the pending rows so that ``direction`` comes first, and return it as a vector (n,)."""
        if not len(self.pending):
            self.add_random()
        elif direction is not None and len(self.pending) > 1:
            frame = torch.cat([direction[:, None], torch.eye(len(direction), dtype=torch.float64)], dim=1)
            rotation = torch.linalg.qr(frame).Q.T  # the first row is the direction, up to sign
            self.pending = rotation.to(self.pending) @ self.pending
            self.coupling = rotation @ self.coupling
        first = self._orthogonal(self.pending[0], self.basis)
        self.pending[0] = first / first.double().norm()
        return self.pending[0].clone()

    def expand(self, image: Tensor) -> None:
        """Move the first pending row into the basis, given its image under the operator."""
        row, known = self.pending[0], self.coupling[0]
        diagonal = (row.double() @ image.double()).cpu()
        self.pending, self.coupling = self.pending[1:], self.coupling[1:]
        self.projected = torch.cat(
            [torch.cat([self.projected, known[:, None]], 1), torch.cat([known, diagonal[None]])[None]]
        )
        self.basis = torch.cat([self.basis, row[None]])
        along = self.pending.double() @ image.double()
        remainder = self._orthogonal(image)
        length = remainder.double().norm()
        self.coupling = torch.cat([self.coupling, along.cpu()[:, None]], dim=1)
        if float(length) > self.noise:
            self.pending = torch.cat([self.pending, (remainder / length.to(remainder))[None]])
            last = torch.zeros(1, self.m, dtype=torch.float64)
            last[0, -1] = float(length)
            self.coupling = torch.cat([self.coupling, last])

    def restart(self, keep: int) -> None:
        """Shrink the basis to its ``keep`` leading Ritz vectors (Wu and Simon 2000)."""
        values, mixing, _ = self.ritz(min(keep, self.m - 1))
        self.basis = mixing.T.to(self.basis) @ self.basis
        self.projected, self.coupling = torch.diag(values), self.coupling @ mixing

    def _orthogonal(self, vector: Tensor, *against: Tensor) -> Tensor:
        for _ in range(2):
            for rows in against or (self.basis, self.pending):
                vector = vector - (rows @ vector) @ rows
        return vector

    def _random(self, rows: int) -> Tensor:
        """Drawn on the CPU so that every device starts alike."""
        return torch.randn(rows, self.n, generator=self._generator, dtype=torch.float64).to(*self._like)


def _checked(vectors: Tensor, images: Tensor, tol: float, noise: float, spent: int) -> Eigenpairs:
    """Rayleigh-Ritz on the vectors that are returned, explicit residuals, and the intervals they give."""
    wide, images = vectors.double(), images.double()
    inner = wide.T @ images
    values, rotation = torch.linalg.eigh((inner + inner.T) / 2)
    values, rotation = values.flip(0), rotation.flip(1)
    wide, images = wide @ rotation, images @ rotation
    residuals = (images - wide * values).norm(dim=0)
    reached = residuals <= tol * values.abs()
    converged = bool((reached | (residuals <= noise)).all())
    sign = torch.where(wide.gather(0, wide.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    upper = _upper_bounds(values.tolist(), residuals.tolist(), noise)
    return Eigenpairs(
        values,
        (wide * sign).to(vectors),
        residuals,
        values - noise,
        torch.tensor(upper, dtype=torch.float64, device=values.device),
        converged,
        converged and not bool(reached.all()),
        spent,
    )


def _upper_bounds(values: list[float], residuals: list[float], noise: float) -> list[float]:
    r"""Upper bounds of the eigenvalues, from the last to the first, each by the residual or by Temple's quotient.

    Pairs whose intervals overlap are bounded together, by the root of their summed squares (Kahan 1967).
    """
    bounds: list[float] = []
    group = 0.0  # summed squares of the residuals of the pairs that overlap
    below = -math.inf
    for value, residual in zip(reversed(values), reversed(residuals), strict=True):
        apart = value - residual > below
        group = residual**2 if apart else group + residual**2
        bound = value + math.sqrt(group)
        if apart and bounds:
            bound = min(bound, value + residual**2 / (value - below))
        bounds.append(bound + noise)
        below = bounds[-1]
    return bounds[::-1]
