"""One big run: its steps against hand-written ones, going on bit for bit, what is kept, and what is refused."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from disam_theory import single_run
from disam_theory import training as stacked
from disam_theory.algorithms import Settings, StepRecords
from disam_theory.domains import Split
from disam_theory.errors import ComputationError, UsageError
from disam_theory.images import BatchOrder, evaluation_transform, image_split
from disam_theory.optim import SharpnessAware, by_domain
from disam_theory.resume import Interrupted
from disam_theory.single_run import Options, train
from disam_theory.traces import TraceWriter, read_trace
from tests.drawn_images import SIDE, convolutional, draw, flipped

STEPS = 9


def settings_of(algorithm="disam", **options):
    options = {"rho": 0.3, "lr": 0.1, "momentum": 0.9, "batch_size": 6, "steps": STEPS} | options
    return Settings(algorithm, ascent_gradient="weights", **options)


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def plain():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def split(make_split):
    whole = make_split()
    return Split(*(tuple(d.to(dtype=torch.float32) for d in part) for part in (whole.sources, whole.validation)),
                 whole.unseen.to(dtype=torch.float32))  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return image_split(draw(tmp_path_factory.mktemp("pictures") / "PACS"), "s", dataset="pacs")


def on_vectors(folder, split, settings, model=None, progress=lambda done, row: None, **options):
    options = Options(**({"evaluate_every": 4, "save_every": 3} | options))
    model = model or mlp()
    outcome = train(model, split, settings, options, folder, classes=3, named={"suite": "drawn"}, progress=progress)
    return model, outcome


def on_images(folder, pictures, settings, progress=lambda done, row: None, **options):
    options = Options(**({"evaluate_every": 4, "save_every": 3} | options))
    torch.manual_seed(5)
    model = convolutional()
    transforms = (flipped, evaluation_transform(SIDE))
    named = {"files": pictures.fingerprint()}
    train(model, pictures, settings, options, folder, classes=3, named=named, transforms=transforms, progress=progress)
    return model


def stop_at(step, how=None):
    def progress(done, row):
        if done == step:
            how() if how else interrupt()

    return progress


def interrupt():
    raise KeyboardInterrupt


def results(folder):
    """All that a finished run leaves: the trace's lines, and the weights with their metadata."""
    kept = {}
    for name in ("last", "best"):
        with safetensors.safe_open(folder / f"{name}.safetensors", "pt") as file:
            kept[name] = file.metadata()["weights_sha256"], file.metadata()["step"]
    return (folder / "trace.jsonl").read_text().splitlines()[1:], kept


# --- steps ---


