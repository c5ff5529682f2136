"""One pass for all domains: modes, kinds, kept memory and lockstep change nothing; restriction cuts a block."""

import itertools
import os
import re
import weakref

import pytest
import torch
from torch import nn

from disam_theory import operators, spectrum
from disam_theory.errors import ComputationError, UsageError
from disam_theory.linearisation import linearise
from disam_theory.losses import (
    DomainLosses,
    ModelPart,
    cross_entropy,
    layers,
    model_losses,
    parameters_of,
    quadratic_losses,
    restrict,
    squared_error,
)
from disam_theory.operators import (
    MODES,
    Curvature,
    SymmetricOperator,
    domain_gradients,
    domain_hessian,
    domain_inspired_hessian,
    hessian,
)
from disam_theory.spectrum import InterruptedSpectra, bottom_eigenpairs, domain_spectra, top_eigenpairs


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4)),
    "layer-norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), (4,)),
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "recurrent": (Recurrent, (3, 4)),
}


@pytest.fixture
def made(make_domain):
    def make(name="mlp", chunk=5):
        factory, shape = MODELS[name]
        torch.manual_seed(0)
        model = factory().double().eval()
        domains = [make_domain(f"d{i}", n, shape, rng=i) for i, n in enumerate((6, 11, 8))]
        return model, domains, model_losses(model, domains, chunk=chunk), parameters_of(model)

    return make


def dense(curvature, weights):
    return curvature.operator(weights).dense()


