"""Triton's key of a kernel does not follow from what its process compiled before."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from dsv4_plugin.kernels import triton as kernels
from dsv4_plugin.kernels.triton.cache_key import DependenciesFinder, settle


def functions() -> list:
    from triton.runtime.jit import JITFunction

    modules = [
        importlib.import_module(f"{kernels.__name__}.{found.name}")
        for found in pkgutil.iter_modules(kernels.__path__)
    ]
    return [each for module in modules for each in vars(module).values() if _is(each, JITFunction)]


def _is(each: object, kind: type) -> bool:
    return isinstance(each, kind) and each.fn.__module__.startswith(kernels.__name__)


def keys(order: list) -> dict[str, str]:
    """Of all functions, found in this order by a process that knows none."""
    for function in order:
        function.hash, function.used_global_vals = None, {}
    return {f"{each.fn.__module__}.{each.fn.__name__}": each.cache_key for each in order}


def as_triton_3_6(finder: DependenciesFinder, callee) -> None:
    """Its order: what the callee uses before the callee's key."""
    finder.used_global_vals.update(callee.used_global_vals)
    finder.hasher.update((callee.cache_key + str(callee.noinline)).encode())


@pytest.fixture
def found():
    every = functions()
    yield every
    keys(every)


@pytest.mark.parametrize("settled", [True, False])
def test_keys_with_triton_3_6(settled, found, monkeypatch):
    monkeypatch.setattr(DependenciesFinder, "_update_hash", as_triton_3_6)
    if settled:
        settle()
    assert len(found) > 70
    assert (keys(found) == keys(found[::-1])) == settled


def test_keys_with_this_triton(found):
    assert keys(found) == keys(found[::-1])
