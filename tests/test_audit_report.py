"""What is written of audits: each format complete and escaped, differences with their intervals, the plain reading."""

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from disam_theory import audit_figures, audit_report
from disam_theory.audit import Settings, audit
from disam_theory.audit_differences import Difference, differences, spreads
from disam_theory.audit_reading import reading
from disam_theory.domains import Domain, load_suite
from disam_theory.losses import cross_entropy
from disam_theory.models import digits_mlp
from tests.elements import Elements

HOSTILE = r"a<b>&'\_%$#{}~^"
RECORD = {"checkpoint": ["A.pt", "B.pt"], "command": "disam-theory <audit>"}


@pytest.fixture(scope="module")
def audits():
    """Two checkpoints of one run, fully audited; one domain has a name with everything that needs escaping."""
    torch.manual_seed(0)
    model = digits_mlp()
    domains = [*load_suite("digits-rotated").domains]
    domains[1] = Domain(HOSTILE, domains[1].inputs, domains[1].labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    found = {}
    for label in ("A.pt", "B.pt"):
        for _ in range(40):
            optimizer.zero_grad()
            sum(cross_entropy(model(d.inputs), d.labels).mean() for d in domains[:3]).backward()
            optimizer.step()
        found[label] = audit(model, domains, Settings(k=2, full=label == "B.pt"), unseen=["rot75"])
    return found


# --- differences ---


def test_losses_are_paired_over_samples(audits):
    a, b = audits.values()
    found = {(each.name, each.quantity): each for each in differences(audits)}
    for name in ("rot0", "rot75"):
        apart = (b.draws[f"loss/{name}"] - a.draws[f"loss/{name}"]).numpy()
        each, error = found[name, "loss"], stats.sem(apart)
        assert each.difference == pytest.approx(b.row(name).loss - a.row(name).loss, abs=1e-6)
        assert (each.low, each.high) == pytest.approx(
            (apart.mean() - 1.96 * error, apart.mean() + 1.96 * error), rel=1e-3, abs=1e-6
        )
    unpaired = np.hypot(b.row("rot75").loss_error, a.row("rot75").loss_error) * 1.96
    assert found["rot75", "loss"].high - found["rot75", "loss"].low < 2 * unpaired
    pooled = found["pooled", "loss"]
    assert pooled.difference == pytest.approx(b.row("pooled").loss - a.row("pooled").loss, abs=1e-6)
    reach = 1.96 * np.sqrt(
        sum(
            a.row(name).share ** 2 * stats.sem((b.draws[f"loss/{name}"] - a.draws[f"loss/{name}"]).numpy()) ** 2
            for name in ("rot0", HOSTILE, "rot50")
        )
    )
    assert pooled.high - pooled.difference == pytest.approx(reach, rel=1e-3)


def test_an_interval_of_accuracies_covers_as_often_as_it_says(audits):
    """Two checkpoints that are right on the same samples but for a share that is known."""
    rng, covered = np.random.default_rng(0), 0
    first = audits["A.pt"]
    for _ in range(300):
        one = torch.tensor(rng.random(60) < 0.9, dtype=torch.float64)
        other = torch.where(torch.tensor(rng.random(60) < 0.1), 1 - one, one)  # true difference: 0.1 (0.1 - 0.9)
        a = replace(first, draws={**first.draws, "right/rot0": one})
        b = replace(first, draws={**first.draws, "right/rot0": other})
        found = next(d for d in differences({"a": a, "b": b}) if (d.name, d.quantity) == ("rot0", "accuracy"))
        covered += found.low <= -0.08 <= found.high
    assert covered >= 276  # 285 expected at 95 %


def test_a_checkpoint_does_not_differ_from_itself(audits):
    a = audits["A.pt"]
    for each in differences({"one": a, "two": a}):
        assert each.difference == 0
        assert not each.excludes_zero
        if each.quantity == "accuracy":
            assert each.low < 0 < each.high  # finitely many samples cannot show more


def test_eigenvalues_differ_by_certified_intervals_or_not_for_certain(audits):
    a, b = audits.values()
    found = next(d for d in differences(audits) if (d.name, d.quantity) == ("pooled", "lambda_1"))
    assert found.low == b.row("pooled").lower[0] - a.row("pooled").upper[0]
    assert found.low <= found.difference <= found.high
    rows = tuple(replace(row, converged=row.name != "pooled") for row in b.rows)
    unsure = next(
        d for d in differences({"a": a, "b": replace(b, rows=rows)}) if (d.name, d.quantity) == ("pooled", "lambda_1")
    )
    assert (unsure.low, unsure.high, unsure.interval) == (None, None, "none: not converged")
    sampled = [replace(each, sampling=({"name": "pooled", "lambda_1_error": 0.5},)) for each in (a, b)]
    wide = next(
        d for d in differences(dict(zip("ab", sampled, strict=True))) if (d.name, d.quantity) == ("pooled", "lambda_1")
    )
    assert wide.high - found.high == pytest.approx(1.96, rel=1e-3)
    assert "whole domains" in wide.interval


def test_an_interval_is_shown_in_the_digits_that_tell_its_ends_apart():
    def shown(*numbers):
        return Difference("b", "a", "rot0", "lambda_1", *numbers, "").shown

    assert shown(-1912.34, -1912.51, -1912.02) == "-1912 [-1913, -1912]"
    assert shown(0.13412, -0.66571, 0.93391) == "+0.134 [-0.666, +0.934]"
    assert shown(0.0, 0.0, 0.0) == "+0 [+0, +0]"
    assert shown(0.13412, None, None) == "+0.134"
    assert Difference("b", "a", "rot0", "accuracy", 0.11, 0.03591, 0.1823, "").shown == "+11 [+3.59, +18.2]"


def test_the_spread_is_over_the_sources(audits):
    found = {each.quantity: each for each in spreads(audits["A.pt"])}
    values = [row.loss for row in audits["A.pt"].rows if row.role == "source"]
    assert found["loss"].deviation == pytest.approx(np.std(values))
    assert found["loss"].largest == max(values)
    assert found["loss"].gap == pytest.approx(audits["A.pt"].row("rot75").loss - np.mean(values))


# --- the plain reading ---


def changed(found, name, **fields):
    rows = tuple(replace(row, **fields) if row.name == name else row for row in found.rows)
    return replace(found, rows=rows)


def test_the_reading_calls_a_domain_the_sharpest_only_where_the_intervals_tell(audits):
    found = audits["A.pt"]
    said = reading({"A.pt": found}, [])
    top = max((row for row in found.rows if row.role in ("source", "unseen")), key=lambda row: row.eigenvalues[0])
    assert f"the loss bends most on {top.name} " in said
    tied = changed(found, top.name, lower=(0.0, 0.0))
    assert "overlap, so no domain is called the sharpest" in reading({"A.pt": tied}, [])
    unsure = changed(found, "rot0", converged=False)
    assert "of rot0 did not converge, so no domain is called the sharpest" in reading({"A.pt": unsure}, [])


def test_the_reading_tells_warnings_vacuous_bounds_and_samples(audits):
    found = audits["A.pt"]
    assert "6 of the 7 generalisation bounds are vacuous" in reading({"A.pt": found}, [])
    calm = replace(found, warnings=())
    assert "No warning of a fake flat or a hallucinated minimum is raised" in reading({"A.pt": calm}, [])
    warning = {"name": "fake flat minimum", "message": "domain 'x' has lambda_max 9", "value": 9.0, "threshold": 5.0}
    loud = replace(found, warnings=(warning,))
    assert "Warnings: fake flat minimum, as domain 'x' has lambda_max 9." in reading({"A.pt": loud}, [])
    several = reading({"A.pt": calm, "B.pt": loud}, [])
    assert re.search(r"A\.pt: .*No warning .*B\.pt: .*Warnings: fake flat minimum, as domain 'x' has", several)
    sampled = replace(found, sampling=({"name": "rot0", "lambda_1_error": 0.5},))
    assert "standard errors of 0.5 on rot0, and a bias upward" in reading({"A.pt": sampled}, [])


def test_the_reading_names_only_differences_whose_intervals_exclude_zero(audits):
    found = differences(audits)
    said = reading(audits, found)
    assert "A.pt: " in said
    clear = [each.name for each in found if each.quantity == "lambda_1" and each.excludes_zero]
    assert clear
    assert "The top eigenvalue of B.pt less that of A.pt (on these samples) differs from 0 for " in said
    for name in clear:
        assert name in said[said.index("The top eigenvalue of B.pt") :]
    same = reading({"one": audits["A.pt"], "two": audits["A.pt"]}, differences(dict.fromkeys("ab", audits["A.pt"])))
    assert "differs from 0" not in same
    assert "the interval contains 0, or there is none" in same


# --- the formats ---


def test_json_has_the_documented_keys(audits):
    document = json.loads(audit_report.as_json(audits, RECORD))
    documented = re.findall(r"^\| (``.*?``) \|", audit_report.__doc__, re.MULTILINE)
    names = {name for line in documented for name in re.findall(r"``(\w+)``", line)}
    assert set(document) == names
    assert document["schema"] == "disam-audit/1"
    for name in ("rows", "about", "shares", "overlaps", "bounds", "spread", "slices"):
        assert {row["checkpoint"] for row in document[name]} == {"A.pt", "B.pt"}
    assert {row["checkpoint"] for row in document["densities"]} == {"B.pt"}
    broken = replace(audits["A.pt"], slices=({"a": 0.0, "rot0": float("inf")},))
    assert json.loads(audit_report.as_json({"A.pt": broken}, RECORD))["slices"][0]["rot0"] is None


def test_csv_has_a_line_a_loss(audits):
    rows = list(csv.DictReader(audit_report.as_csv(audits).splitlines()))
    assert len(rows) == 14
    assert float(rows[0]["lambda_2"]) == audits["A.pt"].rows[0].eigenvalues[1]
    lines = list(csv.DictReader(audit_report.differences_csv(audits).splitlines()))
    assert len(lines) == len(differences(audits))


def test_latex_is_balanced_and_escaped(audits):
    text = audit_report.as_latex(audits, RECORD)
    assert r"a<b>\&'\textbackslash{}\_\%\$\#\{\}\textasciitilde{}\textasciicircum{}" in text
    tables = re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tables) == text.count(r"\begin{tabular}") == 2 * 6 + 1
    for columns, body in tables:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(columns) - 1}
        assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    outside = re.sub(r"\\[%$#_&{}]", "", re.sub(r"%.*", "", text.replace(r"\%", "")))
    assert outside.count("{") == outside.count("}")
    assert outside.count("$") % 2 == 0


