"""FlyDSL as the kernels here write it, `fx` and its compiler `flyc`; nothing else imports it.

Raises ImportError in a process that holds another MLIR: two bindings of it abort their process,
with no exception.
"""

import sys

if "cutlass._mlir" in sys.modules:
    raise ImportError(
        "this process loaded nvidia-cutlass-dsl, whose MLIR cannot be beside FlyDSL's;"
        " pip uninstall nvidia-cutlass-dsl, which no AMD GPU needs"
    )

import flydsl.compiler as flyc
import flydsl.expr as fx

__all__ = ["flyc", "fx"]
