"""The paper's printed tables -> does its arithmetic agree with itself, in exact rationals."""

from __future__ import annotations

import csv
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from disam_theory.claims import Claim, Evidence, Verdict
from disam_theory.errors import UsageError

TABLES = Path(__file__).parent / "tables"
HALF_DIGIT = Fraction(1, 20)  # entries and averages are printed to 0.1


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table as printed; ``X_pm`` is what stands after the plus-minus sign of column ``X``."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error


def check_averages(study: object, *, path: Path = TABLES / "table01_resnet50.csv") -> Evidence:
    """Can each printed average be the mean of five numbers that round to the printed entries?

    An entry printed as $x$ lies in $[x-0.05,x+0.05]$, so the mean of the unrounded entries lies within 0.05 of the
    mean of the printed ones, and the printed average within 0.05 of that.
    """
    rows = [_compare(row) for row in read_table(path)]
    impossible = [row for row in rows if abs(Fraction(row["difference"])) > 2 * HALF_DIGIT]
    rounded_otherwise = [row for row in rows if row["rounds_to"] != row["printed"]]
    data = {"rows": rows}
    if impossible:
        names = "; ".join(f"{r['row']}: mean {r['mean']}, printed {r['printed']}" for r in impossible)
        return Evidence(Verdict.REFUTED, f"no rounding of the entries gives the printed average of {names}", data)
    reason = f"all {len(rows)} averages can be the mean of entries that round to those printed"
    if rounded_otherwise:
        names = "; ".join(f"{r['row']}: {r['mean']}, printed {r['printed']}" for r in rounded_otherwise)
        reason += f"; {len(rounded_otherwise)} of them need unrounded entries, as the printed ones give {names}"
    return Evidence(Verdict.PROVED, reason, data)


def _compare(row: dict[str, str]) -> dict[str, Any]:
    values = [v for k, v in row.items() if k not in {"section", "algorithm", "avg_printed"} and not k.endswith("_pm")]
    mean = sum((Decimal(v) for v in values), Decimal(0)) / len(values)
    return {
        "row": f"{row['section']} {row['algorithm']}",
        "mean": f"{mean.normalize():f}",
        "printed": row["avg_printed"],
        "rounds_to": str(mean.quantize(Decimal("0.1"), ROUND_HALF_UP)),
        "difference": str(sum(map(Fraction, values)) / len(values) - Fraction(row["avg_printed"])),
    }


ARITHMETIC_CLAIMS = (
    Claim(
        id="table1-averages",
        where="Table 1",
        statement="Each number in the column Avg. is the mean of its row's five entries, up to the rounding of what is "
        "printed.",
        assumptions=("entries and averages are rounded to 0.1, ties either way",),
        scope="the 16 rows of Table 1, in exact rational arithmetic",
        expected=Verdict.PROVED,
        check=check_averages,
    ),
)
