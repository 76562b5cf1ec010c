"""Entry point of group `sglang.srt.plugins`: takes the host's seams, in every process that
serves."""

from __future__ import annotations

from .. import flags
from . import version
from .lifetime import end_if_orphaned
from .refusal import refuse
from .timeline import TIMELINE


def register() -> None:
    """Makes this process serve DeepSeek-V4 with this package; with DSV4_PLUGIN=0 it does nothing at
    all.

    An unknown flag, an unsupported host or a seam that cannot be taken ends the process with one
    line.
    """
    try:
        if not flags.enabled("DSV4_PLUGIN"):
            return
        from ..runtime import kernel_cache
        from . import kernels  # noqa: F401  all operators' implementations, the values of flags

        flags.check()
        flags.adopt()
        kernel_cache.point_languages()
        version.check()
        end_if_orphaned()
        from .ledger import take
        from .seams import seams

        take(seams())
        TIMELINE.end("import")
    except (flags.FlagError, version.HostVersionError) as error:
        refuse(error)
