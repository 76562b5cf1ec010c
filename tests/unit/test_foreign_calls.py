"""Adapters call functions of other packages with the arguments that these take: of the installed
package, else as recorded from its source. Nothing of them is imported.

`python tests/unit/test_foreign_calls.py AITER` prints tests/data/aiter.json for a git checkout of
aiter.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv4_plugin import device
from dsv4_plugin.host import kernels  # noqa: F401  all operators' implementations
from dsv4_plugin.ops.operator import OPERATORS

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests/data/aiter.json"
ADAPTERS = {
    "aiter": ROOT / "dsv4_plugin/kernels/aiter",
    "host": ROOT / "dsv4_plugin/host/kernels",
}
"""Directory of the adapters by the name of the implementations."""
PACKAGES = {"aiter": {"aiter"}, "host": {"sglang", "deep_gemm"}}
"""What they call."""


@dataclass(frozen=True)
class Call:
    """One call of a function of another package."""

    place: str
    function: str
    """module:name."""
    positional: int
    keywords: tuple[str, ...]

    def fits(self, signature: inspect.Signature) -> None:
        """Raises TypeError where `signature` does not take these arguments."""
        signature.bind(*[None] * self.positional, **dict.fromkeys(self.keywords))


def calls(name: str) -> Iterator[Call]:
    """The calls of functions of other packages in the adapters of `name`; one name that stands for
    either of two functions is called with the arguments of both."""
    for path in sorted(ADAPTERS[name].glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported: dict[str, list[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                if (node.module or "").split(".")[0] in PACKAGES[name]:
                    for alias in node.names:
                        known = imported.setdefault(alias.asname or alias.name, [])
                        known.append(f"{node.module}:{alias.name}")
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            for function in imported.get(node.func.id, ()):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert not any(isinstance(each, ast.Starred) for each in node.args), place
                assert all(each.arg for each in node.keywords), place
                keywords = tuple(str(each.arg) for each in node.keywords)
                yield Call(place, function, len(node.args), keywords)


def parameters(function: str, root: Path) -> str:
    """Parameters of `function` (module:name), as it is defined in the package that lies in `root`:
    their names, `=...` where there is a default. What a module takes from compiled code may be
    called with anything."""
    module, _, name = function.partition(":")
    path = root / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    if not found:
        [taken] = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        ]
        assert ast.unparse(taken.value) == f"_C.{name}", function
        return "*arguments, **named"
    [only] = found
    arguments = only.args
    for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        each.annotation = None
    for each in (arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    unknown = ast.Constant(...)
    arguments.defaults = [unknown for _ in arguments.defaults]
    arguments.kw_defaults = [each and unknown for each in arguments.kw_defaults]
    return ast.unparse(arguments)


def installed(function: str) -> inspect.Signature:
    """The signature of `function` in the installed package."""
    [place] = importlib.util.find_spec(
        function.split(".")[0].split(":")[0]
    ).submodule_search_locations
    return signature(parameters(function, Path(place).parent))


def signature(parameters: str) -> inspect.Signature:
    """The signature that parameters as text stand for."""
    return inspect.signature(eval(f"lambda {parameters}: None"))


RECORDED = json.loads(RECORD.read_text()) if RECORD.exists() else {"commit": "", "functions": {}}


def case(call: Call) -> object:
    return pytest.param(call, id=f"{call.place} {call.function}")


@pytest.mark.parametrize("call", [*map(case, calls("aiter"))])
def test_arguments_fit_the_recorded_aiter(call):
    call.fits(signature(RECORDED["functions"][call.function]))


@pytest.mark.skipif(
    device.package_version("amd-aiter") is None,
    reason="aiter is not installed; what was recorded of its source is checked instead",
)
@pytest.mark.parametrize("call", [*map(case, calls("aiter"))])
def test_arguments_fit_the_installed_aiter(call):
    call.fits(installed(call.function))


@pytest.mark.skipif(
    device.package_version("sglang") is None,
    reason="SGLang, whose functions are looked up, is absent",
)
@pytest.mark.parametrize("call", [*map(case, calls("host"))])
def test_arguments_fit_the_installed_host(call):
    call.fits(installed(call.function))


def test_the_record_holds_what_is_called_and_no_more():
    assert set(RECORDED["functions"]) == {call.function for call in calls("aiter")}
    for path in ADAPTERS["aiter"].glob("*.py"):
        assert RECORDED["commit"][:8] in (path.parent / "__init__.py").read_text()


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_offered_and_not_before_it_was_measured(name):
    offered = [
        operator.implementations[name]
        for operator in OPERATORS.values()
        if name in operator.implementations
    ]
    assert {each.path.partition(":")[0].rpartition(".")[2] for each in offered} == {
        path.stem for path in ADAPTERS[name].glob("[!_]*.py")
    }
    assert not any(each.measured for each in offered)
    for each in offered:
        function = each.path.partition(":")[2]
        assert (
            f"def {function}("
            in (ROOT / f"{each.path.partition(':')[0].replace('.', '/')}.py").read_text()
        )


@pytest.mark.parametrize(
    ("positional", "keywords", "fits"),
    [
        (2, (), True),
        (1, ("b",), True),
        (2, ("key",), True),
        (1, (), False),
        (4, (), False),
        (2, ("other",), False),
        (2, ("a",), False),
    ],
)
def test_a_call_that_does_not_fit_is_found(positional, keywords, fits):
    call = Call("here", "module:function", positional, keywords)
    takes = signature("a, b, c=..., *, key=...")
    if fits:
        call.fits(takes)
    else:
        with pytest.raises(TypeError):
            call.fits(takes)


def main() -> None:
    root = Path(sys.argv[1])
    commit = subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"], text=True).strip()
    functions = sorted({call.function for call in calls("aiter")})
    print(
        json.dumps(
            {"commit": commit, "functions": {each: parameters(each, root) for each in functions}},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
