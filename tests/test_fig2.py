"""The toy problems of Fig. 2: their losses, steps and sharpness by hand; the claim's rule; the figure's rows."""

from functools import partial

import numpy as np
import pytest
import torch

from disam_theory.claims import Verdict
from disam_theory.losses import DomainLosses
from disam_theory.operators import domain_hessian
from disam_theory.spectrum import top_eigenpairs
from disam_theory.toy import (
    BOWL,
    CONTROLS,
    DISAM,
    ERM,
    FAMILY,
    SAM,
    Count,
    M,
    Toys,
    count,
    flatter,
    nearer,
    outcome,
    toys,
)
from figures.fig2_toy import FIG2
from proofs_checks.toy import CONTRASTS, check_fig2, over_strengths, sam_is_pulled, verdict_on

PULL = next(what for what, contrast in CONTRASTS.items() if contrast is sam_is_pulled)


def pulled_less(disam):
    return nearer(outcome(disam).angles, outcome(SAM).angles)


def sam_flatter_than_erm(disam):
    return flatter(outcome(SAM).sharpness, outcome(ERM).sharpness)


MUTATIONS = {
    "fig2": {
        "DISAM's ascent is the one that is pulled": partial(
            check_fig2, None, contrasts=CONTRASTS | {PULL: pulled_less}
        ),
        "the pull alone": partial(check_fig2, None, contrasts={PULL: sam_is_pulled}),
        "SAM ends flatter than ERM too": partial(
            check_fig2, None, contrasts=CONTRASTS | {"SAM ends flatter than ERM": sam_flatter_than_erm}
        ),
    },
}


@pytest.fixture(scope="module")
def problems():
    return toys(range(5))


def test_a_loss_by_hand():
    def tensor(*values):
        return torch.tensor([values], dtype=torch.float64)

    one = Toys(tensor([1.0, 0.0]), tensor(0.5), tensor(2.0), tensor([0.0, 1.0]), tensor(3.0), tensor(0.0, 0.0))
    # w - shift = (2, 0): one from the well's centre, two widths
    by_hand = 3 * (BOWL / 2 * 4 + 2 * (1 - np.exp(-2)))
    assert float(one.losses(tensor(2.0, 1.0))[0, 0]) == pytest.approx(by_hand)


def test_a_problem_does_not_depend_on_the_others(problems):
    w = torch.zeros(1, 2, dtype=torch.float64)
    assert torch.equal(toys([3]).losses(w)[0], problems.losses(w.expand(5, 2))[3])


def gradients(problems, w):
    """Central differences (R, M + 1, 2)."""
    h = 1e-5 * torch.eye(2, dtype=torch.float64)
    return torch.stack([(problems.losses(w + e) - problems.losses(w - e)) / 2e-5 for e in h], dim=-1)


@pytest.mark.parametrize("settings", [SAM, *DISAM], ids=["sam", "disam 0.1", "disam 0.7"])
def test_an_ascent_is_eq_8s_direction_and_its_angle_is_to_the_longest_gradient(settings, problems):
    w = problems.starts
    each, losses = gradients(problems, w)[:, :M], problems.losses(w)[:, :M]
    beta = 1 / M - 2 * settings.strength / M * (losses - losses.mean(1, keepdim=True))
    direction = (beta[..., None] * each).sum(1)
    unit = direction / direction.norm(dim=1, keepdim=True)
    assert torch.allclose(problems.ascent(w, settings).epsilon["w"], settings.rho * unit, atol=1e-7)
    for r in range(len(w)):
        longest = max(each[r], key=lambda g: float(g.norm()))
        cosine = float(longest @ unit[r] / longest.norm())
        assert float(problems.angles(w, settings)[r]) == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-3)


def test_a_path_steps_down_the_gradient_at_the_ascended_point(problems):
    path = problems.path(SAM)
    step = problems.ascent(path[7], SAM).epsilon["w"]
    down = gradients(problems, path[7] + step)[:, :M].mean(1)
    assert torch.allclose(path[8], path[7] - 0.1 * down, atol=1e-8)
    last = path[-1] - path[-2]
    assert torch.allclose(last, -0.01 * problems.ascent(path[-2], SAM).gradient_ascent["w"], atol=1e-12)


def test_sharpness_is_the_top_eigenvalue_of_the_unseen_hessian(problems):
    """By a dense Hessian of one problem alone, and by the package's own search."""
    found = problems.sharpness(problems.starts)
    for r, w in enumerate(problems.starts):
        one = toys([r])

        def unseen(p, one=one):
            return one.losses(p[None])[0, M]

        dense = torch.autograd.functional.hessian(unseen, w)
        assert float(found[r]) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-12)
        losses = DomainLosses(("unseen",), (1,), ((lambda params, loss=unseen: loss(params["w"]),),))
        top = top_eigenpairs(domain_hessian(losses, {"w": w}, "unseen"))
        assert float(found[r]) == pytest.approx(float(top.values[0]), rel=1e-9)


