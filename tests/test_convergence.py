"""Both theorems along recorded runs whose smoothness constant is known, and rates of series whose rate is known."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.signal import lfilter
from torch import nn

from disam_theory.algorithms import Settings, StepRecords, ascent_point
from disam_theory.convergence import (
    ABSENT,
    FAILS,
    HOLDS,
    INEQUALITIES,
    LARGER,
    OPEN,
    analyse,
    draw,
    fit_rate,
    points,
    row,
)
from disam_theory.errors import ComputationError, UsageError
from disam_theory.models import digits_mlp
from disam_theory.study import Block, Study
from disam_theory.traces import STEP_FIELDS, TraceWriter, read_trace
from disam_theory.training import Run, train
from figures.rate import RATE
from figures.style import save

CORRECTED = [name for name, inequality in INEQUALITIES.items() if not inequality.printed]
PRINTED = [name for name, inequality in INEQUALITIES.items() if inequality.printed]
# Theorem 1's counterexample: L(w) = w^2/2 + 1/2 from two domains, rho = 1, eta_t = 1 / (2 sqrt t), w_1 = 1/100
HALF = {"curvatures": [[1.0], [1.0]], "centres": [[1.0], [-1.0]], "start": [0.01]}
PLANE = {"curvatures": [[1.0, 4.0], [3.0, 0.2]], "centres": [[1.0, 0.0], [-0.5, 2.0]], "start": [3.0, -2.0]}
SADDLE = {"curvatures": [[5.0, -1.0], [1.0, 2.0]], "centres": [[0.0, 1.0], [2.0, 0.0]], "start": [0.3, 1.4]}


def quadratic_run(path, settings, *, curvatures, centres, start):
    """Algorithm 1 in float64 on two domains of equal size with L_i(w) = sum_j h_ij (w_j - c_ij)^2 / 2."""
    h, c = (torch.tensor(x, dtype=torch.float64) for x in (curvatures, centres))

    def losses_of(params):
        return ((params["w"].unsqueeze(1) - c) ** 2 * h).sum(-1) / 2

    params = {"w": torch.tensor([start], dtype=torch.float64)}
    header = {"domains": ["a", "b"], "sizes": [7, 7], "settings": asdict(settings), "provenance": {"dtype": "float64"}}
    writer, records = TraceWriter(path, header), StepRecords()
    constant = {"alpha": torch.full((1, 2), 0.5, dtype=torch.float64), "present": torch.ones(1, 2)}
    constant |= {"rho": torch.tensor([settings.radius]).double(), "lam": torch.tensor([settings.strength]).double()}
    for t in range(settings.steps):
        ascent = ascent_point(losses_of, params, **constant)
        writer.append(records.rows(t, [settings.lr_at(t)], ascent, constant["present"])[0])
        params = {"w": params["w"] - settings.lr_at(t) * ascent.gradient_ascent["w"]}
    nothing = dict.fromkeys(("validation_accuracy", "unseen_loss", "unseen_accuracy"))
    writer.close("finished", step=settings.steps, evaluation={"losses": losses_of(params)[0].tolist(), **nothing})
    return read_trace(path)


def constants(curvatures, centres, start):
    """L and L_min of the pooled quadratic."""
    h, c = np.array(curvatures), np.array(centres)
    mean = h.mean(0)
    best = (h * c).mean(0) / mean
    return mean.max(), (h * (best - c) ** 2).sum(1).mean() / 2


def full(algorithm="sam", **options):
    chosen = {"rho": 1.0, "lr": 0.5, "schedule": "inverse-sqrt", "sampling": "full", "steps": 100} | options
    return Settings(algorithm, **chosen)


@pytest.mark.parametrize("algorithm", ["erm", "sam", "disam"])
@pytest.mark.parametrize("schedule", ["inverse-sqrt", "constant", "step"])
@pytest.mark.parametrize("problem", [HALF, PLANE, SADDLE], ids=["line", "plane", "one domain a saddle"])
def test_the_corrected_theorem_holds_where_its_constants_are_known(tmp_path, problem, schedule, algorithm):
    L, minimum = constants(**problem)
    for rate, rho in ((1 / L, 0.05), (0.3 / L, 1.0)):
        settings = full(algorithm, schedule=schedule, lr=rate, rho=rho)
        found = analyse(quadratic_run(tmp_path / "t.jsonl", settings, **problem), smoothness=L, minimum=minimum)
        assert found.step_sizes_above == 0
        for name in CORRECTED:
            assert (found.findings[name].verdict, found.findings[name].checked) == (HOLDS, 100), name
        assert np.nanmax(found.series["local_smoothness"]) <= L * (1 + 1e-6)
        assert found.smoothness_implied <= L * (1 + 1e-6)


def test_it_is_tight_for_sam_on_a_parabola(tmp_path):
    """Every step is an equality there; the sums differ by 2 (L(w_{T+1}) - L_min) alone."""
    for schedule in ("inverse-sqrt", "constant"):
        trace = quadratic_run(tmp_path / "t.jsonl", full(schedule=schedule), **HALF)
        found = analyse(trace, smoothness=1.0, minimum=0.5)
        left, right = (found.series[f"corrected_step_{side}"] for side in ("left", "right"))
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-8)
        assert 0.995 < found.findings["corrected_sum"].tightness <= 1
        assert 0.95 < found.findings["corrected_average"].tightness <= 1
        last = trace.evaluations["losses"][-1].mean() - 0.5
        sums = [found.series[f"corrected_sum_{side}"][-1] for side in ("left", "right")]
        assert sums[1] - sums[0] == pytest.approx(2 * last, abs=1e-6)


def test_a_constant_that_is_too_small_is_found_out(tmp_path):
    """On the parabola the one-step inequality needs exactly L = 1, and says so."""
    found = analyse(quadratic_run(tmp_path / "t.jsonl", full(), **HALF), smoothness=0.8, minimum=0.5)
    step = found.findings["corrected_step"]
    assert (step.verdict, step.first) == (LARGER, 0)
    assert "so that L is larger; its steps say at least 1" in step.why
    assert found.smoothness_implied == pytest.approx(1.0, rel=1e-6)
    assert FAILS not in {finding.verdict for finding in found.findings.values()}  # 0.8 is no smoothness constant


def test_theorem_1_fails_on_its_counterexample(tmp_path):
    """Where ball arithmetic certifies it: 1.62756 > 1.51778 at T = 2 and 1.13142 > 0.97229 at T = 64."""
    trace = quadratic_run(tmp_path / "t.jsonl", full(steps=64), **HALF)
    found = analyse(trace, smoothness=1.0, gradient_bound=1.5, minimum=0.5)
    assert {found.findings[name].verdict for name in PRINTED} == {FAILS}
    assert found.findings["theorem1"].first == 2
    left, right = (found.series[f"theorem1_{side}"] for side in ("left", "right"))
    assert left[[1, 63]] == pytest.approx([1.62756, 1.13142], abs=1e-5)
    assert right[[1, 63]] == pytest.approx([1.51778, 0.97229], abs=1e-5)
    assert found.findings["theorem1"].least_slack == pytest.approx((right - left).min())


def test_without_a_gradient_bound_what_rests_on_it_is_left_open(tmp_path):
    trace = quadratic_run(tmp_path / "t.jsonl", full(steps=64), **HALF)
    found = analyse(trace, smoothness=1.0, minimum=0.5)
    assert [found.findings[name].verdict for name in PRINTED] == [FAILS, OPEN, OPEN]
    assert found.findings["theorem1"].why == "exceeded with a lower bound of G; with the true value it may hold"
    assert found.gradient_bound == pytest.approx(1.495)  # |w| + rho at the second step
    assert "a lower bound of L and G" in analyse(trace, minimum=0.5).findings["eq18"].why


def test_eq18_fails_where_the_ascent_turns_round(tmp_path):
    """w = 1/1000, eta = 1/10: the ascent points lie on different sides of the minimum."""
    settings = full(steps=2, lr=0.1, schedule="constant")
    trace = quadratic_run(tmp_path / "t.jsonl", settings, **HALF | {"start": [1e-3]})
    found = analyse(trace, smoothness=1.0, gradient_bound=1.1, minimum=0.5)
    now, then = 1.001**2 / 2, (1 + 0.1 * 1.001 - 1e-3) ** 2 / 2
    assert found.series["eq18_left"][0] - 0.5 == pytest.approx(then, rel=1e-8)
    assert then == pytest.approx(0.604010, abs=1e-6)
    right = now - 0.1 * 1.001**2 + 0.01 * 1.1**2 + 0.01
    assert found.series["eq18_right"][0] - 0.5 == pytest.approx(right, rel=1e-8)
    assert (found.findings["eq18"].verdict, found.findings["eq18"].first) == (FAILS, 0)
    assert found.findings["turning"].first == 0
    assert found.series["gamma"][0] == pytest.approx(10 * math.pi)
    # epsilon turns from 1 to -1 while the gradient is 1.001
    assert found.series["cross_over_main"][0] == pytest.approx(-2 * 1.001 / (0.1 * 1.001**2))


def test_an_estimate_is_below_the_constant_and_refutes_nothing(tmp_path):
    """With a lower bound of L what holds is said to hold, and what is exceeded is left open."""
    L, minimum = constants(**PLANE)
    for algorithm in ("erm", "sam", "disam"):
        found = analyse(quadratic_run(tmp_path / "t.jsonl", full(algorithm, lr=1 / L), **PLANE), minimum=minimum)
        assert found.smoothness_is == "estimated"
        assert 0.3 * L < found.smoothness <= L
        verdicts = {finding.verdict for finding in found.findings.values()}
        assert FAILS not in verdicts
        assert {HOLDS} <= verdicts <= {HOLDS, OPEN, LARGER, ABSENT}
    assert found.findings["turning"].verdict == OPEN


SAM = asdict(full())


@pytest.mark.parametrize(
    ("header", "why", "names"),
    [
        ({"settings": SAM | {"sampling": "pooled"}}, "batch changes from step to step", [*INEQUALITIES]),
        ({"settings": SAM | {"momentum": 0.9}}, "with momentum 0.9 the step is not", [*INEQUALITIES]),
        ({"settings": SAM | {"weight_decay": 0.1}}, "with weight decay 0.1", [*INEQUALITIES]),
        ({"settings": {"algorithm": "recorded", "rho": 0.1}}, "does not say by which rule", [*INEQUALITIES]),
        ({"settings": {}}, "does not say by which rule", [*INEQUALITIES]),
        ({"sizes": []}, "no sizes of the domains", [*INEQUALITIES]),
        ({"settings": SAM | {"algorithm": "erm"}}, "no ascent", ["turning"]),
    ],
)
def test_what_a_trace_does_not_hold_is_said(tmp_path, header, why, names):
    trace = quadratic_run(tmp_path / "t.jsonl", full(), **HALF)
    found = analyse(replace(trace, header=trace.header | header), smoothness=1.0)
    for name in names:
        assert found.findings[name].verdict == ABSENT
        assert why in found.findings[name].why
        assert np.isnan(found.series[f"{name}_left"]).all()
    assert np.isfinite(found.series["gamma"][:-1]).all()
    assert found.rates["at_w"].why == ""  # the rate is measured all the same


def test_a_schedule_that_a_theorem_does_not_speak_of_is_said(tmp_path):
    trace = quadratic_run(tmp_path / "t.jsonl", full(schedule="constant"), **HALF)
    assert "eta_0/sqrt(t)" in analyse(trace, smoothness=1.0).findings["theorem1"].why
    rising = replace(trace, steps=trace.steps | {"lr": trace.steps["lr"] * np.linspace(1, 2, 100)})
    assert "do not rise" in analyse(rising, smoothness=1.0).findings["corrected_average"].why


def test_what_is_null_is_not_counted(tmp_path):
    trace = quadratic_run(tmp_path / "t.jsonl", full(), **HALF)
    ascent = trace.steps["losses_ascent"].copy()
    ascent[40, 1] = math.nan
    angles = np.full(100, math.nan)
    gaps = replace(trace, steps=trace.steps | {"losses_ascent": ascent, "phi": angles})
    found = analyse(gaps, smoothness=1.0, minimum=0.5)
    assert found.findings["eq18"].checked == 97  # 39 to 40, 40 to 41, and the last
    assert found.findings["turning"].why == "no step has a number in all of phi and lr"
    assert found.findings["corrected_step"].verdict == HOLDS
    norms = trace.steps["grad_norm"].copy()
    norms[60:] = math.nan
    found = analyse(replace(trace, steps=trace.steps | {"grad_norm": norms}), smoothness=1.0, minimum=0.5)
    assert [found.findings[name].checked for name in CORRECTED] == [60, 60, 60]
    assert found.rates["at_w"].why == "a gradient norm is missing"


def test_an_interrupted_trace_lacks_the_last_steps_drop(tmp_path):
    path = tmp_path / "t.jsonl"
    quadratic_run(path, full(), **HALF)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found = analyse(read_trace(path), smoothness=1.0, minimum=0.5)
    assert found.end == "interrupted"
    assert [found.findings[name].checked for name in CORRECTED] == [99, 100, 100]


def test_the_projects_own_runs_keep_the_corrected_theorem(make_split, tmp_path):
    """Softmax regression in float32: its Hessian is at most half the top eigenvalue of the inputs' second moment."""
    split = make_split()
    inputs = torch.cat([d.inputs for d in split.sources])
    lifted = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    L = float(torch.linalg.eigvalsh(lifted.T @ lifted / len(lifted))[-1]) / 2
    header = {"domains": [d.name for d in split.sources], "sizes": [len(d) for d in split.sources]}
    for settings in (full(a, lr=1 / L, rho=r, lam=0.3) for a in ("erm", "sam", "disam") for r in (0.05, 1.0)):
        path = tmp_path / "t.jsonl"
        writer = TraceWriter(path, {**header, "settings": asdict(settings)})
        train(lambda: nn.Linear(4, 3), [Run(settings, split, 0)], writers=[writer])
        found = analyse(read_trace(path), smoothness=L)
        assert [found.findings[name].verdict for name in CORRECTED] == [HOLDS] * 3
        assert [found.findings[name].checked for name in CORRECTED] == [100] * 3
        assert max(np.nanmax(found.series["local_smoothness"]), found.smoothness_implied) <= L


