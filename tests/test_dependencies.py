"""Declared dependencies are the distributions that are imported."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = [*ROOT.glob("moss_jax/**/*.py"), ROOT / "train.py", ROOT / "serve.py"]
TESTS = list(ROOT.glob("tests/**/*.py"))


def imported(files: Iterable[Path]) -> set[str]:
    """Distributions that files import from."""
    modules = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module)
    providers = importlib.metadata.packages_distributions()
    packages = {module.partition(".")[0] for module in modules} - {"moss_jax", *sys.stdlib_module_names}
    return {normalized(name) for package in packages for name in providers.get(package, ())}


def normalized(requirement: str) -> str:
    """Name of the distribution in a requirement, as PyPI compares it."""
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def requirements() -> set[str]:
    return set(map(normalized, (ROOT / "requirements.txt").read_text().splitlines()))


def extra(name: str) -> set[str]:
    """Distributions of an extra, with those of the extras of this package that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = set()
    for requirement in project["optional-dependencies"][name]:
        if within := re.fullmatch(r"moss_jax\[(\w+)\]", requirement):
            found |= extra(within[1])
        else:
            found.add(normalized(requirement))
    return found


def test_requirements_are_what_the_program_imports():
    server = imported(ROOT.glob("moss_jax/serving/*.py"))
    # Starlette imports it where forms are parsed.
    assert server - requirements() == extra("serve") - {"python-multipart"}
    assert imported(PROGRAM) - extra("serve") == requirements()


def test_tests_import_what_is_declared():
    assert imported(TESTS) <= requirements() | extra("dev")
