"""What the pages under docs/ show is what there is: Python and commands run, outputs are real, tables are the code's.

Blocks of a page run in order in one folder. ``python``: with ``model`` and ``loader`` given; one that begins with a
file's name in a comment is also that file. ``text`` below it: what it prints. ``console``: a command that stands above
an output is run, any other must parse. In what is shown ``...`` stands for what is left out, and numbers are those of
some machine: they agree to 5 %, and errors after ± are not compared.

``python -m tests.test_docs`` writes the tables of docs/reference.md anew.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import paper_repro
from disam_theory.__main__ import _parser, main
from disam_theory.audit import Settings, audit
from disam_theory.audit_report import as_json
from disam_theory.claims import Claim, Evidence, Finding, Verdict
from disam_theory.convergence import INEQUALITIES
from disam_theory.models import digits_mlp
from disam_theory.traces import EVALUATION_FIELDS, STEP_FIELDS
from proofs_checks import CLAIMS
from tests.drawn_images import draw

ROOT = Path(paper_repro.__file__).parent
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "claims.md"]
REFERENCE = ROOT / "docs/reference.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"<!-- table: (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)
NUMBER = re.compile(r"(±? ?[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


def differs(shown: str, found: str) -> str | None:
    """The first line of ``shown`` that ``found`` lacks, in this order; None where there is none."""
    lines = [line for line in found.splitlines() if line.strip("- ")]
    for line in shown.splitlines():
        if not line.strip("-. "):
            continue
        while lines and not alike(line, lines[0]):
            lines.pop(0)
        if not lines:
            return line
        lines.pop(0)
    return None


def alike(shown: str, found: str) -> bool:
    before, dots, _ = shown.partition("...")
    mine, theirs = NUMBER.split(before), NUMBER.split(found)
    if dots:  # the last piece is the beginning of theirs
        theirs = theirs[: len(mine)]
        theirs[-1] = _packed(theirs[-1])[: len(_packed(mine[-1]))]
    return len(mine) == len(theirs) and all(map(_same, mine, theirs))


def _same(a: str, b: str) -> bool:
    if not (NUMBER.fullmatch(a) and NUMBER.fullmatch(b)):
        return _packed(a) == _packed(b)
    return ("±" in a and "±" in b) or float(a) == pytest.approx(float(b), rel=0.05)


def _packed(text: str) -> str:
    return "".join(text.split())


def test_another_output_is_noticed():
    found = "head\n----\nrot0  0.115 ± 0.02  97.7\nlast line of 3"
    assert differs("rot0  0.116 ± 0.01  97.5\n...\nlast line ...", found) is None
    for other in ("rot0  0.135 ± 0.02  97.7", "rot1  0.115 ± 0.02  97.7", "last line of 3\nhead", "last row ..."):
        assert differs(other, found) is not None


def commands(console: str) -> list[tuple[list[str], str]]:
    """The arguments of every command of a block, and the output below it."""
    found = []
    for part in re.split(r"^\$ ", console.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        found.append((shlex.split(command), output.strip("\n")))
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    draw(tmp_path / "photos")
    with torch.random.fork_rng():
        yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_it_shows_runs(page, folder, capsys):
    blocks = BLOCK.findall(page.read_text())
    assert len(blocks) == page.read_text().count("```") / 2
    for kind, text in blocks:
        if kind == "python":
            if named := re.match(r"# (\w+\.py)\n", text):
                Path(named[1]).write_text(text)
                sys.modules.pop(Path(named[1]).stem, None)  # another test's module of that name
            batch = torch.rand(6, 64), torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])
            exec(compile(text, page.name, "exec"), {"model": digits_mlp(), "loader": [batch, batch]})
            printed = capsys.readouterr().out
        elif kind == "text":
            assert (missing := differs(text, printed)) is None, f"{missing}\nis not in\n{printed}"
        else:
            assert kind == "console"
            for arguments, shown in commands(text):
                check_command(arguments, shown, capsys)


def check_command(arguments: list[str], shown: str, capsys) -> None:
    program, *rest = arguments
    if program == "torchrun":
        program, rest = "disam-theory", rest[rest.index("disam_theory") + 1 :]
    if program == "disam-theory" and shown:
        assert main(rest) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        assert (missing := differs(shown, printed)) is None, f"{missing}\nis not in\n{printed}"
    elif program == "disam-theory":
        _parser().parse_args(rest)
    elif program == "python":
        assert rest[0] == "paper_repro.py"
        main_job().parse_args(rest[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    else:
        assert [program, *rest[:1]] == ["pip", "install"]


# --- the tables of the reference ---


def main_job() -> argparse.ArgumentParser:
    """The parser of ``paper_repro.py``, which parses where it is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self: self)
        return paper_repro._arguments()


