"""The project's own rules: make targets, setup, imports, and committed files."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path

import pytest

from experiments.cli import guarded

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "ultimate-hyperoptimizer"

# The other packages of the repository that each package may import.
MAY_IMPORT: dict[str, set[str]] = {
    "hyperopt": set(),
    "models": set(),
    "experiments": {"models", "hyperopt"},
    "hydra_plugins": {"experiments"},
    "scripts": {"experiments", "models", "hyperopt"},
}


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # An outer `make test PYTHON=...` must not reach the inner one.
    choices = ("PYTHON", "PRESET", "WORKERS", "LOGGER", "START", "SEEDS", "TASKS", "METHODS")
    ours = ("MAKE", "MFLAGS", "ARGS", "FAST", *choices)
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


# The Makefile.


def make_targets() -> list[str]:
    return re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_alone_lists_every_target_with_a_line() -> None:
    rules = make_targets()
    listed = dict(re.findall(r"^  make ([\w-]+) +(\S.*)$", make().stdout, re.MULTILINE))
    assert {"setup", "test", "lint", "reproduce-table1", "reproduce-figure2", "tables"} <= set(
        rules
    )
    assert list(listed) == rules


def test_choices_reach_the_command() -> None:
    choices = ("PRESET=quick", "WORKERS=3", "LOGGER=wandb", "START=own")
    command = " ".join(make("-n", "reproduce-table1", *choices).stdout.split())
    assert "experiments.studies table1 preset=quick workers=3 logger=wandb start=own" in command

    few = ("TASKS=mlp,softmax", "METHODS=Auto,Adam/SGD", "SEEDS=0")
    command = " ".join(make("-n", "reproduce-robustness", *few).stdout.replace("\\\n", "").split())
    assert (
        "experiments.studies robustness seeds=0 tasks=mlp,softmax methods=Auto,Adam/SGD" in command
    )

    for target in ("table1", "v1"):  # they reject these options
        assert "seeds=0" in make("-n", f"reproduce-{target}", "SEEDS=0").stdout

    choices = ("PRESET=paper", "WORKERS=3", "START=records", "SEEDS=0,1")
    command = " ".join(make("-n", "reproduce-figure2", *choices).stdout.split())
    assert "experiments.studies figure2 preset=paper workers=3 start=records seeds=0,1" in command


def test_fast_tests_are_chosen() -> None:
    command = make("-n", "test", "FAST=1").stdout
    files = re.findall(r"tests/test_\w+\.py", command)
    assert files and all((ROOT / file).is_file() for file in files)
    assert "mypy" not in command and "not slow" in command
    assert "mypy" in make("-n", "test").stdout and "not slow" not in make("-n", "test").stdout


def test_the_tests_say_how_long_they_take_and_how_to_run_one(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = .\n")
    test = tmp_path / "test_one.py"

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", *arguments]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # it starts faster
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.stdout

    test.write_text("def test_it(): assert 1 == 2\n")
    failed = run()
    assert "this checkout has not timed them yet" in failed
    (command,) = re.findall(r"^To run one of these again: .+ -m pytest '(.+)'$", failed, re.M)
    assert command == "test_one.py::test_it"
    again = run(command)
    assert "1 failed" in again and "A part of the tests" in again

    test.write_text("def test_it(): pass\n")
    assert "has not timed them yet" in run()
    assert "the last time they took 0 minutes" in run()


def test_a_command_starts_without_what_only_some_need() -> None:
    """These imports take longer than all others together."""
    code = "import sys; from experiments.studies.catalog import studies; list(studies())"
    heavy = {"torch._dynamo", "torchvision", "matplotlib", "scipy"}
    code += f"; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that `make setup` reads, with a handmade .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    return tmp_path


def up_to_date(checkout: Path, *arguments: str) -> bool:
    return make("-q", "setup", *arguments, cwd=checkout).returncode == 0


def test_setup_runs_once_and_again_when_something_changed(checkout: Path) -> None:
    assert not up_to_date(checkout), "a .venv made by hand was taken for a finished setup"

    (checkout / ".venv/.setup-done").touch()
    assert up_to_date(checkout)
    assert up_to_date(checkout, f"PYTHON={sys.executable}")
    assert not up_to_date(checkout, f"PYTHON={fake_python(checkout, (3, 99, 0))}")

    for name in ("pyproject.toml", "constraints.txt"):
        changed = time.time() + 10
        os.utime(checkout / name, (changed, changed))
        assert not up_to_date(checkout), f"{name} has changed, but setup does nothing"
        os.utime(checkout / name, (0, 0))


def fake_python(folder: Path, version: tuple[int, int, int]) -> Path:
    """This interpreter, reporting another version."""
    script = folder / f"python{version[0]}.{version[1]}"
    pretend = f"import sys; sys.version_info = {version}; sys.version = '{version}'"
    script.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}; exec(sys.argv[1])" "$2"\n'
    )
    script.chmod(0o755)
    return script


def test_an_old_or_missing_python_is_one_clear_line(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    old = make("setup", f"PYTHON={fake_python(checkout, (3, 8, 18))}", cwd=checkout)
    assert old.returncode != 0
    assert re.search(r"^PYTHON=\S+ is Python 3\.8; give one of 3\.10 or later", old.stderr)

    missing = make("setup", "PYTHON=no-such-python", cwd=checkout)
    assert missing.returncode != 0
    assert re.search(r"^PYTHON=no-such-python is not a program; give", missing.stderr)
    assert not (checkout / ".venv").exists()


def test_conda_installs_what_make_setup_does() -> None:
    extras = [
        re.findall(rf"^.*{option} '?\.\[(\S+?)\]", (ROOT / name).read_text(), re.MULTILINE)
        for name, option in (("Makefile", "-e"), ("environment.yml", "--editable"))
    ]
    assert extras[0] == extras[1] == ["experiments,dev,frameworks,peers,scaleout"]


# Imports.


def imports_of(package: str) -> Iterator[tuple[str, str]]:
    """(file, top-level module) of every absolute import in a package of the repository."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                yield str(path.relative_to(ROOT)), name.partition(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    found = list(imports_of(package))
    assert found, f"{package} was not read"
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package} | {"tests"}
    assert [(file, name) for file, name in found if name in forbidden] == []


