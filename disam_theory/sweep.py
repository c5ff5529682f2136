"""Jobs, callables that carry all that they need -> what they return, as it comes: here or on a cluster.

A job has a ``key``, the hash of what it computes, and leaves what it has found on disk, under names that follow from
what it computes; it looks there first. So it may be started again wherever it was cut off, and where it runs makes no
difference to what it leaves.

========= ===================================================================== =================================
backend   where the jobs run                                                    needs
========= ===================================================================== =================================
``local`` processes of this machine, or this process alone                      joblib, for more than one process
``dask``  the workers of the Dask scheduler at ``address``, by the same joblib  ``disam_theory[cluster]``
          call; the jobs of a worker that dies go to the others
``slurm`` a job array submitted with submitit; ``SBATCH_PARTITION``,            ``disam_theory[cluster]``
          ``SBATCH_ACCOUNT``, ``SBATCH_TIMELIMIT`` are obeyed as by sbatch
========= ===================================================================== =================================

The machines of a cluster share a file system, on which the results are at the same path, and have this package in the
same version. Jobs travel as pickles between processes of one user, as joblib, Dask and submitit have it: connect only
to a scheduler that is trusted. SLURM itself is not among the tests; submitit's executors on one machine are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from disam_theory.errors import ComputationError, UsageError, unknown_name

BACKENDS = ("local", "dask", "slurm")
CLUSTER = "slurm"  # as submitit names it; its "local" and "debug" run the same array on this machine
MINUTES = 60  # that SLURM may take for a job, unless SBATCH_TIMELIMIT says otherwise
SECONDS = 10  # within which a Dask scheduler answers
GOES_ON = "finished runs are kept, and the same command goes on"


class Job(Protocol):
    """What can be run anywhere."""

    @property
    def key(self) -> str:
        """The hash of what the job computes."""

    def __call__(self) -> int:
        """Do it, and return how much of it there is."""


@dataclass(frozen=True)
class Place:
    """Where jobs run: one of :data:`BACKENDS`, how many ``processes`` of ``local``, which ``address`` of ``dask``."""

    backend: str = "local"
    processes: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise unknown_name("backend", self.backend, BACKENDS)
        if self.processes < 1:
            raise UsageError(f"{self.processes} processes cannot run anything; give at least 1")
        if (self.backend == "dask") != (self.address is not None):
            have = "has no" if self.address is None else "takes no"
            raise UsageError(
                f"backend {self.backend} {have} address; give dask its scheduler's, such as tcp://host:8786"
            )

    @property
    def here(self) -> bool:
        """Whether the jobs run in this very process."""
        return self.backend == "local" and self.processes == 1


def advance(jobs: Sequence[Job], place: Place, folder: Path) -> Iterator[int]:
    """Run the jobs at ``place``; what each returns, in the order in which they end. SLURM's logs go to ``folder``.

    Raises:
        UsageError: a package is missing, or there is no cluster.
        ComputationError: workers died again and again, or jobs ended short.
    """
    if place.here:
        return (job() for job in jobs)
    return _on_slurm(jobs, folder) if place.backend == "slurm" else _by_joblib(jobs, place)


def _by_joblib(jobs: Sequence[Job], place: Place) -> Iterator[int]:
    try:
        import joblib
        from joblib.externals.loky.process_executor import BrokenProcessPool
    except ImportError as error:
        raise UsageError("several processes need joblib: pip install 'disam_theory[study]'") from error
    with contextlib.ExitStack() as stack:
        died: tuple[type[Exception], ...] = (BrokenProcessPool,)
        if place.backend == "dask":
            died = stack.enter_context(_dask(str(place.address)))
            stack.enter_context(joblib.parallel_config("dask", n_jobs=-1))
        else:
            _start_tracker()
            stack.enter_context(joblib.parallel_config("loky", n_jobs=place.processes, inner_max_num_threads=1))
        # a task is a job: what dies with a worker is what it was at, and nothing else
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        try:
            yield from parallel(joblib.delayed(_alone)(job) for job in jobs)
        except died as error:
            name = type(error).__name__
            raise ComputationError(f"workers died ({name}; is there enough memory?); {GOES_ON}") from error


def _start_tracker() -> None:
    """Start the process that clears what an interruption leaves of joblib's; it is not to warn that it had to."""
    from joblib.externals.loky.backend import resource_tracker

    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, f"ignore::UserWarning:{resource_tracker.__name__}")))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


@contextlib.contextmanager
def _dask(address: str) -> Iterator[tuple[type[Exception], ...]]:
    """Joblib's tasks go to the scheduler at ``address``; what is raised when its workers or itself are lost."""
    try:
        import distributed
    except ImportError as error:
        raise UsageError("a Dask cluster needs dask: pip install 'disam_theory[cluster]'") from error
    try:
        client = distributed.Client(address, timeout=SECONDS, set_as_default=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{address}: no Dask scheduler answers there; start one with: dask scheduler") from error
    with client:
        if not client.nthreads():
            raise UsageError(f"{address}: the scheduler has no workers; start some with: dask worker {address}")
        yield (
            distributed.scheduler.KilledWorker,
            distributed.client.FutureCancelledError,
            distributed.comm.CommClosedError,
        )


def _alone(job: Job) -> int:
    """Run a job in a worker, on one thread: two workers with two each would be in each other's way."""
    import torch

    torch.set_num_threads(1)
    return job()


def _on_slurm(jobs: Sequence[Job], folder: Path) -> Iterator[int]:
    """Submit an array, wait for it and hand on what comes; what cannot is said once all have ended."""
    try:
        import submitit
        from submitit.helpers import as_completed
    except ImportError as error:
        raise UsageError("SLURM needs submitit: pip install 'disam_theory[cluster]'") from error
    try:
        executor = submitit.AutoExecutor(folder, cluster=CLUSTER)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"no SLURM here ({error}); run where srun and sbatch are") from error
    executor.update_parameters(name=f"disam-{jobs[0].key[:8]}", timeout_min=MINUTES, cpus_per_task=1)
    submitted = executor.map_array(_alone, jobs)
    short: list[str] = []
    try:
        for handle in as_completed(submitted, poll_frequency=1):
            try:
                yield handle.result()
            except submitit.core.utils.UncompletedJobError as error:
                short.append(_reason(error))
    finally:
        _cancel(submitted)
    if short:
        raise ComputationError(f"{len(short)} of {len(jobs)} jobs ended short ({short[0]}); logs: {folder}; {GOES_ON}")


def _reason(error: Exception) -> str:
    """The exception that a job raised, the last line of its trace between rules; else the state in which it ended."""
    said = str(error)
    trace = said.split("\n" + 22 * "-" + "\n")
    return trace[1].strip().splitlines()[-1] if len(trace) == 3 else " ".join(said.splitlines()[:2])


def _cancel(submitted: Sequence[Any]) -> None:
    for handle in submitted:
        if not handle.done():
            handle.cancel(check=False)
