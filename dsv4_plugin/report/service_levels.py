"""What users may be promised: the service levels that goodput counts and the figure draws."""

from __future__ import annotations

from typing import NamedTuple


class ServiceLevel(NamedTuple):
    """Most milliseconds to the first token of a request, and per further token of it."""

    ttft_ms: float
    tpot_ms: float

    @property
    def intvty(self) -> float:
        """Least tokens per second of a user."""
        return 1000 / self.tpot_ms


SOURCE = "MLPerf Inference v6.0, DeepSeek-R1"
SERVICE_LEVELS = {"server": ServiceLevel(2000, 80), "interactive": ServiceLevel(1500, 15)}
"""By scenario of SOURCE. Its rounds have no DeepSeek-V4; R1 is the nearest model in them."""