def module_imports() -> dict[str, set[str]]:
    """All imports between modules of the repository, also inside functions."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in MAY_IMPORT
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    found: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parts = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                base = ".".join([*parts, node.module or ""]) if node.level else node.module or ""
                base = base.rstrip(".")
                for alias in node.names:
                    whole = f"{base}.{alias.name}"
                    found[name].add(whole if whole in paths else base)
    return {name: others & paths.keys() - {name} for name, others in found.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules on an import cycle."""

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        ahead = [*graph[name]]
        while ahead:
            if (other := ahead.pop()) not in found:
                found.add(other)
                ahead += graph[other]
        return found

    return [name for name in graph if name in reached(name)]


@pytest.mark.parametrize(
    "package", ["hyperopt", "models", "experiments", "hydra_plugins", "scripts"]
)
def test_there_are_no_import_cycles(package: str) -> None:
    """Imports inside functions count too: they would only hide a cycle."""
    found = circles(module_imports())
    assert [name for name in found if name.partition(".")[0] == package] == []


def test_an_import_cycle_is_detected() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


# From the lowest layer up; a layer imports only from lower layers.
ROOMS = (
    "files",
    "found",
    "cli",
    "data",
    "tasks",
    "config",
    "records",
    "training",
    "execution",
    "studies",
)


def test_experiments_import_only_from_lower_layers() -> None:
    wrong = []
    for name, others in module_imports().items():
        _, _, rest = name.partition("experiments.")
        room = rest.partition(".")[0]
        for other in others:
            below = other.partition("experiments.")[2].partition(".")[0]
            if room in ROOMS and below and ROOMS.index(below) > ROOMS.index(room):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_the_library_is_imported_by_its_name() -> None:
    inner = {
        (name, other)
        for name, others in module_imports().items()
        for other in others
        if other.startswith("hyperopt.") and not name.startswith("hyperopt")
    }
    assert inner == set()


def test_private_torch_api_is_used_in_one_file() -> None:
    private = re.compile(r"torch\.(\w+\.)*_[a-z]\w*|\._version\b|_local_tensor|fx\.experimental")
    found = {
        path.name
        for path in (ROOT / "hyperopt").rglob("*.py")
        if private.search(path.read_text().replace("torch.__", ""))
    }
    assert found == {"torch_private.py"}


