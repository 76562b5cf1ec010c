"""Peak figures of the GPUs that the roofline knows (roofline/hardware.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

SHIPPED = Path(__file__).with_name("hardware.yaml")


class HardwareError(ValueError):
    """A GPU or a hardware table that cannot be used."""


@dataclass(frozen=True)
class Hardware:
    """One GPU. Bytes, bytes per second, FLOP per second, seconds."""

    name: str
    memory: float
    bandwidth: float
    scale_up: float
    """Bytes per second one way to the other GPUs of the node together."""
    flops: dict[str, float]
    """Dense matrix rate by operand dtype; a dtype the GPU has no rate for is absent."""
    launch: float
    source: str

    @classmethod
    def named(cls, name: str, path: Path = SHIPPED) -> Hardware:
        """A GPU of the table, by any letter case. Raises HardwareError naming the known ones."""
        try:
            table = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise HardwareError(f"hardware table {path}: {error}") from None
        entry = {key.lower(): (key, value) for key, value in table.items()}.get(name.lower())
        if entry is None:
            raise HardwareError(f"GPU {name!r} is not in {path}; it has {', '.join(table)}")
        known, figures = entry
        try:
            return cls(
                known,
                figures["memory"] * 1e9,
                figures["bandwidth"] * 1e9,
                figures["scale_up"] * 1e9,
                {
                    dtype: rate * 1e12
                    for dtype, rate in figures["tflops"].items()
                    if rate is not None
                },
                figures["launch_us"] * 1e-6,
                figures["source"],
            )
        except (KeyError, TypeError) as error:
            raise HardwareError(
                f"hardware table {path}: {known} lacks or mistypes {error}"
            ) from None
