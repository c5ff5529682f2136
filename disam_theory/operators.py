r"""(domain losses, params) -> Hessians as linear operators: one domain, any weighting of them, $L_{DI}$.

Vectors are flat: the parameters in the dict's order, each flattened, in one vector of ``n`` numbers. Nothing here uses
``jacrev``: in torch 2.13 a ``jvp`` through ``jacrev``, and so ``torch.func.hessian``, is silently wrong through
LayerNorm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from disam_theory.domains import Domain
from disam_theory.errors import UsageError, first_line, unknown_name
from disam_theory.linearisation import Linearised, linearise
from disam_theory.losses import DomainLosses, ModelPart, Params, Part, cross_entropy
from disam_theory.memory import out_of_memory
from disam_theory.perturbations import disam_weights

if TYPE_CHECKING:
    import scipy.sparse.linalg

KINDS = ("hessian", "ggn", "fisher")
MODES = ("kept", "batched", "linearised", "forward")
Product = Callable[[Tensor], Tensor]  # (T, n) -> (T, n), a product with each row
GRAPH_BYTES = 5 * 2**28  # what the graph of one micro-batch's gradient may take; a product takes about as much again
GPU_SHARE = 16  # on a GPU, that part of its memory if it is more
WORTH_KEEPING = 0.25  # with a smaller share of the graphs kept, a product saves less than a tenth of its time


@dataclass(frozen=True)
class SymmetricOperator:
    """A symmetric matrix (n, n) known by its products."""

    size: int
    dtype: torch.dtype
    device: torch.device
    matvec: Callable[[Tensor], Tensor]  # (n,) -> (n,)
    at_once: Callable[[Tensor], Tensor] | None = None  # (n, k) -> (n, k), where one pass over the data can do it

    def matmat(self, block: Tensor) -> Tensor:
        """The products with the columns of ``block`` (n, k), as (n, k)."""
        if self.at_once is not None:
            return self.at_once(block)
        return torch.stack([self.matvec(column) for column in block.T], dim=1)

    def dense(self) -> Tensor:
        """The matrix itself (n, n), by n products; for small n."""
        return self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A SciPy ``LinearOperator`` view, for ``eigsh`` and the like; products run on this operator's device."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def product(v: np.ndarray) -> np.ndarray:
            vector = torch.as_tensor(v.reshape(-1), dtype=self.dtype, device=self.device)
            return self.matvec(vector).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator((self.size, self.size), matvec=product, rmatvec=product, dtype=numpy_dtype)


class Curvature:
    r"""Products of the domains' curvature matrices at ``params`` with many vectors, in one pass over the data.

    ``kind`` is the matrix $A_i$ of domain i: ``hessian`` $\nabla^2L_i$; ``ggn`` the generalised Gauss-Newton
    $\frac1{n_i}\sum_jJ_j^\top\nabla^2\ell(z_j)J_j$ with $J_j$ the Jacobian of the outputs $z_j$ (Schraudolph 2002);
    ``fisher`` the empirical Fisher $\frac1{n_i}\sum_jg_jg_j^\top$ of the samples' gradients (Kunstner et al. 2019).
    Each $A_i$ is the sum of its micro-batches' shares, so the chunk size does not change a product.

    ``mode`` is how Hessian products are made: ``kept`` differentiates the gradient's graph backward again, and keeps
    the graphs of as many micro-batches as fit into ``memory`` bytes (a quarter of what is free, unless given; none
    where less than a quarter of them would fit): about 2 gradients a product where kept, 3 where not. ``batched`` is
    the same with all vectors of a pass in one backward pass. ``linearised`` traces the product once, at the cost of
    about 25 gradients, and binds the trace to each micro-batch (:mod:`disam_theory.linearisation`): 1.7 to 2 gradients
    a product where bound, 3 where not. ``forward`` is ``jvp(grad)``, forward over reverse: nothing is kept, the least
    memory, 3 to 4 gradients a product.
    The modes agree to round-off.
    """

    def __init__(
        self,
        losses: DomainLosses,
        params: Params,
        *,
        kind: str = "hessian",
        mode: str = "kept",
        memory: int | None = None,
    ) -> None:
        for what, name, known in (("kind", kind, KINDS), ("mode", mode, MODES)):
            if name not in known:
                raise unknown_name(f"{what} of curvature", name, known)
        self.losses = losses
        self.params = {name: p.detach() for name, p in params.items()}
        first = next(iter(self.params.values()))
        self.size, self.dtype, self.device = _size(self.params), first.dtype, first.device
        self._kind, self._mode = kind, mode
        self._memory = _free_bytes(self.device) // 4 if memory is None else memory
        self._leaves = {name: p.clone().requires_grad_(True) for name, p in self.params.items()}
        self._kept: dict[Part, Product] = {}
        self._traced: dict[Hashable, Linearised] = {}

    def products(self, vectors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        r"""$\sum_iw_{ti}A_iv_t$ for T ``vectors`` (n,) and ``weights`` (T, M).

        A domain of weight zero is not evaluated; a micro-batch's graph serves all the vectors. Where the memory is not
        enough the graphs that were kept go, and no more are.
        """
        try:
            totals = self._own_products(vectors, weights)
        except (MemoryError, RuntimeError) as error:
            if not (self._kept and out_of_memory(error)):
                raise
            totals = None
        if totals is None:
            self._kept.clear()
            self._memory = 0
            totals = self._own_products(vectors, weights)
        return [self.losses.ranks.total(total) for total in totals]

    def _own_products(self, vectors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        """This process's share of the products."""
        rows = weights.tolist()
        totals = [torch.zeros_like(vector) for vector in vectors]
        for i, parts in enumerate(self.losses.parts):
            active = [t for t, row in enumerate(rows) if row[i] != 0.0]
            for part in parts if active else ():
                product = self._kept.get(part) or self._bind(part, keep=isinstance(parts, tuple))
                images = product(torch.stack([vectors[t] for t in active]) if active[1:] else vectors[active[0]][None])
                for t, image in zip(active, images, strict=True):
                    totals[t] += rows[t][i] * image
                del product  # its graph goes before the next one is built
        return totals

    def operator(self, weights: Sequence[float] | Tensor) -> SymmetricOperator:
        r"""$\sum_iw_iA_i$ for ``weights`` (M,)."""
        row = torch.as_tensor(weights, dtype=torch.float64).reshape(1, -1)
        if row.shape[1] != self.losses.M:
            raise UsageError(f"{row.shape[1]} weights for {self.losses.M} domains; give one weight a domain")

        def at_once(block: Tensor) -> Tensor:
            return torch.stack(self.products(list(block.T), row.expand(block.shape[1], -1)), dim=1)

        return SymmetricOperator(
            self.size, self.dtype, self.device, lambda vector: self.products([vector], row)[0], at_once
        )

    def _bind(self, part: Part, *, keep: bool) -> Product:
        """The product with one micro-batch's matrix; kept for the next pass if asked to and its graph fits."""
        if self._kind != "hessian":
            return _each(_gauss_newton(part, self.params) if self._kind == "ggn" else _fisher(part, self.params))
        if self._mode == "forward":
            return _each(_forward_over_reverse(part, self.params))
        if self._mode == "linearised":
            product, taken = _linearised(part, self.params, self._traced)
        else:
            product, taken = _double_backward(part, self._leaves, batched=self._mode == "batched")
        if not self._kept and taken * sum(map(len, self.losses.parts)) * WORTH_KEEPING > self._memory:
            self._memory = 0
        if keep and taken <= self._memory:
            self._memory -= taken
            self._kept[part] = product
        return product