def verbs() -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))


def options(parser: argparse.ArgumentParser) -> str:
    rows = [_option(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return _table("option", rows)


def _option(action: argparse.Action) -> tuple[str, str]:
    takes = action.metavar or ("" if action.choices or action.nargs == 0 else action.dest.upper())
    takes = f"{{{','.join(map(str, action.choices))}}}" if action.choices else takes
    name = ", ".join(action.option_strings) or takes
    said = action.help or ""
    if action.required and action.option_strings:
        said = ". ".join(filter(None, [said, "Required"]))
    elif action.default not in (None, False, []) and "default" not in said:
        said = f"{said} (default {action.default})".strip()
    return f"{name} {takes}".strip() if action.option_strings else name, said


def _table(head: str, rows) -> str:
    lines = [f"| `{name}` | {said.replace('|', ' ')} |" for name, said in rows]
    return "\n".join([f"| {head} | what it is |", "|---|---|", *lines, ""])


def tables() -> dict[str, str]:
    found = {verb: options(parser) for verb, parser in verbs().items()}
    found["paper_repro.py"] = options(main_job())
    found["steps"] = _table("field", STEP_FIELDS.items())
    found["evaluations"] = _table("field", EVALUATION_FIELDS.items())
    return found


def test_the_tables_are_the_codes():
    assert dict(TABLE.findall(REFERENCE.read_text())) == tables(), "run python -m tests.test_docs"


def test_every_option_is_there():
    for verb, parser in verbs().items():
        section = REFERENCE.read_text().split(f"## disam-theory {verb}\n")[1].split("\n## ")[0]
        for action in parser._actions:
            for name in action.option_strings:
                assert name in ("-h", "--help") or f"`{name} " in section or f"`{name}`" in section, (verb, name)


def unmentioned(names) -> list[str]:
    return [name for name in names if f"`{name}`" not in REFERENCE.read_text()]


def fields_under(heading: str) -> list[str]:
    """The names in the first column of the table below a heading of the reference."""
    section = re.split(r"^#+ ", REFERENCE.read_text().split(f"\n{heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    firsts = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    return [name for first in firsts for name in re.findall(r"`(\w+)`", first)]


def test_the_fields_of_an_audit_are_there(make_domain):
    domains = [make_domain("x"), make_domain("y", 6), make_domain("z", 7)]
    settings = Settings(k=1, lam=50.0, full=True, max_samples=4)  # a weight is below zero: there is a warning
    audits = {}
    for label in ("one", "two"):
        torch.manual_seed(len(audits))
        audits[label] = audit(torch.nn.Linear(4, 3), domains, settings, unseen=["z"], dtype=torch.float64)
    document = json.loads(as_json(audits, {}))
    assert sorted(fields_under("## Audits")) == sorted(document)
    lists = {name: entries for name, entries in document.items() if isinstance(entries, list)}
    lists["terms"] = [{"checkpoint": "", **term} for bound in lists["bounds"] for term in bound["terms"]]
    assert {"rows", "about", "warnings", "differences"} < set(lists)
    for name, entries in lists.items():
        written = {key for entry in entries for key in entry}
        written -= {"checkpoint"} if name != "differences" else set()
        written -= {"x", "y", "z"} if name == "slices" else set()  # the domains' own names
        assert written, name
        assert sorted(fields_under(f"### {name}")) == sorted(written), name


def test_the_fields_of_a_finding_are_there():
    claim = Claim("a", "Eq. (1)", "", (), "", Verdict.PROVED, lambda study: Evidence(Verdict.PROVED, ""))
    assert not unmentioned(Finding(claim, Evidence(Verdict.PROVED, ""), 0.0, True).to_json())


def test_verdicts_claims_and_inequalities_are_named():
    concepts = (ROOT / "docs/concepts.md").read_text()
    assert all(f"| *{verdict}* |" in concepts for verdict in Verdict)
    known = {claim.id for claim in CLAIMS}
    for page in PAGES:
        assert set(re.findall(r"claims\.md#([\w-]+)", page.read_text())) <= known
    assert not unmentioned(INEQUALITIES)


def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    page = (tmp_path / "concepts/index.html").read_text()
    assert "<math" in page
    assert "$" not in re.sub(r"<(pre|code|annotation|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    outside = re.findall(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["']?((?:https?:)?//[^"' >]+)""", page)
    assert not outside


if __name__ == "__main__":
    wanted = tables()
    text = REFERENCE.read_text()
    REFERENCE.write_text(TABLE.sub(lambda m: f"<!-- table: {m[1]} -->\n{wanted[m[1]]}<!-- end -->", text))
