"""What installs the package agrees with itself, imports point down, and the wheel is whole."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "p3o_lightning"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

# Top to bottom: a module imports from its own layer, without cycles, and from those below. A new module is placed here on purpose.
LAYERS = [
    {"cli", "commands", "__main__"},
    {"policy", "reward_model", "supervised", "direct"},
    {
        "generation",
        "decoding",
        "generate_fallback",
        "cuda_graphs",
        "rewards",
        "function_reward",
        "model_reward",
        "responses",
        "reward_judge",
        "pair_scores",
        "reliability",
        "ensembles",
        "server_judge",
        "win_rates",
        "reward_log",
        "judges",
        "rollouts",
        "experience",
        "kl_control",
        "figures",
        "proofs",
        "data",
        "data_files",
        "data_formats",
        "encoding",
        "loaders",
        "metrics",
        "memory",
        "vllm_server",
        "vllm_sampling",
    },
    {
        "reference",
        "critic",
        "stage",
        "models",
        "tokenizers",
        "forwards",
        "packing",
        "token_attention",
        "processor",
        "phases",
        "casting",
        "prepacked",
        "norms",
        "compiling",
        "scoring",
        "head",
        "kv_cache",
        "gguf_files",
        "sharding",
        "sharded_checkpoints",
    },
    {
        "objectives",
        "sampler_correction",
        "baselines",
        "ppo",
        "frontier",
        "relative_terms",
        "sequences",
        "batches",
        "seeds",
        "errors",
        "shipped",
        "text",
        "policy_settings",
        "model_card",
        "hub",
    },
]
CALLBACKS_MAY_IMPORT = {"callbacks", "batches", "metrics", "errors", "text"}


# ---- declarations, pins, environments ----


def lock_lines() -> list[str]:
    lines = (line.strip() for line in (ROOT / "requirements.lock").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def locked() -> dict[str, list[Requirement]]:
    """The pins by name. A name has two where Python 3.10 needs an older release."""
    pins: dict[str, list[Requirement]] = {}
    for line in lock_lines():
        requirement = Requirement(line)
        pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pins


def applies(pin: Requirement, python: str) -> bool:
    return pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"})


def declared() -> list[Requirement]:
    """All but vLLM: a server, which pins what it runs on itself."""
    extras = [line for name, lines in PROJECT["optional-dependencies"].items() if name != "vllm" for line in lines]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras]


def test_every_pin_is_exact_and_holds_on_every_platform():
    for line in lock_lines():
        # No range, no path, no address, no local version such as +cpu: the same line must serve everyone.
        assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*( ; python_version (<|>=) "3\.11")?', line), line
    assert "torch==2.13.0" in lock_lines()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_every_declared_dependency_has_one_pin_that_satisfies_it(python):
    pins = locked()
    for requirement in declared():
        if not applies(requirement, python):
            continue
        pinned = [pin for pin in pins.get(canonicalize_name(requirement.name), []) if applies(pin, python)]
        assert len(pinned) == 1, f"{requirement} has {len(pinned)} pins in requirements.lock for Python {python}"
        (version,) = [specifier.version for specifier in pinned[0].specifier]
        assert requirement.specifier.contains(version), f"{pinned[0]} does not satisfy {requirement}"


def test_no_package_is_pinned_twice_for_one_python():
    for name, pins in locked().items():
        for python in ("3.10", "3.11"):
            assert sum(applies(pin, python) for pin in pins) <= 1, name


def test_the_two_malicious_releases_of_lightning_are_excluded_by_name():
    (lightning,) = [requirement for requirement in declared() if requirement.name == "lightning"]
    assert {"!=2.6.2", "!=2.6.3"} <= {str(specifier) for specifier in lightning.specifier}


def test_environment_yml_is_the_lock_and_an_admitted_python():
    environment = (ROOT / "environment.yml").read_text()
    (python,) = re.findall(r"^  - python=([0-9.]+)$", environment, re.MULTILINE)
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    pip_lines = re.findall(r"^      - (\S.*?)(?:\s+#.*)?$", environment, re.MULTILINE)
    assert pip_lines == ["-r requirements.lock", "-e ."]


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "p3o_lightning.__version__"}
    (version,) = re.findall(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    others = [path for path in sources() if path != PACKAGE / "__init__.py"] + [ROOT / "CITATION.cff"]
    assert not [path for path in others if re.search(rf"version\w*\s*[=:]\s*[\"']?{re.escape(version)}\b", path.read_text())]


# ---- imports point down only ----


def sources() -> list[Path]:
    """Every Python file of the package, callbacks included: glob does not follow symlinks on every Python."""
    return sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").rglob("*.py")})


def module_of(path: Path) -> str:
    """The name below p3o_lightning, dotted; "" for p3o_lightning itself."""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """(dotted modules of the package, top-level names of other packages) that a file imports, at the top or inside a function.

    What stands under `if TYPE_CHECKING:` is left out: it only names types, nothing is imported when the code runs.
    """
    own: set[str] = set()
    other: set[str] = set()
    type_only: set[int] = set()  # ids of the nodes under `if TYPE_CHECKING:`, which walk hands out after the `if` itself
    package = ["p3o_lightning", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            type_only.update(id(child) for statement in node.body for child in ast.walk(statement))
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" if is_package(source) else source for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "p3o_lightning":
                own.add(name.removeprefix("p3o_lightning").removeprefix("."))
            else:
                other.add(name.split(".")[0])
    return own, other


def is_package(dotted: str) -> bool:
    """Whether names imported from it may be modules: `from p3o_lightning import errors`."""
    return dotted.split(".")[0] == "p3o_lightning" and ROOT.joinpath(*dotted.split("."), "__init__.py").exists()


def layer_of(module: str) -> int:
    for depth, layer in enumerate(LAYERS):
        if module in layer:
            return depth
    raise AssertionError(f"p3o_lightning.{module} is in no layer: place it in tests/test_packaging.py")


def internal_imports() -> dict[str, set[str]]:
    """Top module -> top modules of the package that it imports. `p3o_lightning` itself imports lazily and is left out."""
    graph: dict[str, set[str]] = {}
    for path in sources():
        if module := module_of(path):
            top = module.split(".")[0]
            graph.setdefault(top, set()).update(name.split(".")[0] for name in imports_of(path)[0])
    return graph


def test_imports_point_down():
    for module, imported in internal_imports().items():
        if module == "callbacks":
            continue
        depth = layer_of(module)
        for name in imported - {module, "__version__"}:
            if name == "callbacks":
                assert depth == 0, f"p3o_lightning.{module} imports callbacks: only the command does, for the short names in YAML"
            else:
                assert layer_of(name) >= depth, f"p3o_lightning.{module} imports p3o_lightning.{name}, which is above it"


def test_imports_make_no_cycle():
    files: dict[str, set[str]] = {}
    modules = {module_of(path) for path in sources()}
    for path in sources():
        # A name imported from a package may be a class in its __init__: then it is the package that is imported.
        found = {name if name in modules else name.rpartition(".")[0] for name in imports_of(path)[0]}
        if module := module_of(path):
            files[module] = found - {"", module}
    graphlib.TopologicalSorter(files).prepare()  # raises CycleError, with the cycle


def test_callbacks_observe_through_batches_and_metrics_alone():
    imported = internal_imports()["callbacks"]
    assert imported <= CALLBACKS_MAY_IMPORT, f"callbacks import {sorted(imported - CALLBACKS_MAY_IMPORT)}"


def test_everything_imported_is_declared():
    # torch brings numpy; transformers brings tokenizers and huggingface_hub; datasets brings pyarrow; jsonargparse brings yaml.
    brought = {"numpy", "tokenizers", "huggingface_hub", "pyarrow", "yaml"}
    names = {canonicalize_name(requirement.name).replace("-", "_") for requirement in declared()}
    for path in sources():
        unknown = imports_of(path)[1] - names - brought - set(sys.stdlib_module_names)
        assert not unknown, f"{path.relative_to(ROOT)} imports {sorted(unknown)}, which pyproject.toml does not declare"


# ---- the sdist and the wheel ----


def run(*command: object, cwd: Path, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=inherited | environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, the wheel built from it, and in `direct/` the wheel built from the tree."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    left_behind = (".venv*", ".git", "runs", "models", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*left_behind))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "direct", tree, cwd=folder)
    return folder


def wheel_files(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def shipped_files() -> set[str]:
    """The package's files, with the real callbacks and configs in the place of their symlinks."""
    code = {path.relative_to(ROOT).as_posix() for path in sources()}
    recipes = {f"p3o_lightning/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
    return code | recipes | {"p3o_lightning/py.typed"}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built):
    files = wheel_files(built)
    assert files == wheel_files(built / "direct")
    assert {name for name in files if ".dist-info/" not in name} == shipped_files()


@pytest.mark.slow
def test_sdist_holds_real_files(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isreg() for member in members), "links in the sdist"
    inside = {member.name.partition("/")[2] for member in members}
    assert shipped_files() | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= inside
    assert not [name for name in inside if name.startswith(("callbacks/", "configs/", "tests/"))]


@pytest.mark.slow
def test_installed_wheel_trains_in_an_empty_folder(built, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    # The dependencies come from this environment. A path in a .pth file does not read the .pth files it leads to, so that the
    # editable install of the checkout stays out of reach.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(python, "-c", "import p3o_lightning, p3o_lightning.callbacks as c; print(p3o_lightning.__file__, c.__file__)", cwd=empty)
    assert all(path.startswith(str(site)) for path in where.split()), where
    run(tmp_path / "venv" / "bin" / "p3o", "fit", "--config", "configs/debug/policy.yaml", cwd=empty)
    assert [path for path in (empty / "runs").rglob("export") if path.is_dir()], "no export below runs/"
