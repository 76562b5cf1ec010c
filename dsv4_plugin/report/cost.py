"""Dollars per million tokens from throughput and the price of a GPU hour."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

SHIPPED = Path(__file__).with_name("costs.yaml")


class CostError(ValueError):
    """A cost table that cannot be used."""


@dataclass(frozen=True)
class CostTable:
    """Dollars per GPU and hour by hardware and by owner (report/costs.yaml is the shipped one)."""

    source: str
    owners: dict[str, str]
    dollars_per_gpu_hour: dict[str, dict[str, float]]

    @classmethod
    def load(cls, path: Path = SHIPPED) -> CostTable:
        """Reads a cost table. Raises CostError naming the file, the entry and what is allowed
        there."""
        try:
            document = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise CostError(f"cost table {path}: {error}") from None
        if (
            not isinstance(document, dict)
            or not {"owners", "dollars_per_gpu_hour"} <= document.keys()
        ):
            raise CostError(
                f"cost table {path}: needs the keys 'owners' and 'dollars_per_gpu_hour'; start from"
                f" {SHIPPED}"
            )
        owners, prices = document["owners"], document["dollars_per_gpu_hour"]
        for hardware, by_owner in prices.items():
            for owner, price in by_owner.items():
                if owner not in owners:
                    raise CostError(
                        f"cost table {path}: {hardware} has a price for {owner!r}, which is not in"
                        f" 'owners' ({', '.join(owners)})"
                    )
                if not isinstance(price, (int, float)) or isinstance(price, bool) or price <= 0:
                    raise CostError(
                        f"cost table {path}: {hardware}.{owner} is {price!r}; give dollars per GPU"
                        " hour, above 0"
                    )
        return cls(str(document.get("source", path)), dict(owners), prices)

    def prices(self, hardware: str) -> dict[str, float]:
        """Owner -> dollars per GPU and hour; empty when the table has no such hardware."""
        by_name = {name.lower(): price for name, price in self.dollars_per_gpu_hour.items()}
        return by_name.get(hardware.lower(), {})


def dollars_per_million(dollars_per_gpu_hour: float, tput_per_gpu: float) -> float:
    """Price of a million tokens when one GPU yields `tput_per_gpu` tokens per second.

    The tokens are whichever `tput_per_gpu` counts: all of them, those read or those written.
    """
    return dollars_per_gpu_hour * 1e6 / (3600 * tput_per_gpu)
