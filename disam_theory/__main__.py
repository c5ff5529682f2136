"""The command line ``disam-theory``. What a verb does, and the heavy imports, are in :data:`ROOMS`."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from disam_theory import __version__
from disam_theory.errors import DisamError, UsageError
from disam_theory.progress import say

ROOMS = {  # verb -> the module with the function of its name; the others take a checkpoint, and share one
    "train": "disam_theory.train_command",
    "rate": "disam_theory.rate_command",
}
CONSTANTS = (  # of disam_theory.algorithms.Settings, whose defaults they have
    *("asam_eta", "gsam_alpha", "sagm_alpha"),
    *("vrex_penalty", "groupdro_eta", "coral_penalty", "fishr_penalty"),
)
MODELS = "torchvision:resnet50, timm:vit_tiny_patch16_224 or PKG.MOD:CALLABLE (given num_classes if taken)"
DATA = "embedded suite, folder ROOT/domain/class/*.jpg, NumPy archive *.npz, or PKG.MOD:CALLABLE that returns domains"
DATASETS = "pacs, vlcs, officehome, terraincognita, domainnet"
SKIP_CORRUPT = "leave images out that cannot be read, and say which"
EXAMPLE = "example: disam-theory {} model.pt --model disam_theory.models:digits_mlp --data digits-rotated{}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns 0, 1 when a result falls short, or 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
        room = importlib.import_module(ROOMS.get(arguments.verb, "disam_theory.commands"))
        return int(getattr(room, arguments.verb)(arguments))
    except DisamError as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return 130


COUNTS = ("k", "chunk", "image_size", "samples", "points")
LARGEST_SEED = 2**32 - 1  # seeds of single draws are some thousand times as large, and fit into 63 bits


def _check(arguments: argparse.Namespace) -> None:
    """Raise :class:`UsageError` for values that cannot be: before torch is imported, which takes seconds."""
    given = vars(arguments)
    for name in [name for name in COUNTS if given.get(name, 1) < 1]:
        option = "-k" if name == "k" else f"--{name.replace('_', '-')}"
        raise UsageError(f"{option} is {given[name]}; it must be at least 1")
    if not given.get("tol", 1.0) > 0:
        raise UsageError(f"--tol is {arguments.tol}; it must be above 0")
    if not 0 <= given.get("rng", 0) <= LARGEST_SEED:
        raise UsageError(f"--rng is {arguments.rng}; it must be from 0 to {LARGEST_SEED}")
    if not 0 < given.get("span", 1.0) < math.inf:
        raise UsageError(f"span is {arguments.span}; it must be finite and above 0")
    if given.get("density") and not arguments.out:
        raise UsageError("--density writes a file; give --out DIR")
    if arguments.verb == "convert" and _is_folder(arguments.out):
        inside = arguments.out / f"{arguments.checkpoint.stem}.safetensors"
        raise UsageError(f"--out is {arguments.out}, which is a folder; give a file's name, such as {inside}")
    if arguments.verb == "convert" and arguments.out.suffix != ".safetensors":
        raise UsageError(f"--out is {arguments.out}; its name must end in .safetensors")
    files = given.get("checkpoint", [])
    for path in files if isinstance(files, list) else [files]:
        if _absent(path):
            raise UsageError(f"{path}: no such file")
    for path in filter(_absent, given.get("traces", [])):
        raise UsageError(f"{path}: cannot be read as a trace (No such file or directory)")


def _is_folder(path: Path) -> bool:
    """Whether it is one; what may not be looked at is told where it is written."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _absent(path: Path) -> bool:
    """Whether there is nothing; what may not be looked at is told where it is read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="disam-theory",
        description="Per-domain sharpness of trained checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"disam-theory {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    audit = verbs.add_parser(
        "audit",
        help="how sharp a checkpoint is, domain by domain; of several, each against the first",
        description="Loss, accuracy, calibration, gradient, top Hessian eigenvalues and trace, sharpness measures and "
        "generalisation bounds of checkpoints on each domain, on the pooled sources, with DISAM's weights, and of "
        "L_DI. With --out also as JSON, CSV, LaTeX and a page. Under torchrun the data are shared among the processes.",
        epilog=EXAMPLE.format("audit", " --unseen rot75 --out out"),
    )
    _add_common(audit, several=True)
    _add_spectral(audit)
    audit.add_argument("--unseen", action="append", default=[], metavar="DOMAIN", help="no source; repeat for more")
    audit.add_argument("--rho", type=float, default=0.05, help="radius of SAM's and DISAM's step (default 0.05)")
    audit.add_argument("--lam", type=float, default=0.1, help="lambda of DISAM's weights (default 0.1)")
    audit.add_argument("--max-samples", type=int, metavar="N", help="at most N of each domain, drawn at random")
    audit.add_argument("--full", action="store_true", help="spectral densities, and more draws for each estimate")
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
    _add_train(
        verbs.add_parser(
            "train",
            help="train one model with DISAM or a relative, leaving one domain out",
            description="One run on images or an embedded suite: its trace, its last weights, the best weights by "
            "validation on the sources, and the evaluations. Interrupted, the same command goes on.",
            epilog="example: disam-theory train --data DATA --dataset pacs --test-domain sketch --algorithm disam "
            "--model torchvision:resnet50 --pretrained --out run",
        )
    )
    convert = verbs.add_parser(
        "convert",
        help="the weights of a checkpoint as safetensors, with where they come from",
        description="Reads what the official trainer, DomainBed, Lightning, timm, torch.save and safetensors write, "
        "runs nothing in it, and refuses weights that are NaN or Inf.",
        epilog="example: disam-theory convert lodo_model_best.pth --out best.safetensors",
    )
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of weights, in any of the formats")
    convert.add_argument("--out", type=Path, metavar="FILE", required=True, help="ends in .safetensors")
    convert.add_argument("--model", metavar="MODEL", help=f"{MODELS}: must fit, and names the weights")
    convert.add_argument("--ema", action="store_true", help="timm's moving average of the weights, not the last ones")
    rate = verbs.add_parser(
        "rate",
        help="how far the convergence theory holds along recorded traces, and how fast they converge",
        description="Both sides of the printed and of the corrected convergence theorem at every step of each trace, "
        "the first step at which each is exceeded, and the rate of convergence with its interval. Of logs that other "
        "code wrote, which of the theorem's quantities they hold, and the rate of the training loss.",
        epilog="example: disam-theory rate run.jsonl --smoothness 4 --out out. CSV has a column step or epoch, and any "
        "of loss, loss_ascent, grad_norm, grad_norm_ascent, lr, phi (disam_theory/imported.py).",
    )
    rate.add_argument(
        "traces",
        type=Path,
        nargs="+",
        metavar="TRACE",
        help="a trace, a TensorBoard event file of the official trainer, DomainBed's results.jsonl, or CSV",
    )
    rate.add_argument("--smoothness", type=float, metavar="L", help="smoothness constant (default: a lower bound)")
    rate.add_argument(
        "--gradient-bound", type=float, metavar="G", help="bound of the gradients (default: the largest of the trace)"
    )
    rate.add_argument(
        "--minimum", type=float, default=0.0, metavar="L_MIN", help="a lower bound of the loss (default 0)"
    )
    _add_output(rate)
    return parser


def _add_common(verb: argparse.ArgumentParser, *, several: bool = False) -> None:
    help_text = "a state dict, or a file that holds one"
    verb.add_argument("checkpoint", type=Path, nargs="+" if several else None, metavar="CHECKPOINT", help=help_text)
    verb.add_argument("--model", metavar="MODEL", help=f"{MODELS}; needed where the file does not say it")
    verb.add_argument("--data", required=True, metavar="DATA", help=DATA)
    verb.add_argument("--dataset", metavar="NAME", help=f"the folder is DomainBed's: {DATASETS}")
    verb.add_argument(
        "--part", choices=("train", "crossval", "test"), help="by official split lists; of unseen domains test"
    )
    verb.add_argument("--skip-corrupt", action="store_true", help=SKIP_CORRUPT)
    _add_output(verb)
    verb.add_argument(
        "--chunk", type=int, default=1024, help="samples in memory at once, at most; fewer if large (default 1024)"
    )
    verb.add_argument("--image-size", type=int, default=224, help="pixels a side for an image folder (default 224)")
    verb.add_argument("--rng", type=int, default=0, help="seed of the suite and of all random vectors (default 0)")
    verb.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    verb.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")


def _add_train(verb: argparse.ArgumentParser) -> None:
    data = verb.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DATA", help=DATA)
    data.add_argument("--dataset", metavar="NAME", help=f"the folder is DomainBed's: {DATASETS}")
    data.add_argument("--test-domain", required=True, metavar="NAME", help="held out: a name, or the data set's letter")
    data.add_argument("--splits", choices=("auto", "official", "random"), default="auto", help="official where found")
    data.add_argument("--validation", type=float, default=0.2, help="share of each source kept aside (default 0.2)")
    data.add_argument("--image-size", type=int, default=224, help="pixels a side (default 224)")
    data.add_argument("--augment", choices=("domainbed", "none"), default="domainbed", help="of training images")
    data.add_argument("--skip-corrupt", action="store_true", help=SKIP_CORRUPT)
    data.add_argument("--workers", type=int, default=0, help="processes that read; no influence on results (default 0)")
    model = verb.add_argument_group("model")
    model.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help=MODELS,
    )
    model.add_argument("--weights", type=Path, metavar="FILE", help="a state dict to start from; its head may differ")
    model.add_argument("--pretrained", action="store_true", help="start from the library's own weights")
    model.add_argument("--dropout", type=float, default=0.0, help="before the head (default 0)")
    method = verb.add_argument_group("method")
    method.add_argument("--algorithm", default="disam", help="erm, sam, disam, asam, gsam, sagm, ... (default disam)")
    method.add_argument("--rho", type=float, default=0.05, help="radius of the ascent (default 0.05)")
    method.add_argument("--lam", type=float, help="lambda of the ascent (default 0.1; 0 for SAM's relatives)")
    method.add_argument("--objective", help="average, vrex, groupdro, coral, fishr (default average)")
    for name in CONSTANTS:
        method.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help="of the method of that name")
    method.add_argument("--variance", default="domains", help="over domains, or samples as the official code has it")
    method.add_argument(
        "--sam-mode", choices=("train", "eval"), default="train", help="eval: the official SAM baseline"
    )
    method.add_argument("--dropout-mask", choices=("same", "new"), default="same", help="in a step's second pass")
    method.add_argument(
        "--batch-norm", choices=("first", "both"), default="first", help="passes that update statistics"
    )
    steps = verb.add_argument_group("optimization")
    steps.add_argument("--optimizer", default="sgd", help="sgd, adam, adamw (default sgd)")
    steps.add_argument("--lr", type=float, default=0.002, help="learning rate (default 0.002)")
    steps.add_argument("--momentum", type=float, help="of sgd (default 0.9)")
    steps.add_argument("--weight-decay", type=float, default=5e-4, help="(default 5e-4)")
    steps.add_argument("--schedule", default="step", help="constant, inverse-sqrt, step, cosine (default step)")
    steps.add_argument("--steps", type=int, default=5000, help="(default 5000)")
    steps.add_argument("--sampling", choices=("pooled", "stratified"), default="pooled", help="of batches")
    steps.add_argument(
        "--batch-size", type=int, default=32, help="in all, or of each domain if stratified (default 32)"
    )
    steps.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none", help="mixed precision")
    steps.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    steps.add_argument("--rng", type=int, default=0, help="seed of everything random (default 0)")
    keeping = verb.add_argument_group("evaluation and results")
    keeping.add_argument("--evaluate-every", type=int, default=300, metavar="STEPS", help="(default 300)")
    keeping.add_argument(
        "--record-every", type=int, default=1, metavar="STEPS", help="of the trace; 10 spares most cost (default 1)"
    )
    keeping.add_argument(
        "--no-train-losses", action="store_true", help="evaluate without a pass over the training data"
    )
    keeping.add_argument(
        "--save-every", type=int, default=300, metavar="STEPS", help="state to go on from (default 300)"
    )
    keeping.add_argument("--out", type=Path, metavar="DIR", required=True, help="the run's folder")
    keeping.add_argument("--format", choices=("table", "json", "csv"), default="table", help="what to print")


def _add_output(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=Path, metavar="DIR", help="also write the results there, as JSON and CSV")
    verb.add_argument("--format", choices=("table", "json", "csv"), default="table", help="what to print")


def _add_spectral(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-k", type=int, default=3, help="number of eigenvalues (default 3)")
    verb.add_argument("--tol", type=float, default=1e-3, help="relative residual to reach (default 1e-3)")
    verb.add_argument(
        "--max-products", type=int, default=300, help="Hessian products at most, for each spectrum (default 300)"
    )


if __name__ == "__main__":
    sys.exit(main())
