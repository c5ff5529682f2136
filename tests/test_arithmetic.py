"""The printed numbers against one another: a changed digit decides, and the findings are those found by hand."""

from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest

from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError, UsageError
from proofs_checks.arithmetic import (
    ARITHMETIC_CLAIMS,
    DETAILS,
    FILES,
    OPEN_CLASS_PLACES,
    OUT,
    RHO,
    SECTION_42,
    SECTION_44,
    SETTINGS,
    TABLE_1_PLACES,
    average_fits,
    check_averages,
    check_details,
    check_gains,
    check_misplaced,
    check_settings,
    check_summary,
    data_set_weights,
    entries,
    find_row,
    gain,
    mean,
    plain_weights,
    read_table,
)


def changed(table, section, algorithm, **cells):
    """A reader of the tables with some cells of one row printed otherwise."""

    def read(name):
        rows = read_table(name)
        if name == table:
            find_row(rows, section, algorithm).update(cells)
        return rows

    return read


ERM_AS_IN_DOMAINBED = changed("Table 6", OUT, "ERM", Cartoon="80.8")
EXCHANGED = changed("Table 7", OUT, "SAM+DI", Pascal="73.2", Sun="81.0")


def changed_table_1(**cells):
    return partial(check_averages, None, read=changed("Table 1", "in-domain", "ERM", **cells))


def text_42(**stated):
    """Sec. 4.2 with other gains in its text."""
    other = tuple((baseline, method, stated.get(baseline, printed)) for baseline, method, printed in SECTION_42)
    return partial(check_gains, None, stated=other, places=TABLE_1_PLACES)


def text_44(printed, places=OPEN_CLASS_PLACES):
    """Sec. 4.4 with another gain over CLIPOOD."""
    return partial(check_gains, None, stated=(SECTION_44[0], (*SECTION_44[1][:2], printed)), places=places)


def settings_without(where):
    return tuple(setting for setting in SETTINGS if not setting.where.startswith(where))


MISPRINTED_RHO = tuple(replace(s, value=Fraction(1, 20)) if s.value == Fraction(1, 2) else s for s in SETTINGS)

MUTATIONS = {
    "table1-averages": {
        "an average that is 0.18 too large": changed_table_1(avg_printed="85.4"),
        "an average that is 0.12 too small": changed_table_1(avg_printed="85.1"),
        "an entry one point too small": changed_table_1(PACS="95.6"),
    },
    "tables-row-averages": {
        "Table 6 with DomainBed's entry for ERM": lambda: check_averages(
            None, names=tuple(FILES), read=ERM_AS_IN_DOMAINBED
        ),
        "all tables but Table 6": lambda: check_averages(None, names=tuple(n for n in FILES if n != "Table 6")),
    },
    "table1-vs-tables6-10": {
        "without the row SAM+DI": lambda: check_details(None, leave_out=("SAM+DI",)),
        "up to 1.3 points": lambda: check_details(None, tolerance=Fraction(13, 10)),
    },
    "text-gains-vs-table1": {
        "0.9 for SAGM": text_42(SAGM="0.9"),
        "SAGM with CORAL too, 1.8": lambda: check_gains(
            None, stated=(*SECTION_42[:2], ("SAGM", "SAGM+DI+CORAL", "1.8")), places=TABLE_1_PLACES[:1]
        ),
        "nothing said of SAGM": lambda: check_gains(None, stated=SECTION_42[:2], places=TABLE_1_PLACES),
    },
    "text-open-class-gains": {
        "2.8 over CLIPOOD": text_44("2.8"),
        "nothing said of CLIPOOD": lambda: check_gains(None, stated=SECTION_44[:1], places=OPEN_CLASS_PLACES),
    },
    "seed-summary-gain": {
        "0.3 to 1.8 over the best baseline": lambda: check_summary(None, low="0.3", high="1.8"),
        "0.9 to 1.9 over each method": lambda: check_summary(None, low="0.9", high="1.9"),
    },
    "hyperparameters-consistent": {
        "rho=0.5 a misprint of 0.05, and lambda=0.1 not in all experiments": lambda: check_settings(
            None, settings=tuple(s for s in MISPRINTED_RHO if not s.where.startswith("App. B.3"))
        ),
        "App. C.1 left out": lambda: check_settings(None, settings=settings_without("App. C.1")),
    },
    "table-outliers": {
        "Table 7 with Pascal and Sun exchanged": lambda: check_misplaced(None, read=EXCHANGED),
        "only entries 3 points outside": lambda: check_misplaced(None, margin=Fraction(3)),
    },
}