def test_the_spread_is_in_the_words_of_the_other_tables(audits):
    a = audits["A.pt"]
    tables = audit_report.tables_of(a)
    head, lines = tables["Spread over the sources"]
    heads = {name for title in ("Losses and eigenvalues", "Sharpness") for name in tables[title][0]}
    assert len(lines) == 9
    assert {line[0] for line in lines} < heads
    accuracy, found = next(line for line in lines if line[0] == "acc %"), spreads(a)[1]
    assert found.quantity == "accuracy"
    assert float(accuracy[head.index("mean")]) == pytest.approx(100 * found.mean, rel=5e-3)
    assert float(accuracy[-1]) == pytest.approx(100 * found.gap, rel=5e-3)
    latex = audit_report.as_latex({"A.pt": a}, RECORD).split("% Spread over the sources")[1].split("% Gener")[0]
    for label in (r"$\lambda_{1}$", r"acc \%", r"$\lVert\nabla L\rVert$", "worst case", "SAM step"):
        assert f"\n{label} & " in latex


def test_the_differences_are_in_the_words_and_units_of_the_other_tables(audits):
    found = differences(audits)
    ((title, (head, lines)),) = audit_report.difference_tables(found).items()
    assert title == "B.pt - A.pt"
    tables = audit_report.tables_of(audits["A.pt"])
    heads = {name for title in ("Losses and eigenvalues", "Sharpness") for name in tables[title][0]}
    assert head == ["loss of", "loss", "acc %", "lambda_1", "trace", "SAM step"]
    assert {*head} < heads
    (raw,) = (each for each in found if (each.name, each.quantity) == ("rot0", "accuracy"))
    (line,) = (line for line in lines if line[0] == "rot0")
    shown = [float(number) for number in re.findall(r"[+-][\d.]+", line[head.index("acc %")])]
    assert shown == pytest.approx([100 * raw.difference, 100 * raw.low, 100 * raw.high], rel=5e-3)
    assert "he accuracy in % " in reading(audits, found)
    latex = audit_report.as_latex(audits, RECORD).split("% Differences")[1]
    assert r" & loss & acc \% & $\lambda_{1}$ & trace & SAM step \\" in latex
    assert "<th>acc %</th>" in audit_report.as_html(audits, RECORD).split("<h2>Differences</h2>")[1].split("<tbody>")[0]
    assert {line["quantity"] for line in csv.DictReader(audit_report.differences_csv(audits).splitlines())} >= {
        *("accuracy", "sam", "worst_lower", "ece")
    }


