"""The command line ``disam-theory``. What a verb does, and the heavy imports, are in :mod:`disam_theory.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from disam_theory import __version__
from disam_theory.errors import DisamError

EXAMPLE = "example: disam-theory {} model.pt --model disam_theory.models:digits_mlp --data digits-rotated{}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns 0, 1 when a result falls short, or 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        from disam_theory import commands

        return int(getattr(commands, arguments.verb)(arguments))
    except DisamError as error:
        print(f"disam-theory: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("disam-theory: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="disam-theory",
        description="Per-domain sharpness of trained checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"disam-theory {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    audit = verbs.add_parser(
        "audit",
        help="how sharp a checkpoint is, domain by domain",
        description="Loss, accuracy, gradient norm and top Hessian eigenvalues of a checkpoint on each domain, on the "
        "pooled data, with DISAM's weights, and of L_DI. Under torchrun the data are shared among the processes.",
        epilog=EXAMPLE.format("audit", ""),
    )
    _add_common(audit)
    _add_spectral(audit)
    audit.add_argument("--lam", type=float, default=0.1, help="lambda of DISAM's weights (default 0.1)")
    spectrum = verbs.add_parser(
        "spectrum",
        help="both ends of the spectrum, trace and density, domain by domain",
        description="Top and bottom eigenvalues with certified intervals, and the trace with its standard error, of a "
        "checkpoint's curvature on each domain and on the pooled data.",
        epilog=EXAMPLE.format("spectrum", " --density --out out"),
    )
    _add_common(spectrum)
    _add_spectral(spectrum)
    spectrum.add_argument("--kind", choices=("hessian", "ggn", "fisher"), default="hessian", help="which matrix")
    spectrum.add_argument("--parameters", nargs="+", metavar="PATTERN", default=[], help="only these, such as 'head.*'")
    spectrum.add_argument("--per-layer", action="store_true", help="the diagonal block of each layer by itself")
    spectrum.add_argument("--samples", type=int, default=20, help="random vectors for the trace (default 20)")
    spectrum.add_argument("--density", action="store_true", help="also write the spectral density to --out")
    landscape = verbs.add_parser(
        "landscape",
        help="every domain's loss along a line or over a plane around a checkpoint",
        description="Writes landscape.csv: the loss of each domain, and pooled, at the points of a slice.",
        epilog=EXAMPLE.format("landscape", " --out out"),
    )
    _add_common(landscape)
    landscape.add_argument("--direction", choices=("filter", "eigen"), default="filter", help="random, or eigenvectors")
    landscape.add_argument("--dimensions", type=int, choices=(1, 2), default=2)
    landscape.add_argument("--points", type=int, default=21, help="points along each direction (default 21)")
    landscape.add_argument("--span", type=float, default=1.0, help="from -span to span (default 1)")
    rate = verbs.add_parser(
        "rate",
        help="how far the convergence theory holds along recorded traces, and how fast they converge",
        description="Both sides of the printed and of the corrected convergence theorem at every step of each trace, "
        "the first step at which each is exceeded, and the rate of convergence with its interval.",
        epilog="example: disam-theory rate run.jsonl --smoothness 4 --out out",
    )
    rate.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="files of disam_theory/traces.py")
    rate.add_argument("--smoothness", type=float, metavar="L", help="smoothness constant (default: a lower bound)")
    rate.add_argument(
        "--gradient-bound", type=float, metavar="G", help="bound of the gradients (default: the largest of the trace)"
    )
    rate.add_argument(
        "--minimum", type=float, default=0.0, metavar="L_MIN", help="a lower bound of the loss (default 0)"
    )
    _add_output(rate)
    return parser


def _add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a state dict, or a file that holds one")
    verb.add_argument(
        "--model", required=True, metavar="PKG.MOD:CALLABLE", help="called without arguments for the module"
    )
    verb.add_argument(
        "--data", required=True, metavar="SUITE-OR-FOLDER", help="an embedded suite, or ROOT/domain/class/*.jpg"
    )
    _add_output(verb)
    verb.add_argument("--chunk", type=int, default=1024, help="samples in memory at once (default 1024)")
    verb.add_argument("--image-size", type=int, default=224, help="pixels a side for an image folder (default 224)")
    verb.add_argument("--rng", type=int, default=0, help="seed of the suite and of all random vectors (default 0)")
    verb.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    verb.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")


def _add_output(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=Path, metavar="DIR", help="also write the results there, as JSON and CSV")
    verb.add_argument("--format", choices=("table", "json", "csv"), default="table", help="what to print")


def _add_spectral(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-k", type=int, default=3, help="number of eigenvalues (default 3)")
    verb.add_argument("--tol", type=float, default=1e-3, help="relative residual to reach (default 1e-3)")
    verb.add_argument("--max-products", type=int, default=300, help="Hessian products to spend at most (default 300)")


if __name__ == "__main__":
    sys.exit(main())
