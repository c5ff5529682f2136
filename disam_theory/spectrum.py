r"""Symmetric operators -> their largest (or smallest) algebraic eigenpairs, each in a certified interval.

One process works for every start: a subspace $Q$ (n, m) and pending directions $U$ (n, o) with
$HQ=QT+UC$. From one vector it is Lanczos' (1950); after a restart it goes on along the residual of the pair that is
least converged (Stathopoulos and McCombs 2010, without a preconditioner). It is written as a generator that yields a
vector and is sent its image, so that many spectra share each pass over the data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from disam_theory.errors import ComputationError, UsageError
from disam_theory.memory import out_of_memory
from disam_theory.operators import (
    Curvature,
    SymmetricOperator,
    at_least_on_gpu,
    covariance_term,
    domain_gradients,
    weights_at,
)

ROUND_OFF = 100.0  # a residual below this many machine epsilons times the norm is the products' own error
PROBE_STEPS = (4, 8)  # products that a search for a missed eigenvalue costs at least, and at most in a large space
SMALL = 64  # in a space so small the search goes on to the end
BASIS_BYTES = 3 * 2**30  # the bases of all spectra that run together and the vectors found before, kept below this
GPU_SHARE = 4  # on a GPU, that part of its memory if it is more
BLOCK = 2**21  # entries of a vector that are widened to float64 at once

Found = TypeVar("Found")
Progress = Callable[[int, int, float], None]
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
    progress: Progress = lambda products, running, error: None,
    held: int = 0,
) -> Eigenpairs:
    r"""The ``k`` largest *algebraic* eigenvalues of $H$ with vectors.

    Sharpness is the largest algebraic eigenvalue, not the largest in magnitude: at a saddle the two differ. Stops once
    $\lVert Hv-\theta v\rVert\le$ ``tol`` $|\theta|$ for the k leading Ritz pairs (or at round-off, which an
    eigenvalue of zero needs) and a random probe shows none that was missed, such as the second of two
    equal ones; then recomputes the residuals from the vectors it returns, for k products more where the matrix is so
    large that products are not kept. ``start`` (n, j): eigenvectors of a nearby matrix, such as those of the checkpoint
    before; the search starts from their sum. ``progress`` is called after each product, as :func:`domain_spectra` does.
    ``held``: bytes of vectors beside it that count towards the 3 GiB of :func:`domain_spectra`.

    Raises:
        UsageError: ``k`` is not in 1..n, or ``max_products`` is too few.
        ComputationError: a product is NaN or Inf.
    """
    space = _space(operator, k, max_products, rng, held=held)
    space.give(start)
    spent = 0

    def product(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal spent
        images = {name: operator.matvec(vector) for name, vector in wanted.items()}
        spent += 1
        progress(spent, 1, space.error)
        return images

    return run_together({"": _search(space, k, tol, max_products)}, product)[""]


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
    start: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda products, running, error: None,
) -> dict[str, Eigenpairs]:
    r"""The top ``k`` eigenpairs of each domain's matrix and of ``pooled`` $\sum_i\alpha_iA_i$.

    With ``lam`` (of Hessians) also ``beta-weighted`` $\sum_i\beta_i\nabla^2L_i$ and ``L_DI``, see
    :func:`~disam_theory.operators.domain_inspired_hessian`, after the others and started from the pooled vectors. The
    others advance in lockstep: every round is one pass over the data for all spectra that have not converged. Where
    that many bases would take more than 3 GiB (on a GPU, a quarter of its memory), ``pooled`` comes first and the rest
    after it, as many at once as fit. Where not even one fits, the products of its vectors are not kept, and its final
    residuals cost k products more. ``start``: eigenvectors (n, j) by spectrum, of a nearby checkpoint or of an
    interrupted search. ``progress`` is called after each round with the products spent, the number of spectra not yet
    done and the largest relative residual of those that run.

    Raises:
        UsageError: ``k`` is not in 1..n, or ``max_products`` is too few.
        ComputationError: a product is NaN or Inf.
        InterruptedSpectra: on Ctrl-C, with the vectors found so far.
    """
    losses = curvature.losses
    weights = dict(zip(losses.names, torch.eye(losses.M, dtype=torch.float64), strict=True))
    weights["pooled"] = torch.tensor(losses.shares, dtype=torch.float64)
    if lam is not None:
        weights["beta-weighted"] = weights["L_DI"] = weights_at(losses, curvature.params, lam).double().cpu()
    corrections: dict[str, Callable[[Tensor], Tensor]] = {}
    spaces: dict[str, Subspace] = {}
    found: dict[str, Eigenpairs] = {}
    spent = 0

    def products(wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal spent
        rows = torch.stack([weights[name] for name in wanted])
        images = dict(zip(wanted, curvature.products(list(wanted.values()), rows), strict=True))
        for name in corrections.keys() & wanted.keys():
            images[name] += corrections[name](wanted[name])
        spent += len(wanted)
        left = len(wanted) + len(weights) - len(found) - len(spaces)
        progress(spent, left, max(spaces[name].error for name in wanted))
        return images

    def so_far() -> dict[str, Tensor]:
        vectors = {name: pairs.vectors for name, pairs in found.items()}
        return vectors | {name: space.leading(k) for name, space in spaces.items() if space.m}

    with ended_early(so_far):
        for together in _waves(list(weights), curvature, k):
            if lam is not None and "L_DI" in together:
                corrections["L_DI"] = covariance_term(domain_gradients(losses, curvature.params), lam)
            near = found["pooled"].vectors if "pooled" in found else None
            room: dict[str, Any] = {"together": len(together), "held": bytes_of(found)}
            for name in together:
                spaces[name] = _space(curvature, k, max_products, rng, **room)
                spaces[name].give((start or {}).get(name, near))
            found |= run_together({name: _search(spaces[name], k, tol, max_products) for name in together}, products)
            spaces.clear()
    return {name: found[name] for name in weights}


def _waves(names: list[str], curvature: Curvature, k: int) -> list[list[str]]:
    """The spectra that run together, in the order in which they run: later ones can start from ``pooled``."""
    room = max(1, basis_bytes(curvature.device) // (_least(k) * 2 * row_bytes(curvature)))
    later = [name for name in names if name in ("beta-weighted", "L_DI")]
    others = [name for name in names if name not in later]
    if len(others) <= room:
        return [others, *_cut(later, room)]
    return [["pooled"], *_cut([name for name in others if name != "pooled"] + later, room)]


def _cut(names: list[str], size: int) -> list[list[str]]:
    return [names[at : at + size] for at in range(0, len(names), size)]


def _space(
    operator: SymmetricOperator | Curvature, k: int, max_products: int, rng: int, *, together: int = 1, held: int = 0
) -> Subspace:
    """An empty subspace for k pairs, with as many rows as fit, as one of ``together`` beside ``held`` bytes."""
    n, row, budget = operator.size, row_bytes(operator), basis_bytes(operator.device)
    if not 1 <= k <= n:
        raise UsageError(f"k is {k}; ask for 1 to {n} eigenpairs of a {n} x {n} operator")
    keeps_images = _least(k) * 2 * row <= budget
    needed = k if keeps_images else 2 * k
    if max_products < needed:
        raise UsageError(f"max_products is {max_products}; {k} eigenpairs need at least {needed}")
    fit = (budget - held) // (together * (1 + keeps_images) * row)
    generator = torch.Generator().manual_seed(rng)
    return Subspace(operator, generator, max_products, max(fit, _least(k)), keeps_images)


def _least(k: int) -> int:
    """The fewest vectors of a basis with which restarts cost little: they leave 2k + 4, and room for a probe."""
    return 4 * k + 10


def basis_bytes(device: torch.device) -> int:
    """What the bases that are in memory together may take, and the vectors found before."""
    return at_least_on_gpu(BASIS_BYTES, device, GPU_SHARE)


def row_bytes(operator: SymmetricOperator | Curvature) -> int:
    """Bytes of a vector."""
    return operator.size * torch.empty(0, dtype=operator.dtype).element_size()


def bytes_of(found: Mapping[str, Eigenpairs]) -> int:
    """Bytes of the eigenvectors."""
    return sum(pairs.vectors.numel() * pairs.vectors.element_size() for pairs in found.values())


class InterruptedSpectra(KeyboardInterrupt):
    """Ctrl-C during :func:`domain_spectra`; ``vectors`` (n, j) by spectrum can be its ``start`` another time."""

    def __init__(self, vectors: dict[str, Tensor]) -> None:
        super().__init__("interrupted")
        self.vectors = vectors


class StarvedSpectra(MemoryError):
    """As :class:`InterruptedSpectra`, where the memory was not enough."""

    def __init__(self, vectors: dict[str, Tensor]) -> None:
        super().__init__("out of memory")
        self.vectors = vectors


@contextlib.contextmanager
def ended_early(vectors: Callable[[], dict[str, Tensor]]) -> Iterator[None]:
    """Ctrl-C and a lack of memory leave it with the ``vectors`` found so far."""
    try:
        yield
    except (InterruptedSpectra, StarvedSpectra) as stop:
        raise type(stop)({**vectors(), **stop.vectors}) from stop
    except KeyboardInterrupt as stop:
        raise InterruptedSpectra(vectors()) from stop
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise StarvedSpectra(vectors()) from error


def run_together(
    processes: Mapping[str, Process[Found]], products: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Found]:
    """Advance the processes in lockstep: each round asks ``products`` for one image for each that is still running."""
    found: dict[str, Found] = {}

    def advance(name: str, image: Tensor | None) -> dict[str, Tensor]:
        try:
            return {name: next(processes[name]) if image is None else processes[name].send(image)}
        except StopIteration as stop:
            found[name] = stop.value
            return {}

    wanted = {name: vector for each in processes for name, vector in advance(each, None).items()}
    while wanted:
        images = products(wanted)
        following: dict[str, Tensor] = {}
        for name in wanted:
            if not bool(torch.isfinite(images[name]).all()):
                raise ComputationError(
                    f"a Hessian product{f' of {name}' if name else ''} is NaN or Inf; check the weights, "
                    "or use --dtype float64"
                )
            following |= advance(name, images[name])
        wanted = following
    return {name: found[name] for name in processes}


def _search(space: Subspace, k: int, tol: float, max_products: int) -> Process[Eigenpairs]:
    """Expand the subspace until k pairs are settled and a probe finds no other that belongs to them."""
    limit = max_products if space.keeps_images else max_products - k
    spent, probe = 0, None  # probe: the column of the basis where the probe begins
    while True:
        values, mixing, errors = space.ritz(k)
        space.error = float((errors / values.abs()).nan_to_num(0.0).max()) if len(values) == k else math.inf
        goal = (tol * values.abs()).clamp(min=space.noise)
        excess = (errors / goal).nan_to_num(0.0)  # 0/0: a zero operator, solved exactly
        settled = len(values) == k and bool((excess <= 1).all())
        if space.m == space.n or spent == limit:
            break
        direction = None
        if settled:
            if probe is None:
                if space.m + PROBE_STEPS[1] > space.capacity:  # a restart on the way would begin the probe again
                    space.restart(2 * k + 4)
                probe, direction = space.m, space.add_random()
            else:
                height, direction = space.height_from(probe)
                steps, (least, most) = space.m - probe, PROBE_STEPS
                ended = steps >= most and space.n > SMALL
                if steps >= least and (height < values[-1] - errors[-1] or ended):
                    break
        else:
            probe = None
            if len(excess):
                direction = space.residual_direction(mixing[:, int(excess.argmax())])
        if space.m == space.capacity:
            space.restart(2 * k + 4)
            probe = None
        image = yield space.choose(direction)
        space.expand(image)
        spent += 1
    return (yield from _ended(space, k, tol, spent))


def _ended(space: Subspace, k: int, tol: float, spent: int) -> Process[Eigenpairs]:
    """The leading pairs, by products that were kept or, once the basis is gone, made anew."""
    space.reduce(k)
    if space.keeps_images:
        return _checked(space.basis, space.images, tol, space.noise, spent)
    images = []
    for row in space.basis:
        images.append((yield row))
    return _checked(space.basis, torch.stack(images), tol, space.noise, spent + k)


class Subspace:
    r"""Orthonormal rows ``basis`` $Q^\top$ (m, n) and ``pending`` $U^\top$ (o, n) with $HQ=QT+UC$.

    At most ``capacity`` rows, and ``expansions`` of them in all: their memory is asked for at once, as a basis that
    grows is in memory twice. With ``keeps_images`` $HQ$ is kept too. Orthogonality is kept by the recurrence and then a
    pass or two of Gram-Schmidt against all rows. ``projected`` $T$ (m, m) and ``coupling`` $C$ (o, m) are float64 on
    the CPU; the diagonal of $T$ comes from dot products accumulated in float64.
    """

    def __init__(
        self,
        operator: SymmetricOperator | Curvature,
        generator: torch.Generator,
        expansions: int,
        capacity: int,
        keeps_images: bool,
    ) -> None:
        self.n, self._like = operator.size, (operator.device, operator.dtype)
        self.capacity, self.keeps_images = capacity, keeps_images
        self._generator = generator
        rows = min(capacity, expansions, self.n)
        like = torch.empty(0, self.n, dtype=operator.dtype, device=operator.device)
        self._stored = [like.new_empty(rows, self.n) for _ in range(1 + keeps_images)]  # basis and images
        self.pending = like
        self._project(torch.zeros(0, 0, dtype=torch.float64))
        self.coupling = torch.zeros(0, 0, dtype=torch.float64)
        self.error = math.inf  # the largest relative residual of the pairs wanted

    def give(self, vectors: Tensor | None) -> None:
        """Start along the sum of these columns (n, j), or along a random vector."""
        if vectors is not None and (vectors.ndim != 2 or len(vectors) != self.n):
            raise UsageError(f"start has shape {tuple(vectors.shape)}; give vectors as columns, ({self.n}, j)")
        row = self._random(1)[0] if vectors is None else vectors.sum(1).to(*self._like)
        if float(row.norm()) > 0:
            self.pending = (row / row.double().norm())[None]
            self.coupling = torch.zeros(1, 0, dtype=torch.float64)

    @property
    def m(self) -> int:
        """Dimension of the basis."""
        return len(self.projected)

    @property
    def basis(self) -> Tensor:
        """Orthonormal rows (m, n)."""
        return self._stored[0][: self.m]

    @property
    def images(self) -> Tensor:
        """The operator's products with them (m, n), where they are kept."""
        return self._stored[1][: self.m]

    def _project(self, projected: Tensor) -> None:
        """Set $T$, and ``noise``: what round-off alone can put into a residual."""
        self.projected = projected
        scale = float(torch.linalg.eigvalsh(projected).abs().max()) if len(projected) else 0.0
        self.noise = ROUND_OFF * torch.finfo(self._like[1]).eps * scale

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading (up to) k Ritz values (k,), their coordinates (m, k), and the norms of their residuals (k,)."""
        values, vectors = torch.linalg.eigh(self.projected)
        mixing = vectors[:, -k:].flip(1) if self.m else vectors
        return values[-k:].flip(0), mixing, (self.coupling @ mixing).norm(dim=0)

    def leading(self, k: int) -> Tensor:
        """The leading Ritz vectors (n, up to k)."""
        return (self.ritz(k)[1].T.to(self.basis) @ self.basis).T

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
        row = self._orthogonal(self._orthogonal(self._random(1)[0]))
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
            first = self.pending[0] - (self.basis @ self.pending[0]) @ self.basis
            self.pending[0] = first / first.double().norm()
        return self.pending[0]

    def expand(self, image: Tensor) -> None:
        """Move the first pending row into the basis, given its image under the operator."""
        row, known = self.pending[0], self.coupling[0]
        diagonal = inner(row[None], image[None])[0, 0]
        self.pending, self.coupling = self.pending[1:], self.coupling[1:]
        for kept, vector in zip(self._stored, (row, image), strict=False):
            kept[self.m] = vector
        self._project(
            torch.cat([torch.cat([self.projected, known[:, None]], 1), torch.cat([known, diagonal[None]])[None]])
        )
        along = inner(self.pending, image[None])
        first, last = _extent(known)  # one row in Lanczos' recurrence, all of them just after a restart
        remainder = torch.sub(image, row, alpha=float(diagonal))  # from here on in place, for large models
        remainder -= known[first:last].to(image) @ self.basis[first:last]
        before, remainder = remainder.norm(), self._orthogonal(remainder)
        if float(remainder.norm()) < 0.7 * float(before):  # the criterion of Daniel, Gragg, Kaufman and Stewart (1976)
            remainder = self._orthogonal(remainder)
        length = remainder.double().norm()
        self.coupling = torch.cat([self.coupling, along], dim=1)
        if float(length) > self.noise / 10:  # dropped parts add up
            remainder /= length.to(remainder)
            self.pending = torch.cat([self.pending, remainder[None]])
            newest = torch.zeros(1, self.m, dtype=torch.float64)
            newest[0, -1] = float(length)
            self.coupling = torch.cat([self.coupling, newest])

    def restart(self, keep: int) -> None:
        """Shrink the basis to its ``keep`` leading Ritz vectors (Wu and Simon 2000)."""
        values, mixing, _ = self.ritz(min(keep, self.m - 1))
        self._rotate(mixing)
        self._project(torch.diag(values))
        self.coupling = self.coupling @ mixing

    def reduce(self, keep: int) -> None:
        """End with the ``keep`` leading Ritz vectors alone, and give the memory of all else back."""
        values, mixing, _ = self.ritz(keep)
        self._rotate(mixing)
        self.projected = torch.diag(values)  # the round-off stays that of the whole
        self.pending, self.coupling = self.pending[:0].clone(), self.coupling[:0, : len(values)]
        for i, stored in enumerate(self._stored):
            self._stored[i] = stored[: len(values)].clone()

    def _rotate(self, mixing: Tensor) -> None:
        """Overwrite the first rows by the combinations ``mixing`` (m, j) of all; by blocks, without a second basis."""
        for stored in self._stored:
            for block in blocks(self.n):
                stored[: mixing.shape[1], block] = mixing.T.to(stored) @ stored[: self.m, block]

    def _orthogonal(self, row: Tensor) -> Tensor:
        """One pass of Gram-Schmidt, in place: what of a row (n,) is orthogonal to the basis and the pending rows."""
        for known in (self.basis, self.pending):
            row -= (row @ known.T) @ known
        return row

    def _random(self, rows: int) -> Tensor:
        """Drawn on the CPU so that every device starts alike."""
        return torch.randn(rows, self.n, generator=self._generator, dtype=torch.float64).to(*self._like)


def _checked(rows: Tensor, images: Tensor, tol: float, noise: float, spent: int) -> Eigenpairs:
    """Rayleigh-Ritz on ``rows`` (k, n) by their products ``images``, the residuals from these, intervals.

    All inner products are in float64, by blocks of the vectors: a wide copy of a large model's would take its memory
    several times. The rows are overwritten.
    """
    # orthonormal already, to the round-off of the operator's type; by Cholesky to that of float64
    straight = torch.linalg.inv(torch.linalg.cholesky(inner(rows, rows)))
    projected = straight @ inner(rows, images) @ straight.T
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    values, frame = values.flip(0), (rotation.flip(1).T @ straight).to(rows.device)
    squares = torch.zeros_like(values)
    for block in blocks(rows.shape[1]):
        wide, image = frame @ rows[:, block].double(), frame @ images[:, block].double()
        squares += (image - values.to(wide.device)[:, None] * wide).square().sum(1).cpu()
        rows[:, block] = wide.to(rows)
    residuals = squares.sqrt()
    slack = 2 * noise  # pairs closer than that cannot be told apart
    reached = residuals <= tol * values.abs()
    converged = bool((reached | (residuals <= noise)).all())
    for row in rows:
        if row[row.abs().argmax()] < 0:
            row.neg_()
    upper = _upper_bounds(values.tolist(), residuals.tolist(), slack)
    return Eigenpairs(
        values,
        rows.T,
        residuals,
        values - slack,
        torch.tensor(upper, dtype=torch.float64),
        converged,
        converged and not bool(reached.all()),
        spent,
    )


def blocks(n: int) -> list[slice]:
    """Slices of ``BLOCK`` entries of a vector of ``n``, so that none is widened whole."""
    return [slice(at, min(at + BLOCK, n)) for at in range(0, n, BLOCK)]


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of the rows of two (i, n) and (j, n), accumulated in float64, (i, j) on the CPU."""
    total = torch.zeros(len(first), len(second), dtype=torch.float64)
    for block in blocks(first.shape[1]):
        total += (first[:, block].double() @ second[:, block].double().T).cpu()
    return total


def _extent(coefficients: Tensor) -> tuple[int, int]:
    """From the first to behind the last that is not zero; (0, 0) where all are."""
    at = coefficients.nonzero()[:, 0].tolist()
    return (at[0], at[-1] + 1) if at else (0, 0)


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
