"""The main job: all runs, all claims, all figures, the report. ``python paper_repro.py --out out [--quick]``.

``--from out/traces`` does it again from the recorded runs, without training. ``--backend`` has a cluster make the runs.

Exit code 0 when every verdict is as expected, 1 when one changed or a result falls short, 2 for misuse.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from disam_theory import report
from disam_theory.algorithms import Settings
from disam_theory.claims import Claim, Finding, run
from disam_theory.errors import DisamError, UsageError, unknown_name
from disam_theory.models import digits_mlp
from disam_theory.provenance import provenance
from disam_theory.study import Block, Study
from disam_theory.sweep import BACKENDS, Place
from figures import FIGURES
from figures.style import FigureSpec, save
from proofs_checks import CLAIMS
from proofs_checks.contrasts import LAM, LAMBDAS, RADII, RHOS, SUITES
from proofs_checks.where_differs import map_blocks

PENALTIES: tuple[dict[str, Any], ...] = (  # Table 5; chosen by validation accuracy, as the published ones diverge here
    {"objective": "vrex", "vrex_penalty": 0.3},
    {"objective": "fishr", "fishr_penalty": 20.0},
)
RELATIVES = ("gsam", "sagm")  # of SAM, in Table 1
CONTROLS = (("disam", -LAM), ("weaker-sam", LAM))
EVERY = 20  # steps between two evaluations, and between two that a minibatch trace holds
FULL = {"seeds": 20, "steps": 300}
QUICK = {"seeds": 4, "steps": 150}


def blocks(*, seeds: int, steps: int) -> list[Block]:
    """The embedded study: minibatch momentum SGD over radii, strengths and algorithms, and runs as in Theorem 1."""
    common: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "steps": steps, "batch_size": 96}
    measured = [
        Settings("erm", **common),
        *(Settings(name, rho=rho, **common) for rho in RHOS for name in ("sam", "disam")),
        *(Settings(name, rho=rho, lam=lam, **common) for rho in RHOS for name, lam in CONTROLS),
    ]
    others = [
        *(Settings(name, rho=rho, **common) for rho in RADII if rho not in RHOS for name in ("sam", "disam")),
        *(Settings("disam", rho=0.5, lam=lam, **common) for lam in LAMBDAS),
        *(Settings(name, rho=RHOS[0], lam=lam, **common) for name in RELATIVES for lam in (0.0, LAM)),
        *(Settings(name, rho=RHOS[0], **penalty, **common) for penalty in PENALTIES for name in ("erm", "disam")),
    ]
    beside = [  # what stands beside Tables 1 and 5
        *(
            Settings(algorithm, rho=RHOS[0], lam=lam, **common)
            for name in RELATIVES
            for algorithm, lam in ((name, -LAM), (f"weaker-{name}", LAM))
        ),
        *(
            Settings(name, rho=RHOS[0], lam=lam, **penalty, **common)
            for penalty in PENALTIES
            for name, lam in (("sam", LAM), *CONTROLS)
        ),
    ]
    kept = tuple(steps * k // 5 for k in range(6))
    made = []
    for suite in SUITES:
        made.append(Block(suite, tuple(measured), seeds, snapshot_steps=kept, snapshot_seeds=10, record_every=EVERY))
        made.append(Block(suite, tuple(others), seeds, record_every=EVERY))
        made.append(Block(suite, tuple(beside), seeds // 2, record_every=EVERY))
    theorem: dict[str, Any] = {"lr": 0.5, "schedule": "inverse-sqrt", "sampling": "full", "rho": RHOS[0]}
    short = steps // 3
    full = tuple(
        Settings(name, lam=lam, steps=short, **theorem) for name, lam in (("sam", LAM), ("disam", LAM), *CONTROLS)
    )
    early = (0, 2, short // 5, short // 2)
    made += [Block(suite, full, min(seeds, 6), early, snapshot_seeds=2) for suite in SUITES[:2]]
    return made + map_blocks(seeds=seeds, steps=steps // 2)


def main() -> int:
    """Run the study, check the claims, draw the figures, write the report; returns the exit code."""
    arguments = _arguments()
    if arguments.list:
        print("\n".join(f"{claim.id:<28} {claim.expected.value:<12} {claim.where}" for claim in CLAIMS))
        return 0
    torch.set_num_threads(1)  # tiny matrix products: a second thread only costs time
    try:
        claims = _chosen(arguments.only)
        size = QUICK if arguments.quick else FULL
        study = _study(arguments, size, train=any(claim.statistical for claim in claims))
        rng = f"seeds 0..{size['seeds'] - 1}"
        environment = provenance(rng=rng, device=arguments.device, dtype="float32", quick=arguments.quick)
        findings: list[Finding] = []
        for claim in claims:
            _say(f"claim {claim.id}")
            findings.append(run(claim, study, quick=arguments.quick))
            report.write_json(arguments.out / "claims.json", environment, findings)
        report.write_markdown(arguments.out / "claims.md", findings)
        entries, problems = _figures(() if arguments.only else FIGURES, study, arguments.out, environment)
        report.write_html(arguments.out / "report.html", environment, findings, entries)
    except DisamError as error:
        _say("")
        print(f"paper_repro: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _say("")
        print("paper_repro: interrupted; finished runs are kept, and the same command goes on", file=sys.stderr)
        return 130
    _say("")
    print(report.terminal_table(findings, shutil.get_terminal_size().columns))
    print(f"report: {arguments.out / 'report.html'}")
    for problem in problems:
        print(f"paper_repro: {problem}", file=sys.stderr)
    return 0 if all(finding.as_expected for finding in findings) and not problems else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="All claims of the paper, all figures, and the report.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything written (default out)")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps: within 3 minutes on two cores")
    parser.add_argument("--list", action="store_true", help="list the claims and the verdicts expected of them")
    parser.add_argument("--only", nargs="+", metavar="CLAIM", default=[], help="check these claims and draw no figures")
    parser.add_argument("--from", dest="recorded", type=Path, metavar="TRACES", help="train nothing: read these traces")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that train, a thread each (default up to 2)")
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="where the runs are made (default local)")
    parser.add_argument("--address", help="of the Dask scheduler, such as tcp://host:8786")
    parser.add_argument("--device", default="cpu", help="device that trains (default cpu)")
    return parser.parse_args()


def _study(arguments: argparse.Namespace, size: dict[str, int], *, train: bool) -> Study:
    """The study with all its runs: made where asked and where they are not there yet, or read with ``--from``."""
    device, recorded = _device(arguments.device), arguments.recorded
    if recorded and (recorded.name != "traces" or not recorded.is_dir()):
        raise UsageError(
            f"--from {recorded}: not a study's folder of traces; give the one it wrote, such as out/traces"
        )
    cores = min(2, os.cpu_count() or 1) if device.type == "cpu" else 1
    place = Place(arguments.backend, cores if arguments.jobs is None else arguments.jobs, arguments.address)
    folder = recorded.parent if recorded else arguments.out
    study = Study(folder, blocks(**size), digits_mlp, evaluate_every=EVERY, device=device, progress=_Progress())
    if recorded:
        study.require()
    elif train:
        study.run(place)
    return study


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # unknown, or not in this build or machine
        raise UsageError(f"--device {name}: this PyTorch finds no such device here; give cpu or another") from error
    return device


def _chosen(names: list[str]) -> list[Claim]:
    known = {claim.id: claim for claim in CLAIMS}
    for name in names:
        if name not in known:
            raise unknown_name("claim", name, known)
    return [known[name] for name in names] if names else list(CLAIMS)


def _figures(
    specs: Iterable[FigureSpec], study: Study, out: Path, environment: dict[str, Any]
) -> tuple[list[report.FigureEntry], list[str]]:
    """The figures drawn, and for each that could not be computed a line that says why: the others go on."""
    entries, problems = [], []
    for spec in specs:
        _say(f"figure {spec.id}")
        try:
            svg = save(spec, spec.compute(study), out / "figures", environment)
        except DisamError as error:
            problems.append(f"figure {spec.id}: {error}")
            continue
        files = tuple(f"figures/{spec.id}.{kind}" for kind in ("pdf", "svg", "png", "csv"))
        entries.append(report.FigureEntry(spec.id, spec.title, spec.caption, svg, spec.where, files))
    return entries, problems


_started = time.monotonic()


def _say(what: str) -> None:
    if sys.stderr.isatty():
        clock = f"{time.monotonic() - _started:5.0f} s  " if what else ""
        print(f"\r\033[K{clock}{what}", end="", file=sys.stderr, flush=True)


class _Progress:
    """Says how far the work is, and how long it may yet take at its pace so far."""

    def __init__(self) -> None:
        self._what, self._since, self._before, self._said = "", 0.0, 0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._before = what, now, done
            _say(what)
        elif now - self._said > 0.2 or done == total:
            left = (now - self._since) * (total - done) / max(done - self._before, 1)
            minutes, seconds = divmod(round(left), 60)
            _say(f"{what}: {100 * done // total} %, {minutes} min {seconds:02d} s left")
            self._said = now


if __name__ == "__main__":
    sys.exit(main())