@pytest.mark.parametrize("name", MODELS)
def test_modes_and_memory_do_not_change_the_hessian(made, name):
    _, _, losses, params = made(name)
    weights = [0.2, -0.3, 1.1]
    reference = dense(Curvature(losses, params, mode="forward"), weights)
    for mode in ("kept", "batched", "linearised"):
        for memory in (0, 3000, None):
            kept = dense(Curvature(losses, params, mode=mode, memory=memory), weights)
            torch.testing.assert_close(kept, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_with_several_vectors_is_as_many_products(made, mode):
    _, _, losses, params = made("layer-norm")
    curvature = Curvature(losses, params, mode=mode)
    vectors = list(torch.randn(3, curvature.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    weights = torch.tensor([[0.2, -0.3, 1.1], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    images = curvature.products(vectors, weights)
    for vector, row, image in zip(vectors, weights, images, strict=True):
        alone = Curvature(losses, params, mode="forward").operator(row).matvec(vector)
        torch.testing.assert_close(image, alone, rtol=1e-10, atol=1e-12)


def test_one_trace_serves_all_micro_batches_of_a_shape(made, monkeypatch):
    """Sizes 6, 11, 8 in batches of 5: traces for 5, 1 and 3 samples; a bare function is traced alone."""
    from disam_theory import operators

    traced = []

    def counted(function, params, data):
        traced.append(tuple(x.shape[0] for x in data))
        return linearise(function, params, data)

    monkeypatch.setattr(operators, "linearise", counted)
    _, _, losses, params = made()
    dense(Curvature(losses, params, mode="linearised", memory=0), losses.shares)
    assert sorted(traced) == [(1, 1), (3, 3), (5, 5)]
    frozen, part = restrict(losses, params, "0.*")
    whole = dense(Curvature(losses, params), losses.shares)
    block = dense(Curvature(frozen, part, mode="linearised"), losses.shares)
    torch.testing.assert_close(block, whole[: len(block), : len(block)], rtol=1e-10, atol=1e-12)


def branch(params):
    return params["w"].sum() ** 2 if params["w"].sum() > 0 else params["w"].sum()


def masked(params):
    return params["w"][params["w"] > 0].square().mean()


@pytest.mark.parametrize("part", [branch, masked])
def test_what_depends_on_the_values_is_not_linearised(part):
    """One trace would give the branch, or the number selected, of the first micro-batch to all."""
    losses = DomainLosses(("a",), (2,), ((part,),))
    curvature = Curvature(losses, {"w": torch.ones(2)}, mode="linearised")
    with pytest.raises(UsageError, match=r"cannot be traced; try another mode"):
        curvature.operator([1.0]).matvec(torch.ones(2))


def test_no_more_graphs_are_kept_than_fit(made):
    _, _, losses, params = made(chunk=2)
    counts = []
    for memory in (0, 4000, 8000, 10**9):
        curvature = Curvature(losses, params, memory=memory)
        curvature.operator([1.0, 1.0, 1.0]).matvec(torch.ones(curvature.size, dtype=torch.float64))
        counts.append(len(curvature._kept))
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert 0 < counts[1] < counts[-1] == sum(len(parts) for parts in losses.parts)


@pytest.mark.parametrize("name", ["mlp", "conv", "linear"])
def test_gauss_newton_and_fisher_are_their_definitions(made, name):
    model, domains, losses, params = made(name)
    names = list(params)
    for i, domain in enumerate(domains):
        ggn = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float64).diag()
        fisher = torch.zeros_like(ggn)
        for x, y in zip(domain.inputs, domain.labels, strict=True):
            outputs = model(x[None])
            rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in outputs[0]]
            jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            p = outputs[0].detach().softmax(0)
            ggn += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(domain)
            loss = cross_entropy(outputs, y[None]).sum()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            fisher += torch.outer(gradient, gradient) / len(domain)
        unit = torch.eye(3)[i]
        assert names == [n for n, _ in model.named_parameters()]
        torch.testing.assert_close(dense(Curvature(losses, params, kind="ggn"), unit), ggn, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dense(Curvature(losses, params, kind="fisher"), unit), fisher, rtol=1e-9, atol=1e-12)


def test_the_gauss_newton_of_a_linear_model_is_its_hessian(made, make_domain):
    _, _, losses, params = made("linear")
    ggn = dense(Curvature(losses, params, kind="ggn"), losses.shares)
    torch.testing.assert_close(ggn, dense(Curvature(losses, params), losses.shares), rtol=1e-9, atol=1e-12)
    domain = make_domain("r", 7)
    regression = model_losses(nn.Linear(4, 1).double(), [domain], criterion=squared_error)
    at = {"weight": torch.ones(1, 4, dtype=torch.float64), "bias": torch.zeros(1, dtype=torch.float64)}
    features = torch.cat([domain.inputs, torch.ones(7, 1)], dim=1)
    torch.testing.assert_close(dense(Curvature(regression, at, kind="ggn"), [1.0]), features.T @ features / 7)


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_a_bare_function_has_no_outputs(kind):
    losses = quadratic_losses(torch.zeros(1, 2), torch.eye(2)[None], torch.zeros(1))
    with pytest.raises(UsageError, match=f"{kind} needs a model's outputs"):
        Curvature(losses, {"w": torch.zeros(2)}, kind=kind).operator([1.0]).matvec(torch.ones(2))


@pytest.mark.parametrize(("option", "name"), [("kind", "hesian"), ("mode", "keep")])
def test_unknown_kinds_and_modes_are_refused(made, option, name):
    _, _, losses, params = made()
    with pytest.raises(UsageError, match=f"unknown {option} of curvature '{name}': did you mean"):
        Curvature(losses, params, **{option: name})


def test_any_closure_will_do():
    """A loss of no inputs and labels: Rosenbrock's function, whose Hessian is known."""

    def rosenbrock(params):
        x, y = params["x"]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    losses = DomainLosses(("rosenbrock",), (1,), ((rosenbrock,),))
    params = {"x": torch.tensor([-1.2, 1.0], dtype=torch.float64)}
    exact = torch.tensor([[2 - 400 * (1.0 - 3 * 1.44), 480.0], [480.0, 200.0]], dtype=torch.float64)
    for mode in MODES:
        torch.testing.assert_close(dense(Curvature(losses, params, mode=mode), [1.0]), exact)


def test_a_restricted_hessian_is_a_diagonal_block(made):
    _, _, losses, params = made()
    whole = hessian(losses, params, weights=losses.shares).dense()
    start = 0
    for name in params:
        part_losses, part = restrict(losses, params, name)
        end = start + params[name].numel()
        block = hessian(part_losses, part, weights=losses.shares).dense()
        torch.testing.assert_close(block, whole[start:end, start:end], rtol=1e-10, atol=1e-13)
        start = end
    _, layer = restrict(losses, params, "0.*")
    assert list(layer) == ["0.weight", "0.bias"]
    with pytest.raises(UsageError, match=r"unknown parameter '3\.\*'"):
        restrict(losses, params, "3.*")


def test_the_model_is_left_alone(made):
    model, domains, _, _ = made()
    model.train()
    losses, params = model_losses(model, domains), parameters_of(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    curvature = Curvature(losses, params)
    first = dense(curvature, losses.shares)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # an optimizer's step in place does not reach the kept graphs
    torch.testing.assert_close(dense(curvature, losses.shares), first, rtol=0, atol=0)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(
        torch.equal(p - 1.0, before[name]) or p.dtype != before[name].dtype for name, p in model.state_dict().items()
    )


def test_spectra_in_lockstep_equal_spectra_alone(made):
    _, _, losses, params = made()
    together = domain_spectra(Curvature(losses, params, memory=0), 3, lam=0.4, tol=1e-9)
    alone = {name: domain_hessian(losses, params, name) for name in losses.names}
    alone |= {
        "pooled": hessian(losses, params, weights=losses.shares),
        "L_DI": domain_inspired_hessian(losses, params, 0.4),
    }
    assert list(together) == [*losses.names, "pooled", "beta-weighted", "L_DI"]
    for name, operator in alone.items():
        exact = torch.linalg.eigvalsh(operator.dense()).flip(0)[:3]
        torch.testing.assert_close(together[name].values, exact, rtol=1e-9, atol=1e-12)
        assert together[name].converged


def test_a_pass_evaluates_each_micro_batch_once_for_all_spectra(made):
    _, _, losses, params = made()
    calls = []

    def counted(part):
        def function(at):
            calls.append(part)
            return part(at)

        return function

    counting = DomainLosses(
        losses.names, losses.sizes, tuple(tuple(counted(p) for p in parts) for parts in losses.parts)
    )
    batches = sum(len(parts) for parts in losses.parts)
    domain_spectra(Curvature(counting, params), 2)
    assert len(calls) == batches  # every graph is kept and serves all four spectra
    calls.clear()
    vectors = [torch.ones(Curvature(losses, params).size, dtype=torch.float64)] * 4
    Curvature(counting, params, memory=0).products(vectors, torch.ones(4, 3))
    assert len(calls) == batches


def test_a_warm_start_saves_products_and_changes_no_value(made):
    _, _, losses, params = made()
    cold = domain_spectra(Curvature(losses, params), 2, tol=1e-6)
    moved = {name: p + 1e-4 for name, p in params.items()}
    again = domain_spectra(Curvature(losses, moved), 2, tol=1e-6)
    warm = domain_spectra(Curvature(losses, moved), 2, tol=1e-6, start={n: p.vectors for n, p in cold.items()})
    for name in warm:
        torch.testing.assert_close(warm[name].values, again[name].values, rtol=1e-9, atol=1e-12)
    assert sum(p.products for p in warm.values()) < sum(p.products for p in again.values())


def test_batch_statistics_are_used_and_not_tracked(make_domain):
    """With them the Hessian is that of the network in training mode, one micro-batch at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    domains = [make_domain("a", 8, (3,), rng=0), make_domain("b", 6, (3,), rng=1)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    params = parameters_of(model)
    operators = {
        choice: hessian(model_losses(model, domains, chunk=4, batch_statistics=choice), params, weights=[1.0, 0.0])
        for choice in (False, True)
    }

    def loss(vector):
        pieces = dict(zip(params, vector.split([p.numel() for p in params.values()]), strict=True))
        w = {name: piece.view(params[name].shape) for name, piece in pieces.items()}
        total = 0.0
        for x, y in zip(domains[0].inputs.split(4), domains[0].labels.split(4), strict=True):
            z = x @ w["0.weight"].T + w["0.bias"]
            z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() * w["1.weight"] + w["1.bias"]
            total = total + nn.functional.cross_entropy(z.tanh() @ w["3.weight"].T + w["3.bias"], y) / 2
        return total

    exact = torch.autograd.functional.hessian(loss, torch.cat([p.reshape(-1) for p in params.values()]))
    torch.testing.assert_close(operators[True].dense(), exact, rtol=1e-9, atol=1e-12)
    assert float((operators[False].dense() - exact).norm()) > 0.1 * float(exact.norm())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, up):
        return 2 * ctx.saved_tensors[0] * up


BACKWARD = ("kept", "batched")  # the modes that differentiate a graph backward again
ONCE = ("Squared is marked once_differentiable", "In order to use an autograd.Function")
CTC = ("derivative for aten::_ctc_loss_backward", "forward AD with _ctc_loss")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("loss", "reasons"), [("squared", ONCE), ("ctc", CTC)])
def test_what_cannot_be_differentiated_twice_is_named(mode, loss, reasons):
    """Autograd alone would leave out the part of a once-differentiable function, and give a wrong product."""

    def part(params):
        if loss == "squared":
            return Squared.apply(params["w"]).sum()
        scores = params["w"].view(4, 1, 3).log_softmax(-1)
        return nn.functional.ctc_loss(scores, torch.tensor([[1]]), (4,), (1,))

    losses = DomainLosses(("a",), (2,), ((part,),))
    curvature = Curvature(losses, {"w": torch.linspace(0, 1, 12)}, mode=mode)
    with pytest.raises(UsageError, match=f"cannot be differentiated twice: .*{reasons[mode not in BACKWARD]}"):
        curvature.operator([1.0]).matvec(torch.ones(12))


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_does_not_depend_on_the_parameters_has_no_curvature(mode):
    losses = DomainLosses(("a",), (2,), ((lambda params: torch.tensor(3.0),),))
    curvature = Curvature(losses, {"w": torch.ones(2)}, mode=mode)
    assert torch.equal(curvature.operator([1.0]).dense(), torch.zeros(2, 2))
    assert torch.equal(domain_gradients(losses, curvature.params), torch.zeros(1, 2))


def test_layers_are_the_diagonal_blocks(made):
    _, _, losses, params = made()
    groups = layers(params)
    assert groups == {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"]}
    whole = dense(Curvature(losses, params), losses.shares)
    first = dense(Curvature(*restrict(losses, params, *groups["0"])), losses.shares)
    second = dense(Curvature(*restrict(losses, params, *groups["2"])), losses.shares)
    torch.testing.assert_close(first, whole[: len(first), : len(first)])
    torch.testing.assert_close(second, whole[len(first) :, len(first) :])


def test_an_interrupted_search_gives_what_it_has(made):
    _, _, losses, params = made()
    curvature = Curvature(losses, params)

    def stop_late(products, running, error):
        if products >= 40:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedSpectra) as stopped:
        domain_spectra(curvature, 2, tol=1e-9, progress=stop_late)
    whole = domain_spectra(curvature, 2, tol=1e-9)
    rest = domain_spectra(curvature, 2, tol=1e-9, start=stopped.value.vectors)
    assert set(stopped.value.vectors) == set(whole)
    for name, pairs in whole.items():
        torch.testing.assert_close(rest[name].values, pairs.values)
    assert sum(p.products for p in rest.values()) < sum(p.products for p in whole.values())


def operator(matrix):
    return SymmetricOperator(len(matrix), matrix.dtype, torch.device("cpu"), lambda v: matrix @ v)


def random_problem(index):
    """A small symmetric matrix of one of seven kinds, an accuracy and a rank, all determined by ``index``."""
    generator = torch.Generator().manual_seed(index)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    n = pick([1, 2, 3, 5, 8, 13, 20, 40])
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    kinds = {
        "gauss": normal,
        "repeated": torch.randint(-2, 3, (n,), generator=generator).double(),
        "low rank": torch.where(torch.arange(n) < 3, normal, 0.0),
        "zero": torch.zeros(n, dtype=torch.float64),
        "negative": -normal.abs(),
        "cluster": 1 + 1e-5 * normal,
        "decay": 10.0 ** -torch.arange(n).double() * normal.sign(),
    }
    values = kinds[pick(list(kinds))]
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    matrix = ((basis * values) @ basis.T).to(pick([torch.float32, torch.float64]))
    return (matrix + matrix.T) / 2, pick(range(1, min(n, 6) + 1)), pick([1e-1, 1e-3, 1e-6])


@pytest.mark.parametrize("end", ["top", "bottom"])
def test_every_interval_holds_the_dense_eigenvalue(end):
    find = top_eigenpairs if end == "top" else bottom_eigenpairs
    for index in range(int(os.environ.get("RANDOM_PROBLEMS", "400"))):  # 10,000 before a release
        matrix, k, tol = random_problem(index)
        exact = torch.linalg.eigvalsh(matrix.double())
        exact = exact.flip(0)[:k] if end == "top" else exact[:k]
        pairs = find(operator(matrix), k, tol=tol, rng=index)
        assert bool(((pairs.lower <= exact) & (exact <= pairs.upper)).all()), index
        assert bool((pairs.lower <= pairs.values).all() and (pairs.values <= pairs.upper).all())


def test_temples_bound_is_sharper_than_the_residual():
    matrix = torch.diag(torch.tensor([10.0, 5.0, *torch.linspace(0, 1, 60).tolist()], dtype=torch.float64))
    pairs = top_eigenpairs(operator(matrix), 2, tol=1e-3)
    assert float(pairs.residuals[0]) > 0
    assert float(pairs.upper[0] - pairs.lower[0]) < 0.1 * float(pairs.residuals[0])


@pytest.mark.parametrize("k", [1, 4])
def test_restarts_bound_the_memory_and_keep_the_accuracy(monkeypatch, k):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64)).Q
    matrix = (basis * torch.linspace(0, 1, 300, dtype=torch.float64) ** 3) @ basis.T
    monkeypatch.setattr(spectrum, "BASIS_BYTES", 0)
    largest = itertools.count()
    sizes = []
    original = spectrum.Subspace.expand

    def watched(self, image):
        original(self, image)
        sizes.append(self.m)
        next(largest)

    monkeypatch.setattr(spectrum.Subspace, "expand", watched)
    pairs = top_eigenpairs(operator((matrix + matrix.T) / 2), k, tol=1e-7, max_products=2000)
    assert pairs.converged
    assert max(sizes) <= 4 * k + 10 < len(sizes)
    assert pairs.products < 400  # the probe comes to its end: a restart does not begin it again and again
    torch.testing.assert_close(pairs.values, torch.linspace(0, 1, 300, dtype=torch.float64).flip(0)[:k] ** 3)


@pytest.mark.parametrize("k", [1, 3])
def test_products_that_are_not_kept_are_made_anew(monkeypatch, k):
    """The same pairs, for k products more, which count among the products to spend at most."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
    matrix = (basis * torch.linspace(0, 1, 200, dtype=torch.float64) ** 8) @ basis.T
    vectors = []

    def product(vector):
        vectors.append(vector.clone())
        return matrix @ vector

    made = SymmetricOperator(200, torch.float64, torch.device("cpu"), product)
    kept = top_eigenpairs(made, k, tol=1e-8)
    vectors.clear()
    monkeypatch.setattr(spectrum, "BASIS_BYTES", 2 * (4 * k + 10) * 200 * 8 - 1)
    anew = top_eigenpairs(made, k, tol=1e-8)
    assert anew.converged
    assert len(vectors) == anew.products
    torch.testing.assert_close(torch.stack(vectors[-k:], dim=1).abs(), anew.vectors.abs(), atol=1e-9, rtol=0)
    torch.testing.assert_close(anew.values, kept.values, rtol=1e-12, atol=0)
    exact = (matrix @ anew.vectors - anew.vectors * anew.values).norm(dim=0)
    torch.testing.assert_close(anew.residuals, exact, rtol=1e-3, atol=1e-14)
    vectors.clear()
    assert not top_eigenpairs(made, k, tol=1e-8, max_products=2 * k).converged
    assert len(vectors) == 2 * k
    with pytest.raises(UsageError, match=f"at least {2 * k}"):
        top_eigenpairs(made, k, max_products=2 * k - 1)


def test_what_was_found_leaves_less_room(made, monkeypatch):
    """Bases and eigenvectors together stay below the limit as long as the smallest basis allows it."""
    _, _, losses, params = made()
    curvature = Curvature(losses, params)
    monkeypatch.setattr(spectrum, "BASIS_BYTES", 35 * spectrum.row_bytes(curvature))
    capacities, begin = [], spectrum.Subspace.__init__

    def begun(space, *arguments):
        begin(space, *arguments)
        capacities.append((space.capacity, space.keeps_images))

    monkeypatch.setattr(spectrum.Subspace, "__init__", begun)
    domain_spectra(curvature, 2, lam=0.4, tol=1e-3)
    expected = [max(18, 35 - 2 * found) for found in range(len(losses.names) + 3)]
    assert capacities == [(rows, False) for rows in expected]


def test_large_spectra_run_in_turn_with_one_basis_at_a_time(made, monkeypatch):
    """The values are those of the lockstep; what comes later starts from the pooled vectors."""
    _, _, losses, params = made()
    curvature = Curvature(losses, params)
    together = domain_spectra(curvature, 2, lam=0.4, tol=1e-9)
    monkeypatch.setattr(spectrum, "BASIS_BYTES", 0)
    alive: weakref.WeakSet = weakref.WeakSet()
    running, spaces, products, begin = [], [], curvature.products, spectrum.Subspace.__init__

    def watched(vectors, weights):
        running.append(weights.tolist())
        spaces.append(len(alive))
        return products(vectors, weights)

    def begun(space, *arguments):
        begin(space, *arguments)
        alive.add(space)

    monkeypatch.setattr(curvature, "products", watched)
    monkeypatch.setattr(spectrum.Subspace, "__init__", begun)
    left = []
    in_turn = domain_spectra(
        curvature, 2, lam=0.4, tol=1e-9, progress=lambda products, waiting, error: left.append(waiting)
    )
    assert list(in_turn) == list(together)
    for name, pairs in in_turn.items():
        assert pairs.converged
        torch.testing.assert_close(pairs.values, together[name].values, rtol=1e-9, atol=1e-12)
    assert {len(rows) for rows in running} == {1}
    assert set(spaces) == {1}
    assert running[0] == [pytest.approx(losses.shares)]
    assert left == sorted(left, reverse=True)
    assert {left[0], left[-1]} == {6, 1}


def test_the_weighted_spectra_start_from_the_pooled_one(made):
    _, _, losses, params = made()
    first = domain_spectra(Curvature(losses, params), 1, lam=0.01, tol=1e-8)
    assert first["beta-weighted"].products < first["pooled"].products


def test_an_interruption_between_spectra_in_turn_keeps_those_found(made, monkeypatch):
    _, _, losses, params = made()
    monkeypatch.setattr(spectrum, "BASIS_BYTES", 0)

    def stop_late(products, waiting, error):
        if waiting == 2:  # pooled and two of the three domains are done, or nearly
            raise KeyboardInterrupt

    with pytest.raises(InterruptedSpectra) as stopped:
        domain_spectra(Curvature(losses, params), 2, tol=1e-9, progress=stop_late)
    assert list(stopped.value.vectors)[:2] == ["pooled", "d0"]
    assert "d2" not in stopped.value.vectors
    rest = domain_spectra(Curvature(losses, params), 2, tol=1e-9, start=stopped.value.vectors)
    assert all(pairs.converged for pairs in rest.values())


def test_micro_batches_fit_their_graph(made, monkeypatch):
    """Bytes are affine in the samples: the graph of the number found fits, and that of one more does not."""
    model, domains, _, _ = made("conv")
    leaves = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}

    def taken(n):
        part = ModelPart(model, domains[1].inputs[:n], domains[1].labels[:n], cross_entropy, 1.0)
        return operators._double_backward(part, leaves, batched=False)[1]

    for budget in (taken(1), taken(4), taken(7) + 1):
        monkeypatch.setattr(operators, "GRAPH_BYTES", budget)
        n = operators.fitting_chunk(model, [domains[1]], 1024)
        assert taken(n) <= budget < taken(n + 1)
        assert operators.fitting_chunk(model, [domains[1]], n - 1 or 1) == (n - 1 or 1)
    monkeypatch.setattr(operators, "GRAPH_BYTES", 0)
    assert operators.fitting_chunk(model, [domains[1]], 1024) == 1
    assert (
        operators.fitting_chunk(nn.Linear(7, 2).double(), [domains[1]], 1024) == 1024
    )  # refused where it is first used


def test_graphs_are_kept_only_where_many_of_them_fit(made):
    _, _, losses, params = made()
    bytes_of_one = operators._double_backward(
        losses.parts[1][0], {name: p.clone().requires_grad_(True) for name, p in params.items()}, batched=False
    )[1]
    for memory, some in ((0.5 * bytes_of_one, False), (1.05 * bytes_of_one, False), (4 * bytes_of_one, True)):
        curvature = Curvature(losses, params, memory=int(memory))
        curvature.operator(losses.shares).matvec(torch.ones(curvature.size, dtype=torch.float64))
        assert bool(curvature._kept) is some


def test_a_tolerance_below_round_off_stops_and_says_what_it_reached():
    matrix = torch.diag(torch.linspace(1, 2, 50, dtype=torch.float32))
    pairs = top_eigenpairs(operator(matrix), 1, tol=1e-30)
    assert pairs.converged
    assert pairs.at_round_off
    assert "round-off" in repr(pairs)
    assert float(pairs.residuals[0]) <= 100 * torch.finfo(torch.float32).eps * 2
    assert pairs.products < 300


def test_a_start_of_wrong_shape_is_refused():
    with pytest.raises(UsageError, match=r"start has shape \(3,\)"):
        top_eigenpairs(operator(torch.eye(3)), start=torch.ones(3))


def test_a_product_that_is_not_finite_names_its_spectrum(made):
    model, domains, _, _ = made()

    def overflowing(outputs, labels):
        return cross_entropy(outputs, labels) * torch.exp(1e5 * outputs[:, 0] ** 2)

    losses = model_losses(model, domains, criterion=overflowing)
    with pytest.raises(ComputationError, match="a Hessian product of d0 is NaN or Inf"):
        domain_spectra(Curvature(losses, parameters_of(model)))


def test_a_reader_sees_values_and_residuals():
    text = repr(top_eigenpairs(operator(torch.diag(torch.tensor([2.0, 1.0]))), 2))
    assert re.fullmatch(r"Eigenpairs\(2 ± \S+, 1 ± \S+; converged after \d products\)", text)