def test_the_least_weight_is_among_the_domains_present(tmp_path):
    path = tmp_path / "t.jsonl"
    writer = TraceWriter(path, {"domains": ["a", "b"], "settings": {}})
    line = dict.fromkeys(STEP_FIELDS, 0.5)
    writer.append({**line, "losses": [1.0, 2.0], "losses_ascent": [1.0, 2.0], "beta": [1.25, -0.25]})
    writer.append({**line, "losses": [1.0, math.nan], "losses_ascent": [1.0, math.nan], "beta": [1.0, 0.0]})
    writer.close()
    found = analyse(read_trace(path))
    assert found.series["beta_min"].tolist() == [-0.25, 1.0]
    assert row(found)["beta_min"] == -0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothness": 0.0}, "smoothness is 0.0"),
        ({"smoothness": math.nan}, "smoothness is nan"),
        ({"minimum": math.inf}, "minimum is inf"),
        ({"gradient_bound": 1.4}, r"gradient bound is 1\.4; .* the trace has a norm of 1\.495"),
        ({"gradient_bound": math.inf}, "gradient bound is inf"),
        ({"minimum": 0.7}, r"a loss of 0\.5\d*, below the minimum 0\.7"),
    ],
)
def test_impossible_constants_are_refused(tmp_path, options, message):
    trace = quadratic_run(tmp_path / "t.jsonl", full(), **HALF)
    with pytest.raises(UsageError, match=message):
        analyse(trace, **options)