@pytest.mark.parametrize("sampling", ["pooled", "stratified"])
@pytest.mark.parametrize(("algorithm", "lam"), [("erm", None), ("sam", None), ("disam", 0.7)])
def test_the_steps_are_algorithm_1_written_by_hand(split, tmp_path, algorithm, lam, sampling):
    settings = settings_of(algorithm, lam=lam, sampling=sampling, weight_decay=0.01, schedule="cosine")
    model, _ = on_vectors(tmp_path, split, settings, plain())
    sizes = torch.tensor([float(len(d)) for d in split.sources])
    order = BatchOrder(
        [len(d) for d in split.sources], batch_size=6, steps=STEPS, stratified=sampling == "stratified", seed=0
    )
    x, y = (torch.cat([getattr(d, part) for d in split.sources]) for part in ("inputs", "labels"))
    of = torch.cat([torch.full((len(d),), i) for i, d in enumerate(split.sources)])
    hand = plain()
    weights, velocity = list(hand.parameters()), [torch.zeros_like(p) for p in hand.parameters()]
    trace = read_trace(tmp_path / "trace.jsonl")
    for step in range(STEPS):
        index = torch.tensor([i for _, i in order.at(step)])

        def losses(index=index):
            each = nn.functional.cross_entropy(hand(x[index]), y[index], reduction="none")
            return [each[of[index] == i].mean() for i in range(3) if (of[index] == i).any()]

        present = [i for i in range(3) if (of[index] == i).any()]
        counts = torch.tensor([float((of[index] == i).sum()) for i in present])
        alpha = counts / counts.sum() if sampling == "pooled" else sizes / sizes.sum()
        at_w = torch.stack(losses())
        beta = alpha - 2 * (lam or 0.0) / len(present) * (at_w.detach() - at_w.detach().mean())
        g = torch.autograd.grad((beta * at_w).sum(), weights, retain_graph=True)
        mean = torch.autograd.grad((alpha * at_w).sum(), weights)
        length = torch.cat([v.flatten() for v in g]).norm()
        assert trace.steps["beta"][step][present] == pytest.approx(beta.tolist(), abs=1e-5)
        assert trace.steps["losses"][step][present] == pytest.approx(at_w.tolist(), abs=1e-5)
        assert trace.steps["grad_norm_di"][step] == pytest.approx(float(length), rel=1e-4)
        assert trace.steps["grad_norm"][step] == pytest.approx(
            float(torch.cat([v.flatten() for v in mean]).norm()), rel=1e-4
        )
        before = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, v in zip(weights, g, strict=True):
                w += (0.0 if algorithm == "erm" else 0.3) * v / length
        at_ascent = torch.stack(losses())
        assert trace.steps["losses_ascent"][step][present] == pytest.approx(at_ascent.tolist(), abs=1e-5)
        up = torch.autograd.grad((alpha * at_ascent).sum(), weights)
        lr = 0.05 * (1 + math.cos(math.pi * step / STEPS))
        assert trace.steps["lr"][step] == pytest.approx(lr, rel=1e-6)
        with torch.no_grad():
            for k, (w, b, u) in enumerate(zip(weights, before, up, strict=True)):
                velocity[k] = 0.9 * velocity[k] + u + 0.01 * b
                w.copy_(b - lr * velocity[k])
    for ours, theirs in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_order_is_permutations_from_any_step_on():
    options = {"batch_size": 4, "steps": 10, "seed": 7}
    batches = list(BatchOrder([5, 3], stratified=False, **options))
    drawn = [at for batch in batches for at in batch]
    for epoch in range(5):
        assert sorted(i for e, i in drawn if e == epoch) == list(range(8))
    assert list(BatchOrder([5, 3], stratified=False, start=6, **options)) == batches[6:]
    for batch in BatchOrder([5, 3], stratified=True, **options):
        assert [i < 5 for _, i in batch] == [True] * 4 + [False] * 4
    assert batches != list(BatchOrder([5, 3], stratified=False, **(options | {"seed": 8})))


def test_evaluations_and_the_best_weights_are_those_of_the_trace(split, tmp_path):
    model, outcome = on_vectors(tmp_path, split, settings_of(), evaluate_every=1)
    trace = read_trace(tmp_path / "trace.jsonl")
    accuracies = trace.evaluations["validation_accuracy"]
    assert trace.end == "finished"
    assert trace.evaluations["step"].tolist() == list(range(STEPS + 1))
    assert outcome.best["step"] == accuracies.argmax()
    with safetensors.safe_open(tmp_path / "best.safetensors", "pt") as file:
        about = file.metadata()
    assert int(about["step"]) == accuracies.argmax()
    assert {"disam_theory", "commit", "command", "rng", "device", "dtype"} <= json.loads(about["provenance"]).keys()
    assert json.loads(about["settings"])["algorithm"] == "disam"
    for name, row in (("best", outcome.best), ("last", outcome.evaluations[-1])):
        model.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
        x, y = (torch.cat([getattr(d, part) for d in split.validation]) for part in ("inputs", "labels"))
        with torch.no_grad():
            right = (model.eval()(x).argmax(1) == y).double().mean()
            unseen = nn.functional.cross_entropy(model(split.unseen.inputs), split.unseen.labels)
            source = nn.functional.cross_entropy(model(split.sources[0].inputs), split.sources[0].labels)
        assert row["validation_accuracy"] == pytest.approx(float(right))
        assert row["unseen_loss"] == pytest.approx(float(unseen), rel=1e-5)
        assert row["losses"][0] == pytest.approx(float(source), rel=1e-5)
    assert outcome == on_vectors(tmp_path, split, settings_of(), evaluate_every=1)[1]  # it is read, not run again


