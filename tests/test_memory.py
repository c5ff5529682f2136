"""Micro-batches that are halved where the memory is not enough: the numbers stay, and what was found is kept."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

from disam_theory import sharpness
from disam_theory.__main__ import main
from disam_theory.errors import ComputationError
from disam_theory.losses import model_losses, parameters_of
from disam_theory.memory import MicroBatch, out_of_memory
from disam_theory.operators import Curvature, domain_gradients
from tests.narrow import Narrow

MODEL = ["--model", "tests.narrow:Narrow", "--data", "d.npz"]
CPU = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."
ERRORS = {
    "on a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "on the CPU": RuntimeError(CPU),
    "oneDNN": RuntimeError("could not create a primitive"),
    "NumPy": MemoryError("Unable to allocate 7 GiB"),
}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint and data of up to 40 samples a domain; the patches that a test makes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Narrow().state_dict(), "c.pt")
    generator = np.random.default_rng(0)
    domains = np.repeat(["a", "b", "c"], [40, 25, 30])
    np.savez("d.npz", inputs=generator.normal(size=(95, 8)), labels=np.arange(95) % 3, domains=domains)
    return monkeypatch


def run(capsys, *arguments):
    code = main([*arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_what_is_a_lack_of_memory():
    assert all(map(out_of_memory, ERRORS.values()))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("can't allocate memory")):
        assert not out_of_memory(other)


def test_work_is_repeated_with_half_as_many_samples():
    asked, said = [], []

    def work(chunk):
        asked.append(chunk)
        if chunk > 7:
            raise ERRORS["on a GPU"]
        return "done"

    batch = MicroBatch(1024, 60, lambda before, after: said.append((before, after)))
    assert batch.run(work) == "done"
    assert (asked, said, batch.chunk) == ([1024, 30, 15, 7], [(60, 30), (30, 15), (15, 7)], 7)
    assert batch.run(work) == "done"
    assert asked[4:] == [7]  # what is known to be too much is not tried again


def test_another_error_is_not_a_lack_of_memory():
    def work(chunk):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        MicroBatch(4, 60, lambda *_: pytest.fail("halved")).run(work)


def test_the_end_is_one_sample():
    def work(chunk):
        raise ERRORS["NumPy"]

    halved = []
    with pytest.raises(ComputationError, match="one sample at a time"):
        MicroBatch(5, 60, lambda *sizes: halved.append(sizes)).run(work)
    assert halved == [(5, 2), (2, 1)]


@pytest.mark.parametrize(("verb", "what"), zip(("audit", "spectrum", "landscape"), ERRORS, strict=False))
def test_a_command_halves_its_micro_batch_says_so_and_finds_the_same(checkpoint, capsys, verb, what):
    command = [verb, "c.pt", *MODEL, "--dtype", "float64", "--format", "json"]
    command += ["--points", "3", "--direction", "eigen"] if verb == "landscape" else ["-k", "1", "--tol", "1e-6"]
    code, whole, err = run(capsys, *command)
    assert (code, err) == (0, "")
    checkpoint.setattr(Narrow, "room", 12)
    checkpoint.setattr(Narrow, "error", ERRORS[what])
    code, out, err = run(capsys, *command)
    assert code == 0
    lines = [f"of {n} samples do not fit into the memory; going on with {n // 2}" for n in (40, 20)]
    assert err == "".join(f"disam-theory: micro-batches {line}\n" for line in lines)
    found, expected = json.loads(out), json.loads(whole)
    used = found["provenance"]["chunk"], expected["provenance"]["chunk"]
    assert used == (([10], [1024]) if verb == "audit" else (10, 1024))
    effort = ("residual", "lower", "upper", "products", "worst_upper")  # what the search did, and its intervals
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        numbers = {name for name, value in other.items() if isinstance(value, float) and not name.startswith(effort)}
        assert len(numbers) > 2
        assert [row[n] for n in sorted(numbers)] == pytest.approx([other[n] for n in sorted(numbers)], rel=1e-5)


def test_what_was_found_before_is_kept(checkpoint, capsys):
    """Memory that gives out among the measures after the eigenvalues."""
    products, rounds = Curvature.products, []
    checkpoint.setattr(Curvature, "products", lambda self, v, w: rounds.append(len(v)) or products(self, v, w))
    command = ["-k", "2", "--format", "csv"]
    assert run(capsys, "audit", "c.pt", *MODEL, *command)[0] == 0
    once = sum(rounds)
    failed, worst = [], sharpness.worst_case_sharpness

    def starved(*arguments, **options):
        if not failed:
            failed.append(sum(rounds))
            raise ERRORS["on a GPU"]
        return worst(*arguments, **options)

    checkpoint.setattr(sharpness, "worst_case_sharpness", starved)
    rounds.clear()
    code, _, err = run(capsys, "audit", "c.pt", *MODEL, *command)
    assert (code, err.count("\n")) == (0, 1)
    assert sum(rounds) - failed[0] < once  # the eigenvectors were there


def test_finished_rows_are_not_made_again(checkpoint, capsys):
    from disam_theory import commands

    command = ["spectrum", "c.pt", *MODEL, "-k", "1", "--samples", "3", "--format", "csv"]
    _, whole, _ = run(capsys, *command)
    bottom, calls = commands.bottom_eigenpairs, []

    def starved(*arguments, **options):
        calls.append(len(calls))
        if len(calls) == 3:
            raise ERRORS["NumPy"]
        return bottom(*arguments, **options)

    checkpoint.setattr(commands, "bottom_eigenpairs", starved)
    code, out, _ = run(capsys, *command)
    assert (code, len(calls)) == (0, 5)  # one a row, and the one that failed
    rows, others = (list(csv.DictReader(text.splitlines())) for text in (out, whole))
    assert rows[:2] == others[:2]
    for row, other in zip(rows, others, strict=True):
        assert float(row["lambda_1"]) == pytest.approx(float(other["lambda_1"]), rel=1e-3)


def test_memory_for_less_than_one_sample_is_one_line_and_exit_1(checkpoint, capsys):
    checkpoint.setattr(Narrow, "room", 0)
    code, out, err = run(capsys, "audit", "c.pt", *MODEL, "-k", "1", "--chunk", "4")
    assert (code, out) == (1, "")
    assert [line.partition("samples")[0][-2:] for line in err.splitlines()[:2]] == ["4 ", "2 "]
    assert err.splitlines()[-1].startswith("disam-theory: out of memory with one sample at a time")
    assert len(err.splitlines()) == 3


def test_batches_of_the_gradient_variance_are_cut_too(make_domain):
    """And the variance stays that of whole batches."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    domains = [make_domain(n=12), make_domain("e", n=20)]
    params = parameters_of(model)
    options = {"batch_size": 5, "batches": 6, "rng": 0}
    whole = sharpness.gradient_variance(model, domains, params, **options)
    cut = sharpness.gradient_variance(model, domains, params, **options, chunk=2)
    torch.testing.assert_close(cut.mean, whole.mean, rtol=1e-12, atol=0)
    (part,) = model_losses(model, domains[:1], chunk=12).parts[0]
    assert [len(piece.labels) for piece in part.cut(5)] == [5, 5, 2]
    losses = model_losses(model, domains[:1])
    torch.testing.assert_close(
        domain_gradients(type(losses)(("d",), (12,), (part.cut(5),)), params), domain_gradients(losses, params)
    )


def test_graphs_that_were_kept_go_before_micro_batches_do(make_domain):
    """A forward pass is refused while two graphs are kept: the product is made without them, and no other is kept."""
    built, kept = [], []

    class Watched(nn.Linear):
        def forward(self, inputs):
            if len(kept) == 1 and len(curvature._kept) == 2:
                raise ERRORS["oneDNN"]
            built.append(len(inputs))
            return super().forward(inputs).square()

    domains = [make_domain(n=12)]
    losses = model_losses(Watched(4, 3).double(), domains, chunk=4)
    params = parameters_of(losses.parts[0][0].model)
    vector = torch.ones(15, dtype=torch.float64)
    curvature = Curvature(losses, params)
    (plain,) = curvature.products([vector], torch.ones(1, 1))
    assert len(curvature._kept) == len(built) == 3
    kept.append(True)
    curvature = Curvature(losses, params)
    (found,) = curvature.products([vector], torch.ones(1, 1))
    assert torch.equal(found, plain)
    assert built[3:] == [4] * 5  # two before the memory gave out, three again
    assert not curvature._kept
