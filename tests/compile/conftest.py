"""A process that interprets Triton kernels cannot compile them: this directory is skipped there."""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = []
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Says why nothing is collected here."""
    if collect_ignore_glob:
        config.issue_config_time_warning(
            pytest.PytestWarning("TRITON_INTERPRET=1: tests/compile is not run"), 2
        )