def test_counts_ties_and_intervals_by_hand():
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.05, 2.5, 2.0, 9.0])
    counted = count(a, b, 0.1)
    assert counted == Count(below=2, tied=1, above=1)
    assert counted.p_value() == pytest.approx(1.0)
    assert Count(10, 0, 0).interval(0.95) == pytest.approx((0.025**0.1, 1.0))
    assert Count(5, 3, 0).p_value() == pytest.approx(2 / 2**5)
    assert Count(0, 7, 0).interval(0.95) == (0.0, 1.0)
    assert flatter(torch.tensor([-1.0, 1.0]), torch.tensor([-0.995, 1.02])) == Count(1, 1, 0)


@pytest.mark.parametrize(
    ("counted", "verdict"),
    [
        (Count(90, 0, 10), Verdict.SUPPORTED),
        (Count(10, 0, 90), Verdict.REFUTED),
        (Count(15, 80, 5), Verdict.REFUTED),  # mostly no difference
        (Count(55, 0, 45), Verdict.UNDECIDED),
        (Count(0, 50, 0), Verdict.REFUTED),
    ],
)
def test_the_rule(counted, verdict):
    assert verdict_on(counted, 0.95) is verdict


def test_opposite_verdicts_are_conditional_on_the_strength():
    yes, no, open_ = Verdict.SUPPORTED, Verdict.REFUTED, Verdict.UNDECIDED
    assert over_strengths({yes, no}) is Verdict.CONDITIONAL
    assert over_strengths({no, open_}) is no
    assert over_strengths({yes, open_}) is open_
    assert over_strengths({yes}) is yes


def test_the_claim_holds_where_its_parts_do():
    assert MUTATIONS["fig2"]["the pull alone"]().verdict is Verdict.SUPPORTED
    assert MUTATIONS["fig2"]["DISAM's ascent is the one that is pulled"]().verdict is Verdict.REFUTED


def test_the_controls_stand_beside_each_part_and_in_words_where_it_is_supported():
    evidence = check_fig2(None)
    rows = {(row["what"], row["control"], row["lambda"]): row for row in evidence.data["controls"]}
    assert len(rows) == len(CONTRASTS) * len(CONTROLS) * len(DISAM)
    for disam, reversed_, weaker in zip(DISAM, *CONTROLS.values(), strict=True):
        assert (reversed_.strength, reversed_.radius) == (-disam.strength, disam.radius)
        assert (weaker.algorithm, weaker.strength, weaker.radius) == ("weaker-sam", disam.strength, disam.radius)
        for what, contrast in CONTRASTS.items():
            for control, settings in (("-lambda", reversed_), ("a weaker SAM", weaker)):
                counted = contrast(settings)
                row = rows[what, control, disam.strength]
                assert (row["below"], row["tied"], row["above"]) == (counted.below, counted.tied, counted.above)
    turned = rows[PULL, "-lambda", DISAM[1].strength]
    assert turned["above"] > turned["below"]  # it does turn the pull round
    assert f"-lambda in DISAM's place ({rows[PULL, '-lambda', DISAM[0].strength]['below']} yes" in evidence.reason


def test_a_weaker_sam_goes_along_sams_step_as_far_as_disam_does(problems):
    w, disam, weaker = problems.starts, DISAM[1], CONTROLS["a weaker SAM"][1]
    sams, disams = (problems.ascent(w, settings).epsilon["w"] for settings in (SAM, disam))
    cosine = torch.cosine_similarity(sams, disams, dim=1)
    assert torch.allclose(problems.ascent(w, weaker).epsilon["w"], cosine[:, None] * sams, atol=1e-12)


def test_the_figure_shows_what_the_claim_counts():
    rows = FIG2.compute(None)
    family = {(r["name"], r["lam"], r["seed"]): r for r in rows if r["panel"] == "d"}
    assert len(family) == 4 * len(FAMILY)
    drawn = {r["name"]: r for r in rows if r["panel"] == "c" and r["name"] in ("erm", "sam", "disam")}
    for name, lam in (("erm", 0.0), ("sam", 0.0), ("disam", 0.7)):
        same = family[name, lam, FAMILY[0]]
        assert [drawn[name][c] for c in ("x", "y", "sharpness")] == pytest.approx(
            [same[c] for c in ("x", "y", "sharpness")]
        )
    flatter_at = [
        family["disam", 0.7, seed]["sharpness"]
        < family["sam", 0.0, seed]["sharpness"]
        - 0.01 * max(abs(family[name, lam, seed]["sharpness"]) for name, lam in (("sam", 0.0), ("disam", 0.7)))
        for seed in FAMILY
    ]
    case = next(c for c in check_fig2(None).data["cases"] if "than SAM" in c["what"] and c["lambda"] == 0.7)
    assert sum(flatter_at) == case["below"]
    bars = [text.get_text() for text in FIG2.draw(rows).axes[-1].texts]
    assert str(case["below"]) in bars