STACKED = {
    "erm": {},
    "sam": {},
    "disam": {"lam": 0.7},
    "disam, v-rex": {"lam": 0.7, "objective": "vrex", "vrex_penalty": 2.0},
    "asam": {"lam": 0.7},
    "gsam": {},
    "sagm": {"lam": 0.7, "sagm_alpha": 0.05},
    "weaker-sam": {"lam": 3.0},
    "weaker-gsam": {"lam": 3.0},
}


@pytest.mark.parametrize("name", STACKED)
def test_a_watched_step_shows_what_a_stack_of_runs_records(split, tmp_path, name):
    settings = settings_of(name.partition(",")[0], momentum=0.0, sampling="full", steps=3, **STACKED[name])
    writer = TraceWriter(tmp_path / "stack.jsonl", {"domains": ["a", "b", "c"]})
    stacked.train(plain, [stacked.Run(settings, split, 0)], writers=[writer])
    model = plain()
    x, y = (torch.cat([getattr(d, part) for d in split.sources]) for part in ("inputs", "labels"))
    of = torch.cat([torch.full((len(d),), i) for i, d in enumerate(split.sources)])
    records, rows = StepRecords(), []
    options = {n: getattr(settings, n) for n in ("algorithm", "rho", "lam", "objective", "vrex_penalty", "sagm_alpha")}
    optimizer = SharpnessAware(
        model.parameters(),
        torch.optim.SGD,
        lr=settings.lr,
        **options,
        watch=lambda seen: rows.extend(records.rows(len(rows), [settings.lr], seen, torch.ones(1, 3))),
    )
    for _ in range(3):
        optimizer.step(lambda: by_domain(nn.functional.cross_entropy(model(x), y, reduction="none"), of, 3))
    trace = read_trace(tmp_path / "stack.jsonl")
    for step, row in enumerate(rows):
        for column, value in row.items():
            theirs = trace.steps[column][step]
            ours = np.array(value, dtype=float)
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4, err_msg=f"{column} of step {step}")


def test_a_thinned_trace_holds_rows_of_the_whole_one(split, tmp_path):
    """Those of every third step and of the evaluated ones, with the angle to the step before."""
    whole, _ = on_vectors(tmp_path / "whole", split, settings_of())
    thin, _ = on_vectors(tmp_path / "thin", split, settings_of(), record_every=3)
    assert torch.equal(whole[0].weight, thin[0].weight)
    lines = results(tmp_path / "whole")[0]
    assert results(tmp_path / "thin")[0] == [lines[step] for step in (0, 3, 4, 6, 8, 9)]


def test_erm_takes_one_pass(split, tmp_path):
    model = Recording()
    on_vectors(tmp_path, split, settings_of("erm", steps=3), model)
    assert len(model.masks) == 3


# --- what the official code chooses without saying so ---


def one_step_of_batch_norm(folder, pictures, **options):
    return on_images(folder, pictures, settings_of("sam", steps=1), **options)[1]


def test_batch_norm_takes_its_statistics_at_the_weights_that_are_kept(pictures, tmp_path):
    first = one_step_of_batch_norm(tmp_path / "first", pictures)
    both = one_step_of_batch_norm(tmp_path / "both", pictures, batch_norm="both")
    frozen = one_step_of_batch_norm(tmp_path / "eval", pictures, mode="eval")
    assert [int(layer.num_batches_tracked) for layer in (first, both, frozen)] == [1, 2, 0]
    erm = on_images(tmp_path / "erm", pictures, settings_of("erm", steps=1))[1]
    assert torch.equal(first.running_mean, erm.running_mean)  # those of w, wherever the second pass is
    assert not torch.equal(first.running_mean, both.running_mean)
    assert torch.equal(frozen.running_mean, torch.zeros(4))


class Recording(nn.Module):
    """Keeps the masks that its dropout draws in training."""

    def __init__(self):
        super().__init__()
        self.linear, self.masks = nn.Linear(4, 3), []

    def forward(self, x):
        kept = nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        self.masks += [kept] if self.training else []
        return self.linear(x * kept)


@pytest.mark.parametrize(("mask", "equal"), [("same", True), ("new", False)])
def test_dropout_draws_one_mask_a_step_or_two(split, tmp_path, mask, equal):
    model, _ = on_vectors(tmp_path, split, settings_of(steps=2), Recording(), dropout_mask=mask)
    assert [torch.equal(*model.masks[k : k + 2]) for k in (0, 2)] == [equal, equal]
    assert not torch.equal(model.masks[0], model.masks[2])


