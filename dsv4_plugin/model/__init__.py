"""DeepSeek-V4 as torch modules that compose operators."""

from .transformer import DeepseekV4

__all__ = ["DeepseekV4"]