def test_a_trace_without_steps_or_of_another_shape_is_refused(tmp_path):
    trace = quadratic_run(tmp_path / "t.jsonl", full(), **HALF)
    with pytest.raises(UsageError, match="no step"):
        analyse(replace(trace, steps={name: values[:0] for name, values in trace.steps.items()}))
    with pytest.raises(UsageError, match="'losses' has shape"):
        analyse(replace(trace, header=trace.header | {"domains": ["a", "b", "c"]}))


def noisy_power(exponent, steps, rng, *, correlation=0.9):
    noise = lfilter([math.sqrt(1 - correlation**2)], [1, -correlation], rng.standard_normal(steps + 100))[100:]
    return 3.0 * np.arange(1, steps + 1) ** -exponent * np.exp(0.3 * noise)


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_an_exact_power_law_gives_its_exponent(exponent):
    rate = fit_rate(np.arange(1.0, 1001) ** -exponent)
    assert rate.exponent == pytest.approx(exponent, abs=0.02)
    assert rate.low <= rate.exponent <= rate.high
    assert rate.high - rate.low < 0.1


def test_the_interval_covers_under_correlated_noise():
    """Errors with correlation 0.9 from step to step, under which the usual interval covers in two cases of three."""
    rng = np.random.default_rng(0)
    rates = [fit_rate(noisy_power(0.5, 300, rng)) for _ in range(200)]
    fitted = [rate for rate in rates if not rate.why]
    assert len(fitted) >= 190
    assert np.mean([rate.low <= 0.5 <= rate.high for rate in fitted]) > 0.88
    assert np.median([rate.high - rate.low for rate in fitted]) < 1.0


