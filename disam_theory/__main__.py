"""The command line ``disam-theory``. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from disam_theory import __version__
from disam_theory.errors import ComputationError, DisamError, UsageError

if TYPE_CHECKING:
    import torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns 0, 1 when a result falls short, or 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.verb(arguments))
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
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_audit(verbs)
    return parser


def _add_audit(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    audit = verbs.add_parser(
        "audit",
        help="how sharp a checkpoint is, domain by domain",
        description="Loss, accuracy, gradient norm and top Hessian eigenvalues of a checkpoint on each domain, on the "
        "pooled data, with DISAM's weights, and of L_DI.",
        epilog="example: disam-theory audit model.pt --model disam_theory.models:digits_mlp --data digits-rotated",
    )
    audit.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a state dict, or a file that holds one")
    audit.add_argument(
        "--model", required=True, metavar="PKG.MOD:CALLABLE", help="called without arguments for the module"
    )
    audit.add_argument(
        "--data", required=True, metavar="SUITE-OR-FOLDER", help="an embedded suite, or ROOT/domain/class/*.jpg"
    )
    audit.add_argument("--out", type=Path, metavar="DIR", help="also write audit.json and audit.csv there")
    audit.add_argument("--format", choices=("table", "json", "csv"), default="table", help="what to print")
    audit.add_argument("-k", type=int, default=3, help="number of eigenvalues (default 3)")
    audit.add_argument("--lam", type=float, default=0.1, help="lambda of DISAM's weights (default 0.1)")
    audit.add_argument("--tol", type=float, default=1e-3, help="relative residual to reach (default 1e-3)")
    audit.add_argument("--max-products", type=int, default=300, help="Hessian products to spend at most (default 300)")
    audit.add_argument("--chunk", type=int, default=1024, help="samples in memory at once (default 1024)")
    audit.add_argument("--image-size", type=int, default=224, help="pixels a side for an image folder (default 224)")
    audit.add_argument("--rng", type=int, default=0, help="seed of the suite and of the starting vectors (default 0)")
    audit.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    audit.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    audit.set_defaults(verb=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    import torch

    from disam_theory.audit import as_csv, as_json, as_table, audit
    from disam_theory.checkpoints import fill, load_model, load_state_dict
    from disam_theory.domains import load_suite
    from disam_theory.provenance import one_line, provenance, sha256

    if arguments.k < 1 or arguments.chunk < 1 or arguments.image_size < 1 or not arguments.tol > 0:
        raise UsageError("-k, --chunk and --image-size must be at least 1, and --tol above 0")
    device = _device(arguments.device)
    state = load_state_dict(arguments.checkpoint)
    model = fill(load_model(arguments.model), state, str(arguments.checkpoint))
    suite = load_suite(arguments.data, rng=arguments.rng, image_size=arguments.image_size)
    rows = audit(
        model,
        suite.domains,
        k=arguments.k,
        lam=arguments.lam,
        tol=arguments.tol,
        max_products=arguments.max_products,
        chunk=arguments.chunk,
        rng=arguments.rng,
        dtype=getattr(torch, arguments.dtype),
        device=device,
        progress=_progress,
    )
    _progress(0, 0)
    record = provenance(
        checkpoint=str(arguments.checkpoint),
        checkpoint_sha256=sha256(arguments.checkpoint),
        data=suite.name,
        model=arguments.model,
        rng=arguments.rng,
        dtype=arguments.dtype,
        device=str(device),
    )
    texts = {"json": as_json(rows, record) + "\n", "csv": as_csv(rows), "table": as_table(rows) + "\n"}
    if arguments.out:
        _write(arguments.out, {"audit.json": texts["json"], "audit.csv": f"# {one_line(record)}\n{texts['csv']}"})
    print(texts[arguments.format], end="")
    short = [row.name for row in rows if not row.converged]
    if short:
        raise ComputationError(
            f"eigenvalues of {', '.join(short)} did not converge in {arguments.max_products} products; "
            "raise --max-products or --tol"
        )
    return 0


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not available here ({str(error).splitlines()[0]}); use cpu") from error
    return device


def _write(folder: Path, files: dict[str, str]) -> None:
    from disam_theory.files import write_atomically

    for name, text in files.items():
        write_atomically(folder / name, text)


def _progress(products: int, running: int) -> None:
    if sys.stderr.isatty():
        shown = f"{products} Hessian products, {running} spectra running" if running else ""
        print(f"\r\033[K{shown}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