@pytest.mark.parametrize("claim", ARITHMETIC_CLAIMS, ids=lambda claim: claim.id)
def test_every_mutation_is_decided_the_other_way(claim):
    """Each of these wrong or repaired statements is settled, not left open."""
    other = {Verdict.PROVED: Verdict.REFUTED, Verdict.REFUTED: Verdict.PROVED}[claim.expected]
    assert {label: mutated().verdict for label, mutated in MUTATIONS[claim.id].items()} == dict.fromkeys(
        MUTATIONS[claim.id], other
    )


def test_table_1_agrees_with_itself_up_to_rounding():
    evidence = check_averages(None)
    assert evidence.verdict is Verdict.PROVED
    assert evidence.data["rows_checked"] == 16
    assert evidence.data["impossible"] == []
    # by hand: (85.5 + 77.3 + 66.5 + 46.1 + 43.8) / 5 = 63.84, printed 63.9
    row = next(r for r in evidence.data["need_unrounded_entries"] if r["row"] == "Table 1, out-of-domain ERM")
    assert (row["mean"], row["rounds_to"], row["printed"], row["difference"]) == ("63.84", "63.8", "63.9", "-3/50")
    assert "out-of-domain ERM: 63.84" in evidence.reason


@pytest.mark.parametrize(
    "cells",
    [
        {"avg_printed": "85.3"},  # mean 85.22: the entries may be larger than printed
        {"PACS_pm": "9.9"},  # spreads do not enter
    ],
)
def test_what_rounding_or_a_spread_explains_is_no_error(cells):
    assert changed_table_1(**cells)().verdict is Verdict.PROVED


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"table01_resnet50\.csv: cannot be read"):
        read_table("Table 1", folder=tmp_path)


def test_a_missing_row_is_named():
    with pytest.raises(ComputationError, match="no row DISAM in section in-domain"):
        find_row(read_table("Table 1"), "in-domain", "DISAM")


def test_table_3_averages_its_two_data_sets():
    row = find_row(read_table("Table 3"), "base", "Zero-shot")
    # by hand: OfficeHome 344.4 / 4 = 86.1, DomainNet 354.1 / 6 = 59.0167; their mean 72.5583, printed 72.6
    assert mean(row) == (Fraction(861, 10) + Fraction(3541, 60)) / 2
    assert mean(row, plain_weights) == Fraction(6985, 100)
    assert average_fits(row)
    assert not average_fits(row, plain_weights)
    assert sum(data_set_weights(list(entries(row))).values()) == 1
    plain = check_averages(None, names=tuple(FILES)).data["impossible_as_plain_means"]
    assert plain == {"Table 3": 21, "Table 6": 1}


def test_the_one_impossible_average_is_explained_by_one_digit():
    data = check_averages(None, names=tuple(FILES)).data
    assert data["rows_checked"] == 90
    assert [row["row"] for row in data["impossible"]] == ["Table 6, out-of-domain ERM"]
    assert mean(find_row(ERM_AS_IN_DOMAINBED("Table 6"), OUT, "ERM")) == Fraction("85.5")


def test_sam_with_the_term_differs_on_all_five_data_sets():
    data = check_details(None).data
    assert data["entries_compared"] == 40
    found = {d["data_set"]: (d["table_1"], Fraction(d["its_average"])) for d in data["differing"]}
    here = {"PACS": "87.3", "VLCS": "80.1", "OfficeHome": "70.7", "TerraInc": "47.9", "DomainNet": "45.8"}
    there = {"PACS": "87.1", "VLCS": "79.9", "OfficeHome": "70.3", "TerraInc": "46.6", "DomainNet": "45.4"}
    assert found == {name: (here[name], Fraction(there[name])) for name in DETAILS}
    assert {d["method"] for d in data["differing"]} == {"SAM+DI"}
    assert float(Fraction(data["average_from_the_details"]["SAM+DI"])) == pytest.approx(65.8633, abs=1e-4)


