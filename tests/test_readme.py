"""What the README shows is what there is: its Python runs, and its verdict table is the ledger's."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import paper_repro
from disam_theory.models import digits_mlp
from proofs_checks import CLAIMS

TEXT = (Path(paper_repro.__file__).parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_the_python_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch = torch.rand(6, 64), torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])
    exec(example, {"model": digits_mlp(), "loader": [batch, batch]})


def test_the_verdicts_are_the_ledgers():
    expected = {claim.id: claim.expected.value for claim in CLAIMS}
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (.*) \|$", TEXT, re.MULTILINE)
    assert len(rows) > 10
    for name, verdict in rows:
        assert re.search(r"\w+", verdict)[0] == expected[name], name


def test_the_counts_are_the_ledgers():
    sentence = re.search(r"Of the (\d+) claims in the ledger (.*?)\.", TEXT, re.DOTALL)
    assert int(sentence[1]) == len(CLAIMS)
    counts = {verdict: int(number) for number, verdict in re.findall(r"(\d+) (?:are|is) (\w+)", sentence[2])}
    assert counts == Counter(claim.expected.value for claim in CLAIMS)


def test_every_place_it_names_exists():
    root = Path(paper_repro.__file__).parent
    for name in re.findall(r"^\| `([\w./]+)` \| (?!.*proved)", TEXT, re.MULTILINE):
        if "/" in name or "." in name:
            assert (root / name).exists(), name
