"""The arrows between the modules, read from their import statements; imports for type checkers only do not count."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("measure", "decide", "act", "prove")
CONDUCTORS = ("pipeline", "proving", "run", "inspect", "work")  # who may know several rooms


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions too; `from a import b` gives both a and a.b."""
    names = set()
    for node in _statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must import by absolute names"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in names if name}


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _statements(child)


def modules(package: str) -> dict[str, set[str]]:
    """{module name: what it imports}."""
    folder = ROOT / package
    found = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join((folder.name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        found[name] = imported(path)
    assert len(found) > 1
    return found


TRAINING = {f"cprune.act.distill{part}" for part in ("", "_layers", "_memory", "_steps")}
ENGINE = modules("python/cprune")
KERNELS = modules("cprune_kernels")


def inside(names: set[str], *packages: str) -> set[str]:
    """Those of `names` that lie in one of the packages."""
    return {name for name in names if any(f"{name}.".startswith(f"{package}.") for package in packages)}


def room(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_stand_on_torch_and_triton_alone(module: str) -> None:
    roots = {name.partition(".")[0] for name in KERNELS[module]}
    assert roots <= {"torch", "triton", "cprune_kernels"} | sys.stdlib_module_names, roots


@pytest.mark.parametrize("module", ["cprune.errors", "cprune.config", "cprune.stats", "cprune.plan", "cprune.repaired"])
def test_what_passes_between_the_rooms_knows_none_of_them(module: str) -> None:
    own = inside(ENGINE[module], "cprune", "cprune_kernels")
    assert own <= {"cprune.errors", "cprune.errors.CpruneError"} and (own or module == "cprune.errors")


@pytest.mark.parametrize("module", [name for name in ENGINE if room(name) in ROOMS])
def test_rooms_never_import_one_another(module: str) -> None:
    others = [f"cprune.{other}" for other in ROOMS if other != room(module)]
    assert not inside(ENGINE[module], *others)
    assert not inside(ENGINE[module], *(f"cprune.{name}" for name in CONDUCTORS))


def test_few_modules_know_several_rooms() -> None:
    for module, names in ENGINE.items():
        known = {other for other in ROOMS if inside(names, f"cprune.{other}")}
        assert len(known) <= 1 or room(module) in CONDUCTORS, (module, known)


@pytest.mark.parametrize(
    "module", [name for name in ENGINE if room(name) in ("checkpoint", "hf", "stream", "ragged", "work")]
)
def test_nothing_points_back_from_what_the_rooms_share(module: str) -> None:
    assert not inside(ENGINE[module], *(f"cprune.{name}" for name in (*ROOMS, "pipeline", "run", "inspect")))


def test_checkpoint_knows_names_and_bytes_only() -> None:
    for module, names in ENGINE.items():
        if room(module) == "checkpoint":
            assert all(name.startswith(("cprune.checkpoint", "cprune.errors")) for name in inside(names, "cprune"))


def test_ragged_stands_beside_the_weights_and_so_alone() -> None:
    assert ENGINE["cprune.ragged"] == {"copy", "torch"}


@pytest.mark.parametrize(
    ("library", "users"),
    [
        ("faiss", {"cprune.decide.clustering"}),
        ("transformers", {"cprune.hf"}),
        ("accelerate", TRAINING | {"cprune.hf"}),
    ],
)
def test_library_has_one_seam(library: str, users: set[str]) -> None:
    assert {module for module, names in ENGINE.items() if inside(names, library)} == users


def test_the_reader_of_arrows_sees_them(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "import a.b as c\n"
        "from d import e\n"
        "def f():\n    from g.h import i\n    import_module('j.k')\n"
        "if TYPE_CHECKING:\n    import l\n"
    )
    assert imported(tmp_path / "module.py") == {"a.b", "d", "d.e", "g.h", "g.h.i", "j.k"}
