"""What is installed: one import name, every package, nothing of the tests; and which way imports point."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["kernels", "fused_ops", "models", "bench"]
SOURCE_FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked_files() -> list[str]:
    """Files that a clone would hold, new ones not yet committed included."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked files so that nothing else lying about can get into it."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_has_one_import_name(wheel_files):
    top = {name.split("/")[0] for name in wheel_files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"backstride"}


def test_wheel_holds_the_packages_whole(wheel_files):
    tracked = {name for name in tracked_files() if name.split("/")[0] in LAYERS}
    needed = {name for name in tracked if name.endswith((".py", "py.typed"))}
    needed |= {name for name in tracked if name.startswith("bench/results/") and name.endswith(".csv")}
    shipped = {name.removeprefix("backstride/") for name in wheel_files if name.startswith("backstride/")}
    assert shipped == needed
    assert {f"{layer}/py.typed" for layer in LAYERS} <= shipped


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT) for path in SOURCE_FILES}
    assert set(listed) == {"backstride." + ".".join(folder.parts) for folder in found}
    for folder in found:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has modules but no __init__.py"


def test_lives_beside_the_pypi_package_kernels(wheel, tmp_path):
    """Hugging Face's `kernels` is a top-level import name, as one of our folders nearly was."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    network = ["--retries", "1", "--timeout", "15"]
    fetched = subprocess.run([*pip, *network, "kernels"], capture_output=True, text=True, timeout=120)
    if fetched.returncode != 0:
        pytest.skip(f"the PyPI package kernels could not be installed: {fetched.stderr.strip()[-200:]}")

    def their_files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "kernels").rglob("*.py")}

    before = their_files()
    assert before
    run(*pip, wheel, cwd=tmp_path)
    assert their_files() == before
    # Only looked up, not imported: installed without its dependencies, theirs could not run.
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib.util as u\n"
        "print(u.find_spec('kernels').origin, u.find_spec('backstride.kernels').origin, sep='\\n')\n"
        "import backstride.kernels\n"
        "print(backstride.kernels.__file__)"
    )
    ours = tmp_path / "backstride" / "kernels" / "__init__.py"
    printed = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert printed == [str(tmp_path / "kernels" / "__init__.py"), str(ours), str(ours)]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_readme_examples_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def imported_modules(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module imports; relative imports come out as `backstride.…`."""
    package = ("backstride", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def wrong_imports(path: Path, source: str) -> list[str]:
    """Imports of a bare top level of ours, of a layer above the module's own, and of autograd in kernels."""
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    allowed = LAYERS[: layer + 1]
    found = []
    for line, module in imported_modules(path, source):
        top, *rest = module.split(".")
        if top in LAYERS:
            found.append(f"line {line}: {module} is no import name of ours: use a relative import")
        if top == "backstride" and (not rest or rest[0] not in allowed):
            found.append(f"line {line}: {LAYERS[layer]} imports {module}")
        if layer == 0 and module.startswith("torch.autograd"):
            found.append(f"line {line}: kernels know no autograd")
    return found


def absolute_imports(source: str) -> list[int]:
    """Lines that import `backstride` by name instead of relatively."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        found += [node.lineno for name in names if name.split(".")[0] == "backstride"]
    return found


@pytest.mark.parametrize("path", SOURCE_FILES, ids=name_of)
def test_imports_point_one_way(path):
    source = path.read_text()
    assert wrong_imports(path, source) == []
    # pytest imports a test module by itself, so that it has nothing to be relative to.
    assert path.name.startswith("test_") or absolute_imports(source) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernels/conv/apply.py", "import kernels.conv"),
        ("models/unet.py", "from fused_ops import conv2d"),
        ("kernels/conv/apply.py", "from ...fused_ops import conv2d"),
        ("kernels/conv/apply.py", "from ... import fused_ops"),
        ("fused_ops/conv.py", "from ..models.layers import Conv"),
        ("fused_ops/conv.py", "from .. import bench"),
        ("models/data/cells.py", "from ...bench import run"),
        ("kernels/conv/apply.py", "import torch.autograd.forward_ad"),
        ("kernels/conv/apply.py", "from torch.autograd import Function"),
        ("kernels/conv/apply.py", "from torch import autograd"),
    ],
)
def test_wrong_imports_are_found(module, line):
    assert len(wrong_imports(ROOT / module, line)) == 1


@pytest.mark.parametrize("line", ["import backstride.kernels", "from backstride import kernels"])
def test_absolute_imports_are_found(line):
    assert absolute_imports(line) == [1]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("bench/conv.py", "from ..models.layers import Conv"),
        ("models/data/cells.py", "from ...kernels import conv"),
        ("fused_ops/conv.py", "from ..kernels.conv import apply"),
        ("kernels/conv/apply.py", "from .tile import dot"),
        ("kernels/conv/apply.py", "import torch"),
        ("fused_ops/conv.py", "from torch.autograd import Function"),
    ],
)
def test_right_imports_pass(module, line):
    assert wrong_imports(ROOT / module, line) == []
