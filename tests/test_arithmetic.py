"""Averages of the printed tables: the printed table passes, a changed digit does not."""

import csv

import pytest

from disam_theory.claims import Verdict
from disam_theory.errors import UsageError
from proofs_checks.arithmetic import TABLES, check_averages, read_table


def changed(tmp_path, column, value, row=0):
    rows = read_table(TABLES / "table01_resnet50.csv")
    rows[row][column] = value
    path = tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_table_1_agrees_with_itself_up_to_rounding():
    evidence = check_averages(None)
    assert evidence.verdict is Verdict.PROVED
    assert len(evidence.data["rows"]) == 16
    # by hand: (85.5 + 77.3 + 66.5 + 46.1 + 43.8) / 5 = 63.84, printed 63.9
    row = next(row for row in evidence.data["rows"] if row["row"] == "out-of-domain ERM")
    assert (row["mean"], row["rounds_to"], row["printed"], row["difference"]) == ("63.84", "63.8", "63.9", "-3/50")
    assert "out-of-domain ERM: 63.84" in evidence.reason


@pytest.mark.parametrize(
    ("column", "value", "verdict"),
    [
        ("avg_printed", "85.3", Verdict.PROVED),  # mean 85.22: the entries may be larger than printed
        ("avg_printed", "85.4", Verdict.REFUTED),
        ("avg_printed", "85.1", Verdict.REFUTED),  # 0.12 off
        ("PACS", "95.6", Verdict.REFUTED),
        ("PACS_pm", "9.9", Verdict.PROVED),  # spreads do not enter
    ],
)
def test_a_changed_digit_decides(tmp_path, column, value, verdict):
    assert check_averages(None, path=changed(tmp_path, column, value)).verdict is verdict


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.csv: cannot be read"):
        check_averages(None, path=tmp_path / "absent.csv")
