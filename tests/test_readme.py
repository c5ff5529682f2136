"""What the README shows is what there is: its Python runs, and its verdict table is the ledger's."""

import re
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


def test_the_verdict_table_is_the_ledgers():
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (.*) \|$", TEXT, re.MULTILINE)
    assert [(name, re.search(r"\w+", verdict)[0]) for name, verdict in rows] == [
        (claim.id, claim.expected.value) for claim in CLAIMS
    ]


def test_every_place_it_names_exists():
    root = Path(paper_repro.__file__).parent
    for name in re.findall(r"^\| `([\w./]+)` \| (?!.*proved)", TEXT, re.MULTILINE):
        if "/" in name or "." in name:
            assert (root / name).exists(), name