def test_bfloat16_runs_the_model_and_leaves_the_weights_float32(split, tmp_path):
    exact, _ = on_vectors(tmp_path / "a", split, settings_of())
    mixed, _ = on_vectors(tmp_path / "b", split, settings_of(), amp="bf16")
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert not torch.equal(exact[0].weight, mixed[0].weight)
    torch.testing.assert_close(exact[0].weight, mixed[0].weight, rtol=0, atol=0.1)


# --- going on ---


@pytest.mark.parametrize("step", [1, 4, 8])
def test_an_interrupted_run_on_images_ends_as_an_uninterrupted_one(pictures, tmp_path, step):
    """With batch norm, dropout and random augmentation."""
    on_images(tmp_path / "whole", pictures, settings_of())
    with pytest.raises(Interrupted, match=f"goes on from step {step}"):
        on_images(tmp_path / "parts", pictures, settings_of(), stop_at(step))
    assert read_trace(tmp_path / "parts/trace.jsonl").end is None
    on_images(tmp_path / "parts", pictures, settings_of())
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert not (tmp_path / "parts/state.pt").exists()


STATEFUL = {
    "a thinned trace": (settings_of("disam"), {"record_every": 3}),
    "groupdro": (settings_of("sam", objective="groupdro", groupdro_eta=0.5), {}),
    "fishr's average": (settings_of("disam", objective="fishr", fishr_penalty=1.0), {}),
    "dgsam's order": (settings_of("dgsam", lr=0.02), {}),
    "adam": (settings_of("disam", momentum=0.0, lr=0.01), {"optimizer": "adam"}),
    "new masks, stratified": (settings_of("gsam", sampling="stratified", batch_size=2), {"dropout_mask": "new"}),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_what_a_method_keeps_between_steps_goes_on_too(split, tmp_path, name):
    settings, options = STATEFUL[name]
    on_vectors(tmp_path / "whole", split, settings, **options)
    with pytest.raises(Interrupted):
        on_vectors(tmp_path / "parts", split, settings, progress=stop_at(5), **options)
    on_vectors(tmp_path / "parts", split, settings, **options)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_a_killed_process_goes_on_from_its_last_state(pictures, tmp_path):
    """Killed after step 8, the state is that of step 6."""
    script = (
        "import os, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from tests.test_single_run import image_split, on_images, settings_of, stop_at\n"
        "pictures = image_split(Path(sys.argv[1]), 's', dataset='pacs')\n"
        "kill = lambda: os.kill(os.getpid(), 9)\n"
        "on_images(Path(sys.argv[2]), pictures, settings_of(), stop_at(8, kill))\n"
    )
    root = pictures.unseen.paths[0].parents[2]
    command = [sys.executable, "-c", script, str(root), str(tmp_path / "parts")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "parts/state.pt").exists()
    begun = []
    on_images(tmp_path / "parts", pictures, settings_of(), lambda step, row: begun.append(step))
    assert begun[0] == 7
    on_images(tmp_path / "whole", pictures, settings_of())
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_a_signal_ends_the_step_in_hand_and_handlers_are_put_back(split, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    terminate = stop_at(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="goes on from step 4"):
        on_vectors(tmp_path / "parts", split, settings_of(), progress=terminate)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    on_vectors(tmp_path / "parts", split, settings_of())
    on_vectors(tmp_path / "whole", split, settings_of())
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_a_full_disk_keeps_the_state_of_before(split, tmp_path, monkeypatch):
    write, calls = single_run.write_atomically, []

    def full(path, content):
        if path.name == "state.pt":
            calls.append(path)
            if len(calls) == 2:
                raise ComputationError(f"{path}: cannot be written (No space left on device)")
        write(path, content)

    monkeypatch.setattr(single_run, "write_atomically", full)
    with pytest.raises(ComputationError, match="No space left"):
        on_vectors(tmp_path / "parts", split, settings_of())
    on_vectors(tmp_path / "parts", split, settings_of())
    monkeypatch.undo()
    on_vectors(tmp_path / "whole", split, settings_of())
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_the_number_of_workers_and_the_callers_generator_have_no_part_in_it(pictures, tmp_path):
    torch.manual_seed(5)
    convolutional()
    state = torch.random.get_rng_state()
    for name, workers in (("alone", 0), ("helped", 2)):
        on_images(tmp_path / name, pictures, settings_of(steps=3), workers=workers)  # it seeds, and makes the model
        assert torch.equal(torch.random.get_rng_state(), state)
    assert results(tmp_path / "helped") == results(tmp_path / "alone")


# --- what is refused ---


def test_a_folder_of_another_run_is_left_alone(split, tmp_path):
    on_vectors(tmp_path, split, settings_of())
    before = results(tmp_path)
    with pytest.raises(UsageError, match=r"holds another run \(rho 0\.3, now 0\.2\)"):
        on_vectors(tmp_path, split, settings_of(rho=0.2))
    assert results(tmp_path) == before


def test_a_trace_cut_shorter_than_its_state_is_refused(split, tmp_path):
    with pytest.raises(Interrupted):
        on_vectors(tmp_path, split, settings_of(), progress=stop_at(4))
    lines = (tmp_path / "trace.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "trace.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(UsageError, match="holds 2 steps, not the 4 that were recorded"):
        on_vectors(tmp_path, split, settings_of())


def test_a_state_that_is_none_is_refused(split, tmp_path):
    with pytest.raises(Interrupted):
        on_vectors(tmp_path, split, settings_of(), progress=stop_at(4))
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 not a state")
    with pytest.raises(UsageError, match=r"state\.pt: cannot be gone on from .*remove it to start anew"):
        on_vectors(tmp_path, split, settings_of())


def test_a_diverged_run_says_so_and_leaves_the_checkpoints_of_before(split, tmp_path):
    settings = settings_of("sam", lr=1e38, momentum=0.0)
    with pytest.raises(ComputationError, match=r"diverged: not finite at step [1-9]") as error:
        on_vectors(tmp_path, split, settings, nn.Linear(4, 3), save_every=1)
    assert error.value.exit_code == 1
    trace = read_trace(tmp_path / "trace.jsonl")
    assert trace.end == "diverged"
    kept = load_file(tmp_path / "last.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())
    with pytest.raises(ComputationError, match="the run diverged; lower the learning rate"):
        on_vectors(tmp_path, split, settings, nn.Linear(4, 3), save_every=1)


def test_a_broken_image_ends_the_run_or_is_left_out_and_named(tmp_path):
    root = draw(tmp_path / "PACS")
    broken = root / "photo" / "dog" / "003.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    pictures = image_split(root, "sketch")
    with pytest.raises(UsageError, match=r"photo/dog/003\.png: not a readable image .*--skip-corrupt"):
        on_images(tmp_path / "run", pictures, settings_of())
    on_images(tmp_path / "run", pictures, settings_of(), skip_corrupt=True)
    last = json.loads((tmp_path / "run/trace.jsonl").read_text().splitlines()[-1])
    assert len(last["corrupt"]) == 1
    assert str(broken) in last["corrupt"][0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"amp": "fp16"}, "use bf16"),
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"save_every": 0}, "save every is 0; it must be at least 1"),
        ({"workers": -1}, "workers is -1"),
        ({"mode": "eval"}, "disam has no such form"),
        ({"optimizer": "adam"}, r"momentum 0\.9 is sgd's"),
    ],
)
def test_options_that_cannot_be_are_refused(split, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        on_vectors(tmp_path, split, settings_of(), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_refused(split, tmp_path):
    with pytest.raises(UsageError, match=r"outputs for one sample have shape \(1, 5\); 3 classes need \(1, 3\)"):
        on_vectors(tmp_path, split, settings_of(), nn.Linear(4, 5))
    with pytest.raises(UsageError, match=r"does not take inputs of shape \(1, 4\)"):
        on_vectors(tmp_path, split, settings_of(), nn.Linear(7, 3))
    with pytest.raises(UsageError, match=r"whose last layer is nn\.Linear"):
        on_vectors(tmp_path, split, settings_of(objective="coral"), Bare())


class Bare(nn.Module):
    """A linear map without nn.Linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        return x @ self.weight
