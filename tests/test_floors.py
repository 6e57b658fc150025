"""The floors: what may import what, what loads torch or ray, and what may appear nowhere."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "s2s_ray"

# The longest prefix decides. A new top-level module must be given a floor here.
FLOORS = {
    "s2s_ray": 0,
    "s2s_ray.errors": 0,
    "s2s_ray.failpoints": 0,
    "s2s_ray.jsonio": 0,
    "s2s_ray.storage": 0,
    "s2s_ray.text": 0,
    "s2s_ray.presets": 0,
    "s2s_ray.generation": 1,
    "s2s_ray.generation.settings": 0,
    "s2s_ray.generation.requests": 0,
    "s2s_ray.kernels": 1,
    "s2s_ray.nn": 1,
    "s2s_ray.models": 1,
    "s2s_ray.training": 1,
    "s2s_ray.seq2seq_lm": 1,
    "s2s_ray.task_inputs": 1,
    "s2s_ray.metrics": 1,
    "s2s_ray.pipelines": 2,
}
DOORS = {("s2s_ray.seq2seq_lm", "s2s_ray.pipelines.fit")}  # the one call up, inside a function: `fit` on a cluster
LOWEST_FLOOR_FOR = {"torch": 1, "ray": 2}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "__import__",
    "torch.load",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "ray.cloudpickle.loads",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_files() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    return files


def floor_of(module: str) -> int:
    parts = module.split(".")
    if len(parts) > 1:
        assert ".".join(parts[:2]) in FLOORS, f"{module} has no floor: add it to FLOORS"
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(FLOORS[prefix] for prefix in prefixes if prefix in FLOORS)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere below `tree`; `from a import b` gives a.b where that is a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                path = ROOT / Path(*full.split("."))
                is_module = full.startswith("s2s_ray.") and (path.is_dir() or path.with_suffix(".py").is_file())
                yield full if is_module else node.module


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Ways to run code that came as data."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: {name}" for name in names if name.split(".")[-1] in PICKLES)
            if isinstance(node, ast.ImportFrom):
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (
                    f"line {node.lineno}: {name}"
                    for name in named
                    if name in FORBIDDEN_CALLS or name.split(".")[-1] in PICKLES
                )
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"line {node.lineno}: {name}()"
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("allow_pickle", "trust_remote_code") and not off:
                    yield f"line {node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_no_file_imports_a_higher_floor(path: Path) -> None:
    module = module_name(path)
    floor = floor_of(module)
    tree = ast.parse(path.read_text("utf-8"))
    if module == "s2s_ray":  # the facade names what is above it, for type checkers only
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for imported in imports(tree):
        top = imported.split(".")[0]
        if (module, imported) in DOORS:
            continue
        if top == "s2s_ray":
            assert floor_of(imported) <= floor, f"{module} (floor {floor}) imports {imported}"
        assert LOWEST_FLOOR_FOR.get(top, 0) <= floor, f"{module} (floor {floor}) imports {imported}"


def test_planning_does_not_import_torch_when_loaded() -> None:
    """Only a replica needs torch; so pipelines import it inside functions."""
    for path in package_files():
        if floor_of(module_name(path)) == 2:
            tree = ast.parse(path.read_text("utf-8"))
            loaded = {name.split(".")[0] for node in tree.body for name in _imports_when_loaded(node)}
            assert not loaded & {"torch", "ray"}, path


def test_no_circle_among_modules() -> None:
    graph: dict[str, set[str]] = {}
    for path in package_files():
        module = module_name(path)
        if path.name == "__init__.py":  # a package's own parts import it by being imported
            continue
        tree = ast.parse(path.read_text("utf-8"))
        graph[module] = {name for node in tree.body for name in _imports_when_loaded(node) if name != module}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module in done:
            return
        for imported in graph.get(module, ()):
            visit(imported, (*way, module))
        done.add(module)

    for module in graph:
        visit(module, ())
    assert done >= set(graph)


def _imports_when_loaded(node: ast.stmt) -> Iterator[str]:
    """What one top-level statement imports when the module is loaded: not what functions or type checkers import."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from imports(node)
    elif isinstance(node, (ast.Try, ast.With)) or (
        isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)
    ):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield from _imports_when_loaded(child)


@pytest.mark.parametrize(
    "path", [*package_files(), *sorted((ROOT / "jobs").glob("*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_code_comes_as_data(path: Path) -> None:
    assert not list(forbidden(ast.parse(path.read_text("utf-8"))))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, dill as d",
        "from pickle import loads",
        "from ray import cloudpickle",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "def f():\n    return eval('1')",
        "exec('1')",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
    ],
)
def test_the_scan_finds(code: str) -> None:
    assert list(forbidden(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["backbone.eval()", "re.compile('x')", "np.load(f, allow_pickle=False)", "json.load(f)"]
)
def test_the_scan_leaves_alone(code: str) -> None:
    assert not list(forbidden(ast.parse(code)))


def _load(modules: list[str], banned: tuple[str, ...]) -> None:
    """Import `modules` one by one in a new process; fails with the first that loads one of `banned`."""
    script = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        f"    loaded = [name for name in {banned!r} if name in sys.modules]\n"
        "    if loaded:\n"
        "        sys.exit(f'{module} loads {loaded}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def modules_of(floor: int) -> list[str]:
    return [name for path in package_files() if floor_of(name := module_name(path)) == floor]


def test_the_package_loads_neither_torch_nor_ray() -> None:
    _load(["s2s_ray"], ("torch", "ray", "transformers", "pyarrow", "tokenizers", "numpy"))


def test_floor_0_and_the_pipelines_load_neither_torch_nor_ray() -> None:
    modules = modules_of(0) + modules_of(2)
    assert {"s2s_ray.storage", "s2s_ray.presets.store", "s2s_ray.text.preprocessor"} <= set(modules)
    assert {"s2s_ray.pipelines.plan", "s2s_ray.pipelines.ledger", "s2s_ray.pipelines.settings"} <= set(modules)
    _load(modules, ("torch", "ray", "transformers"))


def test_floor_1_loads_without_ray() -> None:
    modules = modules_of(1)
    assert {"s2s_ray.seq2seq_lm", "s2s_ray.generation.engine", "s2s_ray.training.fit"} <= set(modules)
    _load(modules, ("ray", "transformers"))


def test_public_names_are_there() -> None:
    import s2s_ray

    for name in s2s_ray.__all__:
        assert getattr(s2s_ray, name) is not None
        assert name in dir(s2s_ray)
    with pytest.raises(AttributeError, match="no attribute 'Seq2SeqML'"):
        _ = s2s_ray.Seq2SeqML
