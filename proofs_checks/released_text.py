"""The text of a repository -> facts about its code: names, defaults and modes, out of syntax trees. Nothing is run."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from disam_theory.errors import UsageError

Facts = dict[str, Any]


def derive_facts(checkout: Path) -> Facts:
    """The facts of a checkout, from the text of its Python and Markdown files."""
    paths = sorted(p for p in checkout.rglob("*") if p.suffix in (".py", ".md") and p.is_file())
    if not paths:
        raise UsageError(f"{checkout}: no Python or Markdown file")
    return facts_of({p.relative_to(checkout).as_posix(): p.read_bytes().decode("utf-8") for p in paths})


def facts_of(sources: Mapping[str, str]) -> Facts:
    """Path -> text of a repository's files, to the facts that the claims below rest on.

    ``modes``: methods that call ``.eval()`` or ``.train()`` without arguments. ``sets``: where a method makes a
    Python set of a variable. ``optim_contains``: which parts of ``--optim`` a method asks for.
    """
    trees = {path: ast.parse(text) for path, text in sources.items() if path.endswith(".py")}
    facts: Facts = {"sha256": {path: hashlib.sha256(text.encode()).hexdigest() for path, text in sources.items()}}
    facts |= {"classes": _classes(trees), "modes": {}, "sets": {}, "optim_contains": {}, "domain_labels": []}
    facts |= {"options": {}, "collate_fn": []}
    for path, tree in trees.items():
        lines = sources[path].splitlines()
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(attr="add_argument"), args=[ast.Constant(value=str(flag)), *_]):
                    facts["options"][flag.lstrip("-")] = {"at": f"{path}:{node.lineno}", "default": _default(node)}
                case ast.keyword(arg="collate_fn"):
                    facts["collate_fn"].append(f"{path}:{node.lineno}")
                # not what is only handed on, as by self.domain_label = domain_label
                case ast.Assign(targets=[ast.Attribute(attr="domain_label")]) if not isinstance(node.value, ast.Name):
                    place = {"at": f"{path}:{node.lineno}", "line": lines[node.lineno - 1].strip()}
                    facts["domain_labels"].append(place | {"is_index": _is_index(node.value)})
        for method, body in _methods(tree):
            _read_method(facts, path, lines, method, body)
    return facts | {"commands": _commands(sources, facts["options"])}


def _read_method(facts: Facts, path: str, lines: list[str], method: str, body: ast.FunctionDef) -> None:
    for node in ast.walk(body):
        place = {"at": f"{path}:{getattr(node, 'lineno', 0)}"}
        match node:
            case ast.Call(func=ast.Attribute(attr="eval" | "train" as mode), args=[], keywords=[]):
                facts["modes"][method] = place | {"mode": mode}
            case ast.Call(func=ast.Name(id="set"), args=[ast.Name()]):
                facts["sets"][method] = place | {"line": lines[node.lineno - 1].strip()}
            case ast.Compare(
                left=ast.Constant(value=str(part)), ops=[ast.In()], comparators=[ast.Attribute(attr="optim")]
            ):
                facts["optim_contains"].setdefault(method, place | {"parts": []})["parts"].append(part)


def _methods(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        yield from ((f"{owner.name}.{item.name}", item) for item in owner.body if isinstance(item, ast.FunctionDef))


def _default(call: ast.Call) -> Any:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "default" in given:
        return ast.literal_eval(given["default"])
    return False if "action" in given else None


def _is_index(value: ast.expr) -> bool:
    """Whether the value is a call ``....index(...)``, thus an integer."""
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "index"


def _commands(sources: Mapping[str, str], options: Iterable[str]) -> dict[str, dict[str, str]]:
    """The lines of Markdown files that call the trainer, with abbreviated options written out as argparse does."""
    found = {}
    for path, text in sources.items():
        for number, line in enumerate(text.splitlines(), 1):
            if path.endswith(".md") and "run_trainer.py --" in line:
                pairs = re.findall(r"--(\w+) (\S+)", line)
                found[f"{path}:{number}"] = {_written_out(name, options): value for name, value in pairs}
    return found


def _written_out(name: str, options: Iterable[str]) -> str:
    return name if name in options else next((option for option in options if option.startswith(name)), name)


def _classes(trees: Mapping[str, ast.Module]) -> dict[str, dict[str, Any]]:
    """What each class reads of ``self`` and what it defines, if all its ancestors are in the repository too."""
    nodes = {n.name: (path, n) for path, tree in trees.items() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    bases = {
        name: [ast.unparse(b) for b in node.bases if ast.unparse(b) != "object"] for name, (_, node) in nodes.items()
    }

    def inside(name: str) -> bool:
        return name in nodes and all(map(inside, bases[name]))

    found = {}
    for name, (path, node) in nodes.items():
        if not inside(name):
            continue
        defines = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        defines |= {
            t.id for item in node.body if isinstance(item, ast.Assign) for t in item.targets if isinstance(t, ast.Name)
        }
        reads: dict[str, int] = {}
        for item in ast.walk(node):
            if isinstance(item, ast.Attribute) and ast.unparse(item.value) == "self" and not item.attr.startswith("__"):
                if isinstance(item.ctx, ast.Store):
                    defines.add(item.attr)
                else:
                    reads[item.attr] = min(item.lineno, reads.get(item.attr, item.lineno))
        found[name] = {
            "path": path,
            "bases": bases[name],
            "defines": sorted(defines),
            "reads": dict(sorted(reads.items())),
        }
    return found
