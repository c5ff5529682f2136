r"""Anybody's own PyTorch loop -> DISAM, or one of its relatives, around any torch optimizer.

optimizer = SharpnessAware(model.parameters(), torch.optim.SGD, algorithm="disam", rho=0.05, lam=0.1, lr=0.01)
for inputs, labels, domain_ids in loader:

    def closure():
        each = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
        return by_domain(each, domain_ids, M=3)

    losses = optimizer.step(closure)

CORAL and Fishr (``objective="coral"``, ``"fishr"``) need a closure that returns the domains' statistics as well,
``(*by_domain(...), coral_statistics(features, domain_ids, M=3))`` or those of :mod:`disam_theory.matching` for Fishr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from disam_theory.algorithms import Ascent, Descended, Settings, matching_of, objectives
from disam_theory.errors import UsageError
from disam_theory.losses import Params, pooled
from disam_theory.matching import MATCHED, Matching, Statistics
from disam_theory.objectives import Objective
from disam_theory.perturbations import (
    WEAKER,
    ascent_step,
    disam_weights,
    gradual_passes,
    relative_direction,
    relative_step,
    takes_gradient,
)

Closure = Callable[[], Any]  # -> domain losses (M,), or them and the shares (M,), or both and Statistics


def by_domain(each: Tensor, domains: Tensor, M: int) -> tuple[Tensor, Tensor]:
    r"""The loss of each sample (n,) and its domain (n,) in 0..M-1 -> $L_i$ (M,) and the batch's shares $\alpha_i$ (M,).

    A domain of which the batch has no sample gets share 0 and loss 0, and counts in no mean or variance.
    """
    if len(domains) == 0 or int(domains.min()) < 0 or int(domains.max()) >= M:
        raise UsageError(f"domain numbers must lie in 0..{M - 1}, and the batch not be empty")
    member = torch.nn.functional.one_hot(domains.long(), M).to(each.device, each.dtype)
    counts = member.sum(0)
    return (each.unsqueeze(-1) * member).sum(0) / counts.clamp(min=1), counts / counts.sum()


@dataclass(frozen=True)
class _Away:
    """What the second step needs of the first."""

    weights: Params  # w
    gradient: Params  # at w; empty where the algorithm does not need it
    used: set[str]  # the parameters on which the losses at w depend
    seen: dict[str, Any] = field(default_factory=dict)  # fields of Ascent, where somebody watches


class SharpnessAware(torch.optim.Optimizer):
    r"""Moves the weights to $w^{asc}$, takes the gradient there, moves them back, and lets ``base_optimizer`` step.

    :meth:`step` takes a closure that computes the domain losses without calling ``backward``; :meth:`first_step` and
    :meth:`second_step` are its two halves, for loops that run the model themselves. DGSAM has no halves: its step calls
    the closure M + 1 times, and draws the order of the domains from a generator of its own, of seed ``rng``.

    The options, their meaning and their defaults are those of :class:`~disam_theory.algorithms.Settings`; ``base``
    goes to ``base_optimizer``. The parameter groups are the base optimizer's, so learning rate schedulers work on it,
    and weight decay and momentum act at $w$, not at $w^{asc}$.

    Where the ascent gradient is zero the weights stay. Batch norm in training mode updates its running statistics in
    both passes, and dropout draws a mask in each; put such layers in evaluation mode for the second pass to avoid it.
    Gradients do not pass the hooks of ``DistributedDataParallel``: use it in one process.

    ``watch`` is given what each step computed, as a stack of one run, before the weights change: what a trace is made
    of, at the cost of a backward pass where the step does not need $\nabla L(w)$, or DGSAM's other gradients, itself.
    The attribute may be set to None, and back, between steps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer],
        *,
        algorithm: str = "disam",
        rho: float = 0.05,
        lam: float | None = None,
        variance: str = "domains",
        objective: str = "average",
        asam_eta: float = 0.01,
        gsam_alpha: float = 0.4,
        sagm_alpha: float = 0.001,
        vrex_penalty: float = 10.0,
        groupdro_eta: float = 0.01,
        coral_penalty: float = 1.0,
        fishr_penalty: float = 1000.0,
        rng: int = 0,
        watch: Callable[[Ascent], None] | None = None,
        **base: Any,
    ) -> None:
        self.settings = Settings(
            algorithm,
            rho,
            lam,
            variance=variance,
            objective=objective,
            asam_eta=asam_eta,
            gsam_alpha=gsam_alpha,
            sagm_alpha=sagm_alpha,
            vrex_penalty=vrex_penalty,
            groupdro_eta=groupdro_eta,
            coral_penalty=coral_penalty,
            fishr_penalty=fishr_penalty,
        )
        self.watch = watch
        self._base = base_optimizer(params, **base)
        super().__init__(self._base.param_groups, self._base.defaults)
        self._share()
        self._objective: Objective | None = None  # once the number of domains is known
        self._matching: Matching | None = None  # likewise
        self._orders = torch.Generator().manual_seed(rng)
        self._away: _Away | None = None  # between the two steps

    def _share(self) -> None:
        self.param_groups, self.state = self._base.param_groups, self._base.state

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the domain losses at the weights before it, (M,). The closure is called twice.

        ERM calls it once, and DGSAM M + 1 times, with M the number of domains present.
        """
        if closure is None:
            raise UsageError("step needs a closure that returns the domain losses, such as by_domain gives them")
        with torch.enable_grad():
            if self.settings.algorithm == "erm":
                return self._plain_step(*_tuple(closure()))
            if self.settings.algorithm == "dgsam":
                return self._gradual_step(closure)
            losses = self.first_step(*_tuple(closure()))
            try:
                self.second_step(*_tuple(closure()))
            except BaseException:
                self._return()
                raise
        return losses

    def first_step(self, losses: Tensor, shares: Tensor | None = None, statistics: Statistics | None = None) -> Tensor:
        r"""Move the weights to $w^{asc}$; ``losses`` (M,) at $w$ with their graph, ``shares`` equal unless given."""
        if self._away is not None:
            raise UsageError("first_step was called twice; call second_step between")
        if self.settings.algorithm == "dgsam":
            raise UsageError("dgsam takes more than two passes; call step with a closure")
        at, alpha, present = losses.detach(), *_shares(losses, shares)
        self._observe(at, present)
        rho, lam = self._number(self.settings.radius), self._number(self.settings.strength).to(at)
        beta = disam_weights(at, alpha, lam, present, variance=self.settings.variance)
        gradient: Params = {}
        plain: Params = {}
        weaker = self.settings.algorithm in WEAKER
        if self.watch or weaker:
            plain, used = self._gradient(pooled(losses, alpha), keep=True)
        if plain and self.settings.objective == "average":
            gradient = plain
        elif self.watch or takes_gradient(self.settings.algorithm):
            gradient, _ = self._gradient(self._descended(losses, alpha, present, statistics), keep=True)
        if plain and not self.settings.strength:
            inspired = plain
        else:
            inspired, used = self._gradient(pooled(losses, beta))
        weights = {name: p.detach().clone() for name, p in self._params().items()}
        epsilon = relative_step(self.settings.algorithm, inspired, plain, weights, rho, self._constant)
        along = alpha if weaker else beta
        seen = {"losses": at, "beta": along, "plain": plain, "gradient_di": inspired, "epsilon": epsilon}
        self._away = _Away(weights, gradient, used, seen if self.watch else {})
        self._move(epsilon)
        return at

    def second_step(self, losses: Tensor, shares: Tensor | None = None, statistics: Statistics | None = None) -> None:
        r"""Move the weights back to $w$ and step from there; ``losses`` (M,) at $w^{asc}$ with their graph."""
        if self._away is None:
            raise UsageError("second_step needs first_step before it")
        alpha, present = _shares(losses, shares)
        up, used = self._gradient(self._descended(losses, alpha, present, statistics))
        if self._matching and statistics:
            self._matching = self._matching.observed(statistics)
        away = self._away
        self._return()
        direction = relative_direction(self.settings.algorithm, away.gradient, up, self._constant)
        ascended = {"losses_ascent": losses.detach(), "gradient": away.gradient, "gradient_ascent": up}
        self._show(away.seen | ascended, direction)
        for name, p in self._params().items():
            p.grad = direction[name] if name in used | away.used else None
        self._base.step()

    def _plain_step(self, losses: Tensor, shares: Tensor | None = None, statistics: Statistics | None = None) -> Tensor:
        """ERM's: at radius zero a second pass would find what the first one has found."""
        at, alpha, present = losses.detach(), *_shares(losses, shares)
        self._observe(at, present)
        gradient, used = self._gradient(self._descended(losses, alpha, present, statistics), keep=True)
        if self._matching and statistics:
            self._matching = self._matching.observed(statistics)
        if self.watch:
            plain = gradient
            if self.settings.objective != "average":
                plain, _ = self._gradient(pooled(losses, alpha))
            seen = {"losses": at, "losses_ascent": at, "beta": alpha, "plain": plain, "gradient_di": plain}
            still = {name: torch.zeros_like(g) for name, g in gradient.items()}
            self._show({**seen, "gradient": gradient, "gradient_ascent": gradient, "epsilon": still}, gradient)
        for name, p in self._params().items():
            p.grad = gradient[name] if name in used else None
        self._base.step()
        return at

    def _gradual_step(self, closure: Closure) -> Tensor:
        """DGSAM's (:func:`disam_theory.algorithms.gradual_point`)."""
        losses, shares, *_ = *_tuple(closure()), None
        at, (_, present) = losses.detach(), _shares(losses, shares)
        order = torch.randperm(len(at), generator=self._orders)
        passes = [domain for domain in gradual_passes(order, present.cpu()).tolist() if domain >= 0]
        lam, M = self._number(self.settings.strength).to(at), len(passes) - 1
        ratio = disam_weights(at, present / M, lam, present) / (present / M)
        self._away = _Away({name: p.detach().clone() for name, p in self._params().items()}, {}, set())
        total = {name: torch.zeros_like(p) for name, p in self._params().items()}
        try:
            for j, domain in enumerate(passes):
                if self.watch and j in (0, M):
                    self._note(losses, present / M, lam)
                own, used = self._gradient(losses[domain])
                total = {name: t + own[name] for name, t in total.items()}
                self._away.used.update(used)
                if j < M:
                    self._move(ascent_step(own, self._number(self.settings.rho) * ratio[domain]))
                    losses, *_ = _tuple(closure())
        finally:
            away = self._away
            self._return()
        update = {name: t * (M / (M + 1)) for name, t in total.items()}
        self._show(away.seen, update)
        for name, p in self._params().items():
            p.grad = update[name] if name in away.used else None
        self._base.step()
        return at

    def _note(self, losses: Tensor, alpha: Tensor, lam: Tensor) -> None:
        """What DGSAM's first and last pass show of the pooled loss."""
        if self._away is None:
            return
        plain, _ = self._gradient(pooled(losses, alpha), keep=True)
        if not self._away.seen:
            beta = disam_weights(losses.detach(), alpha, lam, (alpha > 0).to(alpha))
            inspired, _ = self._gradient(pooled(losses, beta), keep=True)
            start = {"losses": losses.detach(), "beta": beta, "gradient": plain, "plain": plain}
            self._away.seen.update(start, gradient_di=inspired)
        else:
            epsilon = {name: p.detach() - self._away.weights[name] for name, p in self._params().items()}
            self._away.seen.update(losses_ascent=losses.detach(), gradient_ascent=plain, epsilon=epsilon)

    def _show(self, seen: dict[str, Any], update: Params) -> None:
        if self.watch:
            alone: dict[str, Any] = {
                k: v.unsqueeze(0) if isinstance(v, Tensor) else _stacked(v) for k, v in seen.items()
            }
            self.watch(Ascent(**alone, update=_stacked(update)))

    def _move(self, step: Params) -> None:
        with torch.no_grad():
            for name, p in self._params().items():
                p.add_(step[name])

    def _return(self) -> None:
        if self._away is not None:
            with torch.no_grad():
                for name, p in self._params().items():
                    p.copy_(self._away.weights[name])
            self._away = None

    def _params(self) -> Params:
        flat = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return {str(k): p for k, p in enumerate(flat)}

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=next(iter(self._params().values())).device)

    @property
    def _constant(self) -> Tensor:
        return self._number(self.settings.constant)

    def _gradient(self, value: Tensor, *, keep: bool = False) -> tuple[Params, set[str]]:
        """The gradient, zero where ``value`` does not depend on a parameter, and the names of those it depends on."""
        params = self._params()
        grads = torch.autograd.grad(value, list(params.values()), retain_graph=keep, allow_unused=True)
        used = {name for name, g in zip(params, grads, strict=True) if g is not None}
        filled = (torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), grads, strict=True))
        return dict(zip(params, filled, strict=True)), used

    def _observe(self, losses: Tensor, present: Tensor) -> None:
        if self.settings.objective in MATCHED:
            self._matching = self._matching or self._new_matching(losses)
            return
        if self.settings.objective == "average":
            return
        if self._objective is None:
            start = objectives([self.settings], len(losses), dtype=losses.dtype, device=losses.device)
            self._objective = start.run(0) if start else None
        if self._objective and len(self._objective.log_q) != len(losses):
            raise UsageError(f"{len(losses)} domain losses, {len(self._objective.log_q)} before; give each step all M")
        self._objective = self._objective and self._objective.observed(losses, present)

    def _new_matching(self, like: Tensor) -> Matching | None:
        stacked = matching_of([self.settings], like)
        return stacked and replace(stacked, strength=stacked.strength[0])

    def _descended(self, losses: Tensor, alpha: Tensor, present: Tensor, statistics: Statistics | None) -> Tensor:
        if self._matching and statistics is None:
            raise UsageError(
                f"objective {self.settings.objective!r} needs the domains' statistics; let the closure return "
                f"(losses, shares, {self.settings.objective}_statistics(...))"
            )
        return Descended(alpha, present, self._objective, self._matching)(losses, statistics)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, the options, and what the objective and DGSAM's order keep between steps.

        It is not to be had between the two steps.
        """
        if self._away is not None:
            raise UsageError("the weights are at the ascent point; call second_step before state_dict")
        own = {
            "settings": self.settings.header(),
            "log_q": None if self._objective is None else self._objective.log_q,
            "moving": None if self._matching is None else self._matching.moving,
            "orders": self._orders.get_state(),
        }
        return {**self._base.state_dict(), "sharpness_aware": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; its options replace those given, as a learning rate's do in torch."""
        if "sharpness_aware" not in state_dict:
            raise UsageError("the state is not of SharpnessAware; load the base optimizer's before wrapping it")
        own = state_dict["sharpness_aware"]
        self._base.load_state_dict({name: value for name, value in state_dict.items() if name != "sharpness_aware"})
        self._share()
        self.settings, self._objective, self._matching = Settings(**own["settings"]), None, None
        self._orders.set_state(own["orders"].cpu())
        device = next(iter(self._params().values())).device
        if own["moving"] is not None:
            moving = own["moving"].to(device)
            fresh = self._new_matching(moving)
            self._matching = fresh and replace(fresh, moving=moving)
        if own["log_q"] is not None:
            log_q = own["log_q"].to(device)
            start = objectives([self.settings], len(log_q), dtype=log_q.dtype, device=device)
            self._objective = start and replace(start.run(0), log_q=log_q)


def _stacked(tree: Params) -> Params:
    """With a leading axis of one run."""
    return {name: value.unsqueeze(0) for name, value in tree.items()}


def _tuple(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, Tensor) else tuple(given)


def _shares(losses: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""$\alpha$ (M,), equal unless given, and which domains are present: those of a share above 0."""
    if losses.ndim != 1:
        raise UsageError(f"the domain losses have shape {tuple(losses.shape)}; give one number a domain, (M,)")
    alpha = torch.full_like(losses, 1 / len(losses)) if shares is None else shares.detach().to(losses)
    return alpha.detach(), (alpha > 0).to(losses.dtype)
