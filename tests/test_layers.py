"""The house rules of docs/architecture.md, read from the syntax trees of every source file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYER_FOLDERS = ("kernels", "quant", "speculative", "engine", "bench")

#: What each layer may import of `tokenmill`, besides itself. `*` is everything but bench and tests.
BASE = ("tokenmill.errors", "tokenmill.env", "tokenmill.platform", "tokenmill.native_build")
ALLOWED: dict[str, tuple[str, ...]] = {
    "tokenmill.errors": (),
    "tokenmill.env": ("tokenmill.errors",),
    "tokenmill.platform": ("tokenmill.errors", "tokenmill.env"),
    "tokenmill.native_build": ("tokenmill.errors", "tokenmill.env", "tokenmill.platform"),
    "tokenmill.kernels": BASE,
    "tokenmill.quant": (*BASE, "tokenmill.kernels"),
    # The command's default texts are the pair's corpus; the quantizer itself takes text.
    "tokenmill.quant.command": (*BASE, "tokenmill.quant", "tokenmill.speculative.pair.corpus"),
    "tokenmill.speculative": (*BASE, "tokenmill.kernels"),
    "tokenmill.engine.vllm": (*BASE, "tokenmill.kernels", "tokenmill.quant", "tokenmill.speculative"),
    "tokenmill.engine.gateway": ("tokenmill.errors", "tokenmill.env", "tokenmill.engine.economics"),
    "tokenmill.engine.economics": ("tokenmill.errors", "tokenmill.env", "tokenmill.engine.gateway"),
    "tokenmill.engine.supervisor": (
        "tokenmill.errors",
        "tokenmill.env",
        "tokenmill.platform",
        "tokenmill.engine.gateway",
        "tokenmill.engine.economics",
        "tokenmill.models",
    ),
    "tokenmill.models": (),
    "tokenmill.engine": (*BASE, "tokenmill.engine"),
    "tokenmill.bench": ("*",),
    "tokenmill.cli": ("*",),
    "tokenmill.doctor": ("*",),
    "tokenmill.__main__": ("*",),
    "tokenmill": (),
}
#: Third-party packages that stand in few places only: package to the path prefixes that may import it.
CONFINED: dict[str, tuple[str, ...]] = {
    "vllm": ("engine/vllm/", "bench/rivals_vllm", "bench/serving/client.py"),
    "triton": ("kernels/aot.py", "kernels/*/triton_impl.py"),
}
#: Layers that must never import these.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "engine/gateway/": ("torch", "vllm", "numpy", "transformers"),
    "engine/economics/": ("torch", "vllm"),
    "engine/supervisor/": ("torch", "vllm"),
}


def source_files() -> list[Path]:
    """Every Python file of the product: the import root's own and those of the layer folders."""
    own = list((ROOT / "tokenmill").glob("*.py"))
    layers = [path for folder in LAYER_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted(own + layers)


def module_name(path: Path) -> str:
    """`kernels/spec.py` is `tokenmill.kernels.spec`."""
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    if parts[0] != "tokenmill":
        parts = ("tokenmill", *parts)
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in the file, those inside functions included."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                target = ".".join([*base, *([node.module] if node.module else [])])
            else:
                target = node.module or ""
            yield node.lineno, target
            for alias in node.names:
                if target.split(".")[0] == "tokenmill":
                    yield node.lineno, f"{target}.{alias.name}"


def layer_of(module: str) -> str:
    """The longest key of ALLOWED that contains the module."""
    return max((key for key in ALLOWED if module == key or module.startswith(key + ".")), key=len)


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_downwards(path: Path) -> None:
    module = module_name(path)
    layer = layer_of(module)
    allowed = ALLOWED[layer]
    for line, target in imports(path):
        if not within(target, ("tokenmill",)) or target in ("tokenmill", "tokenmill.__version__"):
            continue
        where = f"{path.relative_to(ROOT)}:{line} imports {target}"
        assert not within(target, ("tokenmill.tests",)), where
        if not within(module, ("tokenmill.bench", "tokenmill.cli")):
            assert not within(target, ("tokenmill.bench",)), f"{where}; only the command line may import bench"
        if allowed == ("*",) or within(target, (layer,)) or target == layer.rpartition(".")[0]:
            continue
        is_parent = any(prefix.startswith(target + ".") for prefix in (*allowed, layer))
        assert is_parent or within(target, allowed), f"{where}; {layer} may import {', '.join(allowed) or 'nothing'}"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_stay_in_their_place(path: Path) -> None:
    relative = path.relative_to(ROOT)
    for line, target in imports(path):
        package = target.split(".")[0]
        for place in CONFINED.get(package, ()):
            if str(relative).startswith(place) or relative.match(place):
                break
        else:
            assert package not in CONFINED, f"{relative}:{line} imports {package}; allowed in {CONFINED[package]}"
        for folder, packages in FORBIDDEN.items():
            if str(relative).startswith(folder):
                assert package not in packages, f"{relative}:{line} imports {package}, which {folder} must not"


def test_what_the_machine_can_do_is_asked_of_platform_alone() -> None:
    """So that a test, or TOKENMILL_ISA, narrows it in one place; bench measures devices and may ask torch itself."""
    asked = {"is_available", "get_device_capability", "get_cpu_capability"}
    for path in source_files():
        if path.name != "platform.py" and not path.is_relative_to(ROOT / "bench"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                assert not (isinstance(node, ast.Attribute) and node.attr in asked), f"{where} asks torch; ask platform"


def test_command_line_imports_inside_functions() -> None:
    path = ROOT / "tokenmill" / "cli.py"
    top_level = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    ours = {node.module for node in top_level if node.module and node.module.startswith("tokenmill")}
    assert ours <= {"tokenmill", "tokenmill.errors"}


def test_layer_roots_are_namespaces() -> None:
    """A top-level kernels/__init__.py would shadow the Hugging Face package of that name in a checkout."""
    for folder in (*LAYER_FOLDERS, "csrc"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ must not have an __init__.py"
        link = ROOT / "tokenmill" / folder
        assert link.is_symlink(), f"tokenmill/{folder} must be a link to ../{folder}"
        assert link.resolve() == ROOT / folder


def test_torch_headers_only_in_the_binding() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cpp", ".cu", ".cuh", ".h") and not path.name.startswith("binding"):
            text = path.read_text(encoding="utf-8")
            assert "#include <torch/" not in text, f"{path.relative_to(ROOT)} includes a torch header"
            assert "#include <ATen/" not in text, f"{path.relative_to(ROOT)} includes a torch header"


def test_inline_ptx_only_in_the_primitives() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cpp", ".cu", ".cuh", ".h") and not path.name.startswith("ptx"):
            if "emulator" in path.relative_to(ROOT).parts:
                continue  # the fiber switch is host assembly
            text = path.read_text(encoding="utf-8")
            assert "asm volatile" not in text, f"{path.relative_to(ROOT)} holds inline assembly"
