r"""Domain losses through training -> how far the domains are apart in their convergence, and how far they overshoot.

All at the evaluated steps, on all training data of each source domain. The paper's curves (Figs. 1(b), 7(a)) are
"achieved by subtracting the minimum loss value and dividing by the maximum loss value" (App. C.5), each domain's by its
own. So a domain that stays at a high loss ends at zero like one that is learnt, and as its curve starts at one less
that share, it starts near zero too; raw losses keep the difference.
"""

from __future__ import annotations

import numpy as np

from disam_theory.traces import Trace

EARLY = 1 / 3  # of training


def raw_losses(trace: Trace) -> np.ndarray:
    """$L_i(w_t)$, (E, M)."""
    return trace.evaluations["losses"]


def normalised_losses(trace: Trace) -> np.ndarray:
    r"""$\big(L_i(w_t)-\min_sL_i(w_s)\big)/\max_sL_i(w_s)$, (E, M)."""
    losses = raw_losses(trace)
    return (losses - losses.min(0)) / losses.max(0)


def scaled_losses(trace: Trace) -> np.ndarray:
    r"""$\big(L_i(w_t)-\min_sL_i(w_s)\big)/\big(\max_sL_i(w_s)-\min_sL_i(w_s)\big)$, (E, M): all of [0, 1]."""
    losses = raw_losses(trace)
    return (losses - losses.min(0)) / np.ptp(losses, axis=0)


def spread(curves: np.ndarray) -> np.ndarray:
    r"""$\sqrt{\mathrm{Var}\{\ell_i\}}$ over the domains (Eq. 6), of curves (..., M)."""
    return np.std(curves, axis=-1)


def overshoot(trace: Trace) -> float:
    r"""How far a domain's loss rises above what it had reached, early in training, in per cent of its largest loss.

    $\frac1M\sum_i\max_{s\le t\le T/3}\big(\ell_i(t)-\ell_i(s)\big)$ with $\ell$ of :func:`normalised_losses`: the
    largest rise of each curve, zero where it only falls.
    """
    steps = trace.evaluations["step"]
    early = normalised_losses(trace)[steps <= EARLY * steps[-1]]
    return 100.0 * float((early - np.minimum.accumulate(early)).max(0).mean())
