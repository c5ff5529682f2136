"""The main job: all runs, all claims, all figures, the report. ``python paper_repro.py --out out [--quick]``.

Exit code 0 when every verdict is as expected, 1 when one changed or a result falls short, 2 for misuse.
"""

from __future__ import annotations

import argparse
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
from disam_theory.errors import DisamError, unknown_name
from disam_theory.models import digits_mlp
from disam_theory.provenance import provenance
from disam_theory.study import Block, Study
from figures import FIGURES
from figures.style import FigureSpec, save
from proofs_checks import CLAIMS

RHOS = (0.01, 0.05, 0.1, 0.2, 0.5)
SUITES = ("digits-rotated", "digits-corrupted", "digits-sources")


FULL = {"seeds": 10, "steps": 300}
QUICK = {"seeds": 4, "steps": 150}


def blocks(*, seeds: int, steps: int) -> list[Block]:
    """The embedded study: minibatch momentum SGD over the radii, and full-batch runs as Theorem 1 has them."""
    common = {"lr": 0.1, "momentum": 0.9, "steps": steps, "batch_size": 96}
    arms = [Settings("erm", **common)]
    arms += [Settings("sam", rho=rho, **common) for rho in RHOS]
    arms += [Settings("disam", rho=rho, lam=0.1, **common) for rho in (0.05, 0.5)]
    kept = tuple(steps * k // 5 for k in range(6))
    minibatch = [Block(suite, tuple(arms), seeds, snapshot_steps=kept, snapshot_seeds=3) for suite in SUITES]
    theorem = {"lr": 0.5, "schedule": "inverse-sqrt", "sampling": "full", "rho": 0.05}
    short = steps // 3
    full = (Settings("sam", steps=short, **theorem), Settings("disam", lam=0.1, steps=short, **theorem))
    early = (0, 2, short // 5, short // 2)
    return minibatch + [Block(suite, full, min(seeds, 6), early, snapshot_seeds=2) for suite in SUITES[:2]]


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
        study = Study(arguments.out, blocks(**size), digits_mlp, progress=_progress)
        rng = f"seeds 0..{size['seeds'] - 1}"
        environment = provenance(rng=rng, device="cpu", dtype="float32", quick=arguments.quick)
        if any(claim.statistical for claim in claims):
            study.run()
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
    return parser.parse_args()


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


def _progress(what: str, done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        _say(f"{what}: step {done} of {total}")


if __name__ == "__main__":
    sys.exit(main())
