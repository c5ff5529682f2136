"""Data shared among processes: two gloo processes find what one finds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import disam_theory
from disam_theory.losses import model_losses, parameters_of
from disam_theory.models import digits_mlp
from disam_theory.operators import domain_gradients, hessian
from disam_theory.ranks import Ranks, launched

ROOT = str(Path(disam_theory.__file__).parent.parent)


class Recording(Ranks):
    """One of several processes, whose sums are taken by hand afterwards."""

    def total(self, tensor):
        return tensor


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_shares_of_all_processes_add_up(make_domain, world):
    """Also where a domain has fewer samples than there are processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    domains = [make_domain(f"d{i}", n, rng=i) for i, n in enumerate((2, 11, 8))]
    params = parameters_of(model)
    whole = model_losses(model, domains, chunk=3)
    parts = [model_losses(model, domains, chunk=3, ranks=Recording(rank, world)) for rank in range(world)]
    vector = torch.randn(43, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    quantities = (
        lambda losses: losses(params),
        lambda losses: domain_gradients(losses, params),
        lambda losses: hessian(losses, params, weights=losses.shares).matvec(vector),
    )
    for quantity in quantities:
        summed = sum(quantity(part) for part in parts)
        torch.testing.assert_close(summed, quantity(whole), rtol=1e-12, atol=1e-14)
    assert all(part.shares == whole.shares for part in parts)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched("cpu") as (ranks, device):
        assert (ranks.rank, ranks.world, device) == (0, 1, "cpu")


def test_two_processes_print_the_eigenvalues_of_one(tmp_path):
    torch.manual_seed(0)
    torch.save(digits_mlp().state_dict(), tmp_path / "c.pt")
    model = ["--model", "disam_theory.models:digits_mlp", "--data", "digits-rotated"]
    audit = ["-m", "disam_theory", "audit", "c.pt", *model, "--dtype", "float64", "--tol", "1e-9", "--format", "json"]
    documents = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]):
        command = [sys.executable, *launcher, *audit]
        environment = {"PYTHONPATH": ROOT, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        documents.append(json.loads(result.stdout))
    assert [document["provenance"]["processes"] for document in documents] == [1, 2]
    for one, two in zip(documents[0]["rows"], documents[1]["rows"], strict=True):
        assert one["name"] == two["name"]
        for field in ("loss", "grad_norm", "accuracy", "eigenvalues"):
            assert two[field] == (None if one[field] is None else pytest.approx(one[field], rel=1e-10))
