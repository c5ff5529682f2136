"""Where the runs of a study are made does not matter: processes, a Dask cluster that loses a worker, submitit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from disam_theory import sweep
from disam_theory.algorithms import Settings
from disam_theory.errors import ComputationError, UsageError
from disam_theory.models import digits_mlp
from disam_theory.study import Block, Study
from disam_theory.sweep import Place

ARMS = (Settings("sam", steps=12, batch_size=16), Settings("disam", steps=12, batch_size=16))
LOG = "DISAM_TEST_LOG"  # a folder where each process leaves what it started


def small(folder, *, model=digits_mlp, seeds=2, arms=ARMS):
    blocks = [Block(suite, arms, seeds, (0, 12), 1, record_every=3) for suite in ("digits-rotated", "digits-corrupted")]
    return Study(folder, blocks, model, evaluate_every=5)


def files(folder):
    """Every file of a study, byte for byte; a weights file as its tensors."""
    found = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    found |= {path: torch.load(path, weights_only=True) for path in folder.rglob("*.pt")}
    return {str(path.relative_to(folder)): content for path, content in sorted(found.items())}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial")
    small(folder).run()
    return files(folder)


def test_two_processes_leave_what_one_leaves(serial, tmp_path):
    said = []
    study = small(tmp_path)
    study.progress = lambda *how_far: said.append(how_far)
    study.run(Place(processes=2))
    assert same(files(tmp_path), serial)
    assert not list(tmp_path.rglob("*.partial"))
    total = sum(job.size for job in small(tmp_path / "other").jobs())
    assert said[0] == ("36 runs", 0, total)
    assert said[-1] == ("36 runs", total, total)
    assert len(said) == 3  # a job a suite


def slow_and_logged():
    """The study's model; each is logged by the process that starts a run with it, and takes its time."""
    folder = Path(os.environ[LOG])
    with (folder / f"{os.getpid()}").open("a") as log:
        log.write("started\n")
    return SlowMLP()


class SlowMLP(nn.Sequential):
    """digits_mlp, so slow that a worker can be killed while it trains."""

    def __init__(self):
        super().__init__(*digits_mlp())

    def forward(self, x):
        time.sleep(float(os.environ.get("DISAM_TEST_SLEEP", "0")))
        return super().forward(x)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A scheduler and two workers, each a process of its own, which log their runs to ``tmp_path / "log"``."""
    distributed = pytest.importorskip("distributed")
    (tmp_path / "log").mkdir()
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    monkeypatch.setenv("DISAM_TEST_SLEEP", "0.005")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options, local_directory=str(tmp_path / "dask")) as made:
        yield made


def started(folder):
    return {int(path.name): len(path.read_text().splitlines()) for path in folder.iterdir()}


def cut_off(pids):
    """Kill one of the processes while it is at runs, and return the traces that it was writing."""
    psutil = pytest.importorskip("psutil")
    for _ in range(1000):
        for process in map(psutil.Process, pids):
            process.suspend()
            writing = [Path(file.path) for file in process.open_files() if file.path.endswith(".partial")]
            if writing and all(path.read_text().count("\n") > 1 for path in writing):  # a header and a step
                process.kill()
                return process.pid, writing
            process.resume()
        time.sleep(0.01)
    raise AssertionError("no process was ever at a run")


def test_a_worker_killed_in_mid_run_loses_nothing_and_nothing_is_run_twice(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("disam_theory.study.STACK", 6)
    study, cut, there = small(tmp_path / "out", model=slow_and_logged), [], {}

    def kill(what, done, total):
        if done and not cut:  # once some runs are finished
            there.update({path: path.stat() for path in study.folder.rglob("*.jsonl")})
            cut.extend(cut_off([worker.pid for worker in cluster.workers.values()]))

    study.progress = kill
    study.run(Place("dask", address=cluster.scheduler_address))
    killed, writing = cut
    assert len(there) >= 5
    assert len(writing) in (5, 6)
    for path, before in there.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    runs = {int(path.name): path.read_text().count("started") for path in (tmp_path / "log").iterdir()}
    assert killed in runs
    assert sum(runs.values()) == 36 + len(writing)  # what the killed worker was at was begun again, and nothing else
    assert not list(study.folder.rglob("*.partial"))
    monkeypatch.setenv("DISAM_TEST_SLEEP", "0")
    alone = small(tmp_path / "alone", model=slow_and_logged)
    alone.run()
    assert same(files(study.folder), files(alone.folder))
    assert not study.jobs()


def test_submitit_leaves_what_one_process_leaves(serial, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(sweep, "CLUSTER", "local")
    small(tmp_path).run(Place("slurm"))
    assert same(files(tmp_path), serial)


def fails(*_):
    raise MemoryError("out of memory")


def test_jobs_that_end_short_on_slurm_are_one_line(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(sweep, "CLUSTER", "local")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where jobs find this file's model
    with pytest.raises(ComputationError, match=r"1 of 1 jobs ended short \(MemoryError: out of memory\); logs: "):
        Study(tmp_path, [Block("digits-rotated", ARMS, 1)], fails).run(Place("slurm"))


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_one_line_and_finished_runs_are_kept(tmp_path):
    small(tmp_path, seeds=1).run()
    before = files(tmp_path)
    with pytest.raises(ComputationError, match=r"workers died .*finished runs are kept, and the same command goes on"):
        small(tmp_path, model=dies).run(Place(processes=2))
    assert same(files(tmp_path), before)


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from disam_theory import study
from disam_theory.sweep import Place
from test_sweep import slow_and_logged, small
study.STACK = 6
try:
    small(Path({folder!r}), model=slow_and_logged).run(Place(processes=2))
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
"""


