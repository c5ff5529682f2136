r"""Domain losses at a point -> the weights $\gamma$ with which an objective descends, $\sum_i\gamma_i\nabla L_i$.

| objective | $O(w)$ | $\gamma_i$ |
|---|---|---|
| ``average`` | $\sum_i\alpha_iL_i$ (Eq. 3) | $\alpha_i$ |
| ``vrex`` | $\sum_i\alpha_iL_i+b\,\mathrm{Var}\{L_i\}$ | $\alpha_i+\frac{2b}M(L_i-\bar L)$ |
| ``groupdro`` | $\sum_iq_iL_i$ | $q_i$ |
| ``coral``, ``fishr`` | $\sum_i\alpha_iL_i+$ a penalty (:mod:`disam_theory.matching`) | $\alpha_i$, and its gradient |

V-REx is Krueger et al. (2021) and GroupDRO Sagawa et al. (2020), both as DomainBed (Gulrajani and Lopez-Paz 2021) has
them, V-REx without its schedule of $b$. What is ascended stays $L_{DI}$ of the plain $L$: the objective is what the
weights descend, so that V-REx + DISAM is this table over Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from disam_theory.matching import MATCHED
from disam_theory.perturbations import disam_weights

OBJECTIVES = ("average", "vrex", "groupdro", *MATCHED)


@dataclass(frozen=True)
class Objective:
    """What one run descends, or R runs at once (then every tensor has a leading axis of runs)."""

    vrex: Tensor  # whether it is V-REx, () or (R,)
    groupdro: Tensor  # whether it is GroupDRO
    penalty: Tensor  # V-REx's b
    eta: Tensor  # GroupDRO's step size of q
    log_q: Tensor  # GroupDRO's state (..., M): log of the weights, up to a constant

    def run(self, r: int) -> Objective:
        """Run ``r``'s own, without the axis of runs."""
        return Objective(self.vrex[r], self.groupdro[r], self.penalty[r], self.eta[r], self.log_q[r])

    def observed(self, losses: Tensor, present: Tensor) -> Objective:
        r"""The objective after a step's losses at $w_t$ have moved GroupDRO's weights, $q_i\propto q_ie^{\eta L_i}$.

        A domain that is absent from the batch keeps its $q_i$ up to the normalisation. Logarithms, as $e^{\eta L}$
        overflows.
        """
        raised = self.log_q + self.eta.unsqueeze(-1) * torch.where(present > 0, losses, 0.0)
        return replace(self, log_q=raised.log_softmax(-1))

    def weights(self, losses: Tensor, alpha: Tensor, present: Tensor) -> Tensor:
        r"""$\gamma$ (..., M) at a point with these losses; V-REx's are Eq. (8) with $\lambda=-b$."""
        gamma = torch.where(self.vrex.unsqueeze(-1), disam_weights(losses, alpha, -self.penalty, present), alpha)
        return torch.where(self.groupdro.unsqueeze(-1), self.log_q.exp(), gamma)
