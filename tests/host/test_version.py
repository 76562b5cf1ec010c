"""The host versions this package supports."""

from __future__ import annotations

import pytest

from dsv4_plugin.host import version


@pytest.mark.parametrize("supported", ["0.5.23", "0.5.23.post1", "0.5.23+rocm700"])
def test_the_tested_version_and_its_builds_are_supported(supported):
    assert version.check(supported) == supported


@pytest.mark.parametrize(
    "other", ["0.5.22", "0.5.24", "0.5.24.dev1", "0.5.23rc1", "1.0", "unknown"]
)
def test_any_other_version_is_refused_with_the_way_out(other):
    with pytest.raises(version.HostVersionError) as error:
        version.check(other)
    assert (
        other in str(error.value)
        and "0.5.23" in str(error.value)
        and "DSV4_PLUGIN=0" in str(error.value)
    )


def test_the_installed_version_is_supported():
    assert version.check() == version.installed()