def test_the_page_needs_no_script_and_no_network_and_repeats_no_id(audits):
    page = audit_report.as_html(audits, RECORD)
    elements = Elements(page)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in elements.seen}
    for _, attributes in elements.seen:
        for name, value in attributes.items():
            outside = str(value).startswith(("http", "//"))
            assert not outside or name.startswith("xmlns"), (name, value)
            assert not name.startswith("on")
    assert not re.search(r"@import|url\((?!#)", page)
    ids = [attributes["id"] for _, attributes in elements.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert {a or b for a, b in used} <= set(ids)
    assert HOSTILE in elements.text
    assert "disam-theory <audit>" in elements.text


def test_every_figure_is_on_the_page_in_the_pages_ink(audits):
    drawn = audit_figures.pictures(audits)
    assert [each.id for each in drawn] == [
        *("eigenvalues-0", "against-loss-0", "shares-0", "landscape-0"),
        *("eigenvalues-1", "against-loss-1", "shares-1", "landscape-1", "densities-1"),
    ]
    for each in drawn:
        assert each.svg.startswith("<svg")
        assert "currentColor" in each.svg
        assert audit_figures.INK not in each.svg
        assert "<metadata" not in each.svg
    assert [each.svg for each in audit_figures.pictures(audits)] == [each.svg for each in drawn]


def test_axes_are_logarithmic_only_where_their_labels_have_room(audits):
    from matplotlib.figure import Figure

    found = audits["A.pt"]
    for factors, scale in (((1.0, 1.01, 1.02, 1.03), "linear"), ((1.0, 3.0, 10.0, 30.0), "log")):
        kept = dict(zip((row.name for row in found.rows if row.role in ("source", "unseen")), factors, strict=True))
        rows = tuple(replace(row, loss=kept[row.name], sam=kept[row.name]) for row in found.rows if row.name in kept)
        axes = Figure().subplots()
        audit_figures.against_loss(axes, replace(found, rows=rows))
        assert (axes.get_xscale(), axes.get_yscale()) == (scale, scale)


def test_a_column_of_nothing_is_left_out_and_errors_above_ten_have_no_exponent(audits):
    page = audit_report.as_html({"A.pt": audits["A.pt"]}, RECORD)
    assert "<th>unseen less mean</th>" in page
    assert "gap" not in audit_report._html_table(["loss", "gap"], [["1", ""], ["2", " "]])
    assert audit_report._with_error(-768.7, 212.0) == "-768.7 ± 200"
    assert audit_report._with_error(24.04, 9.97) == "24.04 ± 10"
    assert audit_report._with_error(1.5, 0.042) == "1.5 ± 0.04"


def test_without_matplotlib_the_page_says_so(audits, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "matplotlib is not installed" in audit_report.as_html({"A.pt": audits["A.pt"]}, RECORD)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_renders_it_with_its_figures(audits, tmp_path):
    (tmp_path / "page.html").write_text(audit_report.as_html({"B.pt": audits["B.pt"]}, RECORD))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    shot = f"--screenshot={tmp_path}/page.png"
    command = ["chromium", *options, shot, "--window-size=1000,2000", f"file://{tmp_path}/page.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    colours = Image.open(tmp_path / "page.png").convert("RGB").getcolors(2**20)
    found = {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in colours}
    assert set(audit_figures.PALETTE[:3]) <= found


def test_the_table_for_the_terminal_has_each_part(audits):
    text = audit_report.as_table(audits)
    for part in ("A.pt\n====", "lambda_2", "SAM step", "DISAM share %", "right side", "overlap, k=2", "B.pt - A.pt"):
        assert part in text
    assert "rot75 (unseen)" in text
