"""A small engine on torch alone, with the host pool's paged layouts: for checks and kernel work
without SGLang."""

from .engine import Engine, Sequence

__all__ = ["Engine", "Sequence"]