def _each(product: Callable[[Tensor], Tensor]) -> Product:
    """A product with one vector, made one with each row."""
    return lambda block: torch.stack([product(vector) for vector in block])


def _forward_over_reverse(part: Part, params: Params) -> Callable[[Tensor], Tensor]:
    def product(vector: Tensor) -> Tensor:
        with twice_differentiable():
            image: Params = jvp(grad(part), (params,), (unflatten(vector, params),))[1]
        return flatten(image)

    return product


def _linearised(part: Part, params: Params, traced: dict[Hashable, Linearised]) -> tuple[Product, int]:
    """The product of a trace bound to ``part``, and the bytes that the binding holds; traces are added to ``traced``.

    Micro-batches of one model and one shape share a trace; a bare function has its own.
    """
    function: Callable[..., Tensor] = part
    data: tuple[Tensor, ...] = ()
    key: Hashable = part
    weight = 1.0
    if isinstance(part, ModelPart):
        function, data, weight = part.on, (part.inputs, part.labels), part.weight
        held = tuple(id(value) for value in part.frozen.values())
        key = (id(part.model), part.criterion, held, *((x.shape, x.dtype) for x in data))
    with twice_differentiable():
        if key not in traced:
            traced[key] = linearise(function, params, data)
        program = traced[key]
        kept = program.binding(*params.values(), *data)

    def product(vector: Tensor) -> Tensor:
        images = program.product(*unflatten(vector, params).values(), *kept)
        return weight * torch.cat([image.reshape(-1) for image in images])

    own = {p.untyped_storage().data_ptr() for p in params.values()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    taken = sum(size for place, size in storages.items() if place not in own)
    return _each(product), taken


def _double_backward(part: Part, leaves: Params, *, batched: bool) -> tuple[Product, int]:
    """The product through a graph of the gradient that is built once, and the bytes that the graph holds."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would be a cycle, and the graph never freed

    inputs = list(leaves.values())
    with torch.enable_grad(), twice_differentiable(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        value = part(leaves)
        _refuse_once_differentiable(value)
        constant = not value.requires_grad
        first = () if constant else torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
    curved = [j for j, g in enumerate(first) if g.requires_grad]  # elsewhere the loss is linear

    def product(vectors: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(vectors)
        pieces = list(unflatten(vectors, leaves).values())
        with twice_differentiable():
            images = torch.autograd.grad(
                [first[j] for j in curved],
                inputs,
                [pieces[j] for j in curved],
                retain_graph=True,
                materialize_grads=True,
                is_grads_batched=batched,
            )
        return torch.cat([image.reshape(*vectors.shape[:-1], -1) for image in images], dim=-1)

    return product if batched else _each(product), sum(storages.values())


def fitting_chunk(model: nn.Module, domains: Iterable[Domain], most: int) -> int:
    """At most ``most`` samples (at least 1) of any of ``domains``: those whose graph fits into ``GRAPH_BYTES``.

    What one sample adds is the graph of two less that of one; so the same model and data give the same number.
    Where the model cannot take the samples, ``most``.
    """
    alike = {domain.inputs.shape[1:]: domain for domain in domains}  # samples of one shape have graphs of one size
    return min(_fitting_chunk(model, domain, most) for domain in alike.values()) if most > 1 else most


def _fitting_chunk(model: nn.Module, domain: Domain, most: int) -> int:
    sizes = []
    leaves = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    try:
        for n in (1, 2):
            part = ModelPart(model, domain.inputs[:n], domain.labels[:n], cross_entropy, 1.0)
            sizes.append(_double_backward(part, leaves, batched=False)[1])
    except Exception:  # whatever the model's own code raises; said better where the data are first used
        return most
    fixed, each = 2 * sizes[0] - sizes[1], max(1, sizes[1] - sizes[0])
    return max(1, min(most, (at_least_on_gpu(GRAPH_BYTES, domain.inputs.device, GPU_SHARE) - fixed) // each))


def at_least_on_gpu(size: int, device: torch.device, share: int) -> int:
    """``size``, and on a GPU that part of its memory if it is more; not of what is free, so that runs repeat."""
    return max(size, torch.cuda.get_device_properties(device).total_memory // share) if device.type == "cuda" else size


def _refuse_once_differentiable(value: Tensor) -> None:
    """Autograd takes what such a function leaves out of a second derivative for zero, mostly without an error."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        function = getattr(node, "_forward_cls", None)  # of an autograd.Function written in Python
        if function and function.backward.__code__.co_filename == torch.autograd.function.__file__:
            raise UsageError(
                f"{NOT_TWICE}: {function.__name__} is marked once_differentiable; give it a double backward"
            )
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]