@pytest.mark.parametrize(
    ("squares", "why"),
    [
        (np.arange(1.0, 64) ** -0.5, "63 steps are too few; 64 are needed"),
        (np.ones(3), "3 steps are too few"),
        (0.97 ** np.arange(300), "falls geometrically"),
        (np.arange(1.0, 1001) ** -1.0 + 0.2, "a floor near 0.2"),
        (np.append(np.ones(299), math.nan), "a gradient norm is missing"),
        (np.append(np.ones(100), np.zeros(200)), "the gradient is zero"),
    ],
)
def test_where_there_is_no_rate_it_says_why(squares, why):
    rate = fit_rate(squares)
    assert why in rate.why
    assert math.isnan(rate.exponent)


def test_64_steps_are_enough():
    assert fit_rate(np.arange(1.0, 65) ** -0.5).exponent == pytest.approx(0.5, abs=0.02)


def test_sams_gradient_at_the_ascent_point_comes_down_to_a_floor(tmp_path):
    """On the parabola it tends to rho L = 1, and the gradient at w falls with eta_t^2."""
    found = analyse(quadratic_run(tmp_path / "t.jsonl", full(steps=1000), **HALF), smoothness=1.0, minimum=0.5)
    assert found.rates["at_ascent"].floor == pytest.approx(1.0, abs=0.02)
    assert found.rates["at_w"].low <= 1.0 <= found.rates["at_w"].high


