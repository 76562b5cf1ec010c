"""Which SGLang this package was written and tested against."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

SUPPORTED = SpecifierSet(">=0.5.23,<0.5.24")


class HostVersionError(RuntimeError):
    """SGLang is absent, or of a version this package was not tested against."""


def installed() -> str:
    """Version of the installed SGLang. Raises HostVersionError when there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise HostVersionError(
            "SGLang is not installed; install it with: pip install 'dsv4_plugin[host]'"
        ) from None


def check(version: str | None = None) -> str:
    """Returns the host's version (default: the installed one). Raises HostVersionError outside
    SUPPORTED."""
    version = installed() if version is None else version
    try:
        supported = SUPPORTED.contains(version)
    except InvalidVersion:
        supported = False
    if not supported:
        raise HostVersionError(
            f"SGLang {version} is installed; this dsv4_plugin supports {SUPPORTED}. Install"
            " sglang==0.5.23, or set DSV4_PLUGIN=0 to run SGLang without the plugin"
        )
    return version
