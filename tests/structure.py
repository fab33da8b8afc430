"""The shape of the code in numbers: `python -m tests.structure [FOLDER OF A CHECKOUT]`.

What is counted, in `defend/` alone:

- statements: AST statements without docstrings;
- long functions: more than 40 lines, docstring and signature left out;
- wide functions: more than 7 parameters, `self` and `cls` left out;
- large classes: more than 12 attributes that methods assign on `self` (fields of dataclasses, which
  are settings and facts here, are not counted);
- import cycles: groups of modules that import each other, imports for types included;
- upward imports: between the packages of `defend/privacy`, against their order;
- concrete checks: `isinstance` on one attack or clipping rule, outside the file that defines it;
- runs: functions named `run` or `_run`.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

CONCRETE = {
    "PGD", "Free", "TorchAttack", "FlatClipping", "PerLayerClipping", "AdaptiveClipping",
}  # fmt: skip
PRIVACY = ("gradients", "mechanism", "accounting", "checks")  # from the lowest up
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def trees(root: Path) -> dict[str, ast.Module]:
    """Module name → its syntax tree."""
    found = {}
    for path in sorted((root / "defend").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def statements(tree: ast.AST) -> int:
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)]
    values = [n.value for n in nodes if isinstance(n, ast.Expr)]
    docstrings = [v for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    return len(nodes) - len(docstrings)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, FUNCTIONS))


def body_lines(function: ast.FunctionDef) -> int:
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def parameters(function: ast.FunctionDef) -> int:
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([n for n in names if n not in ("self", "cls")])


def attributes(cls: ast.ClassDef) -> int:
    """Names that methods assign on `self`."""
    return len(
        {
            n.attr
            for n in ast.walk(cls)
            if isinstance(n, ast.Attribute)
            and isinstance(n.ctx, ast.Store)
            and isinstance(n.value, ast.Name)
            and n.value.id == "self"
        }
    )


def imports(name: str, tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules of the package that one of them imports at its top level, for types too."""
    found = set()
    nodes = list(tree.body)
    nodes += [n for top in tree.body if isinstance(top, ast.If) for n in top.body]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return (found & modules) - {name}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one module that reach each other (Tarjan's components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def concrete_checks(tree: ast.AST) -> list[str]:
    """`isinstance(…, PGD)` and the like, but for classes that the module defines itself."""
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    found = []
    for n in ast.walk(tree):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "isinstance":
            names = {x.id for x in ast.walk(n.args[1]) if isinstance(x, ast.Name)}
            if names := sorted((names & CONCRETE) - own):
                found.append(" | ".join(names))
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a lower package of `defend.privacy` into a higher one."""

    def floor(name: str) -> int | None:
        parts = name.split(".")
        return PRIVACY.index(parts[2]) if parts[:2] == ["defend", "privacy"] and (
            len(parts) > 2 and parts[2] in PRIVACY
        ) else None  # fmt: skip

    return [
        f"{name} → {other}"
        for name, others in graph.items()
        for other in others
        if floor(name) is not None and floor(other) is not None and floor(other) > floor(name)
    ]


def measure(root: Path) -> dict[str, object]:
    found = trees(root)
    graph = {name: imports(name, tree, set(found)) for name, tree in found.items()}
    every = [(name, f) for name, tree in found.items() for f in functions(tree)]
    classes = [
        (f"{name}.{c.name}", attributes(c))
        for name, tree in found.items()
        for c in ast.walk(tree)
        if isinstance(c, ast.ClassDef)
    ]
    return {
        "statements": sum(map(statements, found.values())),
        "files": len(found),
        "long_functions": [f"{n}.{f.name} {body_lines(f)}" for n, f in every if body_lines(f) > 40],
        "wide_functions": [f"{n}.{f.name} {parameters(f)}" for n, f in every if parameters(f) > 7],
        "large_classes": [f"{n} {count}" for n, count in classes if count > 12],
        "import_cycles": [" ↔ ".join(group) for group in cycles(graph)],
        "upward_imports": upward(graph),
        "concrete_checks": [f"{n}: {c}" for n, t in found.items() for c in concrete_checks(t)],
        "runs": [n for n, f in every if f.name in ("run", "_run")],
    }


if __name__ == "__main__":
    figures = measure(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
    for key, value in figures.items():
        count = value if isinstance(value, int) else len(value)
        print(f"{key:>16}: {count}", *(f"\n{'':>18}{v}" for v in (value if count != value else ())))
    print(json.dumps({k: v if isinstance(v, int) else len(v) for k, v in figures.items()}))