def test_rows_are_numbers_words_or_none_and_points_are_the_series(tmp_path):
    found = analyse(quadratic_run(tmp_path / "t.jsonl", full(), **HALF), minimum=0.5)
    values = row(found)
    json.dumps(values, allow_nan=False)
    assert values["theorem1_verdict"] == OPEN
    lines = points(found)
    assert [line["T"] for line in lines] == list(range(1, 101))
    assert lines[7]["theorem1_left"] == found.series["theorem1_left"][7]
    assert lines[-1]["turning_left"] is None


def test_the_picture_has_the_series_and_says_what_it_lacks(tmp_path):
    trace = quadratic_run(tmp_path / "t.jsonl", full(), **HALF)
    batches = replace(trace, header=trace.header | {"settings": SAM | {"sampling": "pooled"}})
    figure = Figure(layout="constrained")
    draw(figure, {"full": points(analyse(trace, minimum=0.5)), "batches": points(analyse(batches))})
    (sides, none), (rates, others) = (figure.axes[:2], figure.axes[2:])
    drawn = {line.get_label(): line.get_ydata() for line in sides.lines}
    np.testing.assert_array_equal(drawn["Theorem 1 as printed"], analyse(trace, minimum=0.5).series["theorem1_right"])
    assert (len(none.lines), none.texts[0].get_text()) == (0, "cannot be had\nfrom this trace")
    assert len(rates.lines) == len(others.lines) == 2


def test_the_figure_of_the_study_is_of_its_full_batch_runs(tmp_path):
    arms = tuple(full(algorithm, rho=0.05, steps=8) for algorithm in ("sam", "disam"))
    study = Study(tmp_path, [Block("digits-rotated", arms, 1)], digits_mlp)
    study.run()
    rows = RATE.compute(study)
    assert [(line["algorithm"], line["T"]) for line in rows[7:9]] == [("sam", 8), ("disam", 1)]
    norms = study.records("digits-rotated", algorithm="disam")[0].trace.steps["grad_norm_ascent"]
    assert rows[-1]["theorem1_left"] == pytest.approx((norms**2).mean())
    assert save(RATE, rows, tmp_path / "a", {}) == save(RATE, rows, tmp_path / "b", {})
    with pytest.raises(ComputationError, match="no full-batch runs"):
        RATE.compute(Study(tmp_path, [Block("digits-rotated", (Settings("sam"),), 1)], digits_mlp))
