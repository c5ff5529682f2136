"""The report: self-contained, complete, escaped; the JSON's schema; the terminal's table."""

import json
import math
import re

import pytest

from disam_theory import report
from disam_theory.claims import Claim, Evidence, Verdict, run
from disam_theory.errors import UsageError
from tests.elements import Elements


def finding(verdict=Verdict.REFUTED, expected=Verdict.REFUTED, **data):
    claim = Claim(
        id="eq5",
        where="Eq. (5) & <b>",
        statement=r"$\sum_i\alpha_i<1$ & <script>alert(1)</script>",
        assumptions=("$x>0$",),
        scope="one instance",
        expected=expected,
        check=lambda study: Evidence(verdict, "they differ by $4/3$", data),
        repaired_by="eq5-repaired",
    )
    return run(claim, None)


FIGURE = report.FigureEntry(
    "fig8", "Order", "Loss $L$.", "<svg xmlns='http://www.w3.org/2000/svg'/>", "Fig. 8", ("f.pdf",)
)


@pytest.fixture
def page(tmp_path):
    evidence = {"rows": [{"a": 1.5, "ok": True}, {"a": math.nan, "b": "<i>"}], "nested": {"x": [1, 2]}}
    report.write_html(
        tmp_path / "r.html", {"command": "a $ b"}, [finding(**evidence), finding(Verdict.PROVED)], [FIGURE]
    )
    return (tmp_path / "r.html").read_text()


def test_the_page_needs_no_script_and_no_network(page):
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.seen}
    for tag, attributes in elements.seen:
        if tag not in {"a", "math"}:
            assert not any(str(v).startswith(("http", "//")) for v in attributes.values())
    assert not re.search(r"@import|url\(", page)
    images = [attributes for tag, attributes in elements.seen if tag == "img"]
    assert len(images) == 1
    assert images[0]["src"].startswith("data:image/svg+xml;base64,")
    assert images[0]["alt"]


def test_text_is_escaped_and_mathematics_is_mathml(page):
    elements = Elements(page)
    assert "<script>alert(1)</script>" in elements.text
    assert "<i>" in elements.text
    assert ("math", {"xmlns": "http://www.w3.org/1998/Math/MathML", "display": "inline"}) in elements.seen
    assert "\\sum" not in elements.text


def test_every_part_of_a_claim_is_on_the_page(page):
    text = Elements(page).text
    for part in (
        "eq5",
        "refuted",
        "proved",
        "expected refuted",
        "one instance",
        "they differ by",
        "eq5-repaired",
        "nan",
        "yes",
    ):
        assert part in text
    assert "1 proved, 1 refuted" in text
    ids = [attributes["id"] for _, attributes in Elements(page).seen if "id" in attributes]
    assert {"eq5", "figures", "environment", "figure-fig8"} <= set(ids)


def test_json_has_the_documented_fields_and_null_for_what_is_not_finite(tmp_path):
    report.write_json(
        tmp_path / "claims.json", {"rng": 0}, [finding(a=math.inf, b=[math.nan, 1.5], c={"d": -math.inf})]
    )
    content = json.loads((tmp_path / "claims.json").read_text())
    assert set(content) == {"environment", "claims"}
    entry = content["claims"][0]
    fields = {"id", "where", "statement", "assumptions", "scope", "verdict", "expected", "evidence", "seconds"}
    assert fields <= set(entry)
    assert entry["evidence"] == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_the_terminal_says_what_changed():
    table = report.terminal_table([finding(), finding(Verdict.UNDECIDED)], 60)
    lines = table.splitlines()
    assert lines[0].startswith("✗ eq5  refuted")
    assert "expected refuted" in lines[1]
    assert "they differ by" in lines[2]
    assert lines[-1] == "1 of 2 verdicts are as expected"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written, as .*file is no folder"):
        report.write_json(tmp_path / "file" / "claims.json", {}, [])


def test_the_ledger_page_says_first_what_was_assumed(tmp_path):
    report.write_markdown(tmp_path / "c.md", [finding(), finding(Verdict.PROVED)])
    text = (tmp_path / "c.md").read_text()
    assert "2 claims: 1 proved, 1 refuted." in text
    section = text.partition("## eq5")[2]
    order = [section.index(piece) for piece in ("- $x>0$", "> $\\sum_i", "✗ **refuted**: they differ", "Repaired by")]
    assert order == sorted(order)