def test_gains_by_hand():
    low, high = gain(Fraction("66.1"), Fraction("67.0"), relative=False)
    assert (low, high) == (Fraction("0.8"), Fraction("1.0"))
    low, high = gain(Fraction("66.1"), Fraction("67.0"), relative=True)
    assert low == 100 * (Fraction("66.95") / Fraction("66.15") - 1)
    assert high == 100 * (Fraction("67.05") / Fraction("66.05") - 1)


def test_the_text_errs_on_sagm_and_on_clipood_alone():
    first = text_42()().data["tried"][0]["gains"]
    assert {pair: g["possible"] for pair, g in first.items()} == {
        "SAM+DI over SAM": True,
        "GSAM+DI over GSAM": True,
        "SAGM+DI over SAGM": False,
    }
    first = text_44("3.1")().data["tried"][0]["gains"]
    assert {pair: g["possible"] for pair, g in first.items()} == {
        "CoOp+DISAM over CoOp": True,
        "CLIPOOD+DISAM over CLIPOOD": False,
    }


@pytest.mark.parametrize(("printed", "verdict"), [("2.7", Verdict.PROVED), ("2.6", Verdict.REFUTED)])
def test_a_stated_gain_may_be_off_by_what_rounding_explains(printed, verdict):
    """69.7 - 66.9 = 2.8 stands for 2.7 to 2.9, and a text of 2.6 for at most 2.65."""
    assert text_44(printed, places=OPEN_CLASS_PLACES[:1])().verdict is verdict


def test_table_2_is_read_at_the_run_that_disam_was_added_to():
    assert find_row(read_table("Table 2"), OUT, "CLIPOOD")["avg_printed"] == "77.9"


def test_gains_over_the_best_baseline_and_over_coral():
    tried = {t["reading"]: t["gains"] for t in check_summary(None).data["tried"]}
    over_best = tried["over the best baseline, SAGM (percentage points)"]
    assert [g["about"] for g in over_best.values()] == ["0.3", "0.7", "0.9", "1.8"]
    over_coral = tried["over CORAL, the row marked SOTA (percentage points)"]
    assert [g["about"] for g in over_coral.values()] == ["1.9", "2.3", "2.5", "3.4"]
    by_data_set = tried["SAGM+DI+CORAL over the best baseline of each data set (percentage points)"]
    assert {name: g["about"] for name, g in by_data_set.items()} == {
        "PACS": "1.8",
        "VLCS": "1.2",
        "OfficeHome": "1.6",
        "TerraInc": "2.9",
        "DomainNet": "1.3",
    }


def test_three_settings_clash_and_no_data_set_has_the_default_radius():
    data = check_settings(None).data
    assert [(c["name"], c["data_set"]) for c in data["conflicts"]] == [
        ("rho", "PACS"),
        ("rho", "OfficeHome"),
        ("lambda", "TerraInc"),
    ]
    assert data["data_sets_set_to_the_default"][RHO] == []


@pytest.mark.parametrize("left_out", ["App. B.3", "Fig. 3"])
def test_each_contradiction_alone_decides(left_out):
    assert check_settings(None, settings=settings_without(left_out)).verdict is Verdict.REFUTED


def test_the_misplaced_pair_by_hand():
    (found,) = check_misplaced(None).data["within_a_row"]
    assert (found["table"], found["method"]) == ("Table 7", "SAM+DI")
    rows = [row for row in read_table("Table 7") if row["algorithm"] != "SAM+DI"]
    pascal, sun = (sorted(float(row[column]) for row in rows) for column in ("Pascal", "Sun"))
    assert (pascal[0], pascal[-1], sun[0], sun[-1]) == (71.4, 75.5, 75.2, 81.8)
    assert pascal[-1] < 81.0
    assert sun[0] > 73.2
    assert pascal[0] < 73.2 < pascal[-1]
    assert sun[0] < 81.0 < sun[-1]


def test_an_exchange_between_rows_is_found_by_the_averages():
    """SAM's and SAGM's entries for L100, 46.3 and 54.8, change places: both averages give it away."""
    moved = changed("Table 9", OUT, "SAM", L100="54.8")

    def read(name):
        rows = moved(name)
        if name == "Table 9":
            find_row(rows, OUT, "SAGM")["L100"] = "46.3"
        return rows

    found = check_misplaced(None, read=read).data["between_rows"]
    assert {"table": "Table 9", "method": "SAM", "other_method": "SAGM", "column": "L100"} in found