def _gauss_newton(part: Part, params: Params) -> Callable[[Tensor], Tensor]:
    model_part = _with_outputs(part, "ggn")

    def product(vector: Tensor) -> Tensor:
        with twice_differentiable():
            outputs, moved = jvp(model_part.outputs, (params,), (unflatten(vector, params),))[:2]
            bent = jvp(grad(model_part.of_outputs), (outputs,), (moved,))[1]
            image: Params = vjp(model_part.outputs, params)[1](bent)[0]
        return flatten(image)

    return product


def _fisher(part: Part, params: Params) -> Callable[[Tensor], Tensor]:
    model_part = _with_outputs(part, "fisher")

    def product(vector: Tensor) -> Tensor:
        with twice_differentiable():
            along = jvp(model_part.samples, (params,), (unflatten(vector, params),))[1]
            image: Params = vjp(model_part.samples, params)[1](along * (model_part.weight / len(along)))[0]
        return flatten(image)

    return product


def _with_outputs(part: Part, kind: str) -> ModelPart:
    if not isinstance(part, ModelPart):
        raise UsageError(f"{kind} needs a model's outputs; this loss is a bare function: make it by model_losses")
    return part


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def hessian(losses: DomainLosses, params: Params, *, weights: Sequence[float] | Tensor) -> SymmetricOperator:
    r"""$\sum_iw_i\nabla^2L_i(w)$ for ``weights`` (M,): $\alpha$ gives the pooled Hessian, $\beta$ the weighted one."""
    return Curvature(losses, params).operator(weights)