def test_an_interruption_of_two_processes_is_silent_and_finished_runs_are_kept(tmp_path):
    root, tests = Path(sweep.__file__).parents[1], Path(__file__).parent
    script = SCRIPT.format(root=str(root), tests=str(tests), folder=str(tmp_path / "out"))
    (tmp_path / "log").mkdir()
    environment = {**os.environ, LOG: str(tmp_path / "log"), "DISAM_TEST_SLEEP": "0.005"}
    command = [sys.executable, "-c", script]
    options = {"stderr": subprocess.PIPE, "text": True, "env": environment, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        for _ in range(2000):
            if list(tmp_path.rglob("*.jsonl")) or process.poll() is not None:
                break
            time.sleep(0.01)
        there = files(tmp_path / "out")
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: every process gets it
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")
    assert there
    after = files(tmp_path / "out")
    assert all(same(after[name], content) for name, content in there.items())


LEAK = """
from disam_theory import sweep
sweep._start_tracker()
from joblib.externals.loky.backend import resource_tracker
resource_tracker.register("/loky-0-taken-away", "semlock")
"""


def test_what_an_interruption_leaves_of_joblib_is_cleared_without_a_word(tmp_path):
    """A semaphore that was unlinked when the interruption came, and not yet given up: a race, made certain here."""
    root = Path(sweep.__file__).parents[1]
    options = {"capture_output": True, "text": True, "cwd": root, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", LEAK], **options, check=True)
    assert done.stderr == ""
    kept = subprocess.run([sys.executable, "-c", LEAK.replace("sweep._start_tracker()", "")], **options, check=True)
    assert "/loky-0-taken-away" in kept.stderr  # what the process would have said


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"backend": "dusk"}, "unknown backend 'dusk': did you mean 'dask'"),
        ({"processes": 0}, "0 processes cannot run anything"),
        ({"backend": "dask"}, "backend dask has no address"),
        ({"address": "tcp://127.0.0.1:1"}, "backend local takes no address"),
    ],
)
def test_a_place_that_is_none_is_refused(place, message):
    with pytest.raises(UsageError, match=message):
        Place(**place)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere at all"])
def test_no_scheduler_is_one_line(address, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(sweep, "SECONDS", 0.5)
    with pytest.raises(UsageError, match=f"{address}: no Dask scheduler answers there"):
        small(tmp_path).run(Place("dask", address=address))


def test_no_slurm_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="no SLURM here"):
        small(tmp_path).run(Place("slurm"))