@pytest.mark.parametrize("package", ["hyperopt", "models"])
def test_needs_torch_alone(package: str) -> None:
    allowed = {package, "torch", *sys.stdlib_module_names}
    found = [(file, name) for file, name in imports_of(package) if name not in allowed]
    # To draw, and only then: tests/test_history.py.
    assert set(found) <= {("hyperopt/history.py", "matplotlib")}


def third_party(package: str) -> set[str]:
    """The distributions that a package of the repository imports from."""
    own = {*MAY_IMPORT, "tests", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    distributions = packages_distributions()
    return {
        normalized(distributions.get(name, [name])[0])
        for _, name in imports_of(package)
        if name not in own and name not in sys.stdlib_module_names
    }


def test_imported_packages_are_exactly_the_declared_ones() -> None:
    always = requirements(extra=None) | requirements(extra="experiments")
    imported = set().union(*(third_party(package) for package in MAY_IMPORT))
    assert imported - always - requirements(extra="peers") - requirements(extra="scaleout") == set()
    assert always - imported == set()
    extras = ("dev", "frameworks", "peers", "scaleout")
    for_tests = always | set().union(*map(requirements, extras))
    assert third_party("tests") - for_tests == set()


# Dependencies.


def test_the_library_installs_itself_and_torch_alone() -> None:
    """No package of the experiments, as `models`, comes into somebody's environment with it."""
    assert requirements(extra=None) == {"torch"}
    # The wheel's name for hyperopt/: see setup.py.
    folders = (distribution(DISTRIBUTION).read_text("top_level.txt") or "").split()
    assert folders == ["ultimate_hyperoptimizer"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(extra: str | None) -> set[str]:
    """The project's required distributions, of one extra or (None) always."""
    found = set()
    for line in requires(DISTRIBUTION) or ():
        name, _, marker = line.partition(";")
        match = re.search(r"extra == [\"'](\w+)", marker)
        if (match and match[1]) == extra:
            found.add(normalized(re.split(r"[^\w.-]", name.strip())[0]))
    return found


@pytest.mark.parametrize("extra", [None, "experiments", "dev", "frameworks", "peers", "scaleout"])
def test_every_requirement_has_a_tested_version(extra: str | None) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalized(line.partition("==")[0]) for line in lines if not line.startswith("#")}
    wanted = requirements(extra)
    assert wanted and wanted - pinned == set()


# What is committed.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("experiments.studies.figure2.cost nosuch", "'nosuch' is not an option of this command"),
        ("experiments.studies gallery nosuch", "'nosuch' is not an option of this command"),
        ("experiments.studies figure1", "there is no study 'figure1'; did you mean figure3"),
        ("experiments.studies step_time nosuch", "'nosuch' is not a benchmark; give some of"),
        ("scripts.tables nosuch results=more", "'nosuch' is not an option of this command"),
        ("scripts.tables --nosuch", "'--nosuch' is not an option of this command"),
        ("scripts.tables results=nosuch", "there are no runs in nosuch"),
        ("experiments.studies.figure3.report nosuch", "'nosuch' is not an option of this command"),
        ("fault_injection runs=3", "runs=3 must be an even number above 0"),
        ("fault_injection runs=0", "runs=0 must be an even number above 0"),
        ("fault_injection epochs=0", "kills=10 and epochs=0 must be 1 or more"),
        ("logging_cost rounds=0", "rounds=0 must be 1 or more"),
        ("experiments.records.push_wandb store=nosuch", "there is no store=nosuch"),
        ("experiments.records.push_wandb results=nosuch", "results=nosuch is not a folder"),
    ],
)
def test_a_wrong_command_line_prints_an_error_and_does_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    message: str,
) -> None:
    module, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.chdir(tmp_path)
    module += ".__main__" * (module == "experiments.studies")
    assert guarded(import_module(module).main) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not any(tmp_path.iterdir())


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    machine = re.compile(r"(?<![\w.~}$-])/(?:work|tmp|root|home|Users)/\w+")
    found = []
    for name in listing.stdout.rstrip("\0").split("\0"):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".pdf", ".npz", ".pt"}:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {match[0]}" for match in machine.finditer(text)]
    assert found == []