def domain_hessian(losses: DomainLosses, params: Params, name: str) -> SymmetricOperator:
    r"""$\nabla^2L_i(w)$ of the domain called ``name``."""
    return hessian(losses, params, weights=torch.eye(losses.M)[losses.index(name)])


def domain_inspired_hessian(losses: DomainLosses, params: Params, lam: float) -> SymmetricOperator:
    r"""$\nabla^2L_{DI}=\sum_i\beta_i\nabla^2L_i-2\lambda\,\mathrm{Cov}_M(\nabla L_i)$, with $\beta$ at ``params``.

    $\mathrm{Cov}_M=\frac1M\sum_i(\nabla L_i-\overline{\nabla L})(\nabla L_i-\overline{\nabla L})^\top$, unweighted
    as the variance is: differentiate $\mathrm{Var}\{L_i\}=\frac1M\sum_i(L_i-\bar L)^2$ twice.
    """
    weighted = hessian(losses, params, weights=weights_at(losses, params, lam))
    correction = covariance_term(domain_gradients(losses, params), lam)
    return SymmetricOperator(
        weighted.size, weighted.dtype, weighted.device, lambda v: weighted.matvec(v) + correction(v)
    )


def covariance_term(gradients: Tensor, lam: float) -> Callable[[Tensor], Tensor]:
    r"""$v\mapsto-2\lambda\,\mathrm{Cov}_M(\nabla L_i)\,v$ from the domains' gradients (M, n)."""
    centred = gradients - gradients.mean(0)
    return lambda vector: (-2.0 * lam / len(centred)) * (centred.T @ (centred @ vector))


def weights_at(losses: DomainLosses, params: Params, lam: float) -> Tensor:
    r"""$\beta_i(w)$ of Eq. (8) at ``params``, (M,)."""
    values = losses.checked(params)
    alpha = torch.tensor(losses.shares, dtype=values.dtype, device=values.device)
    return disam_weights(
        values, alpha, torch.tensor(lam, dtype=values.dtype, device=values.device), torch.ones_like(values)
    )


def domain_gradients(losses: DomainLosses, params: Params) -> Tensor:
    r"""$\nabla L_i(w)$ of each domain, flat, (M, n)."""
    leaves = {name: p.detach().clone().requires_grad_(True) for name, p in params.items()}
    inputs = list(leaves.values())

    def gradient(part: Part) -> Tensor:
        with torch.enable_grad():
            value = part(leaves)
        if not value.requires_grad:
            return torch.zeros_like(nothing)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, inputs, materialize_grads=True)])

    nothing = torch.zeros_like(flatten(params))
    rows = nothing.repeat(losses.M, 1)
    for row, parts in zip(rows, losses.parts, strict=True):
        for part in parts:
            row += gradient(part)
    return losses.ranks.total(rows)


def flatten(tree: Params) -> Tensor:
    """A params dict as one vector (n,)."""
    return torch.cat([value.reshape(-1) for value in tree.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """A vector (n,), or several (T, n), as a params dict with the names of ``like`` and its shapes after the T."""
    if vector.shape[-1:] != (_size(like),):
        raise UsageError(f"the vector has shape {tuple(vector.shape)}; the parameters need ({_size(like)},)")
    pieces = vector.split([p.numel() for p in like.values()], dim=-1)
    own = vector.shape[:-1]
    return {name: piece.reshape(own + p.shape) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def _size(params: Params) -> int:
    return sum(p.numel() for p in params.values())


NOT_TWICE = "the loss cannot be differentiated twice"
UNSUPPORTED = ("derivative for", "forward AD", "autograd.Function")  # what torch says of an operation without a formula


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Fused attention has no second derivative: use the plain formula meanwhile, and restore what was set before.

    Raises:
        UsageError: an operation has no derivative that is needed; the message names it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in UNSUPPORTED):
            raise
        reason = first_line(error).rstrip(".")
        raise UsageError(f"{NOT_TWICE}: {reason}; try the other mode, or replace that operation") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
