"""A profile that cannot be started, stopped or written is refused; in the scheduler it ends the
server.

Of the host's own checks, a second start while a profile is recorded is found and then not acted on,
and torch's error for it is of a class that the host does not catch.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import ProfileReqOutput, ProfileReqType
from sglang.srt.managers.scheduler_components.profiler_manager import SchedulerProfilerManager

host_profile = SchedulerProfilerManager._profile


def profile(manager: SchedulerProfilerManager, request: Any) -> ProfileReqOutput:
    """The host's answer to a start or stop of a profile; any failure of it as such an answer, which
    the entry points refuse with status 400."""
    starts = request.req_type == ProfileReqType.START_PROFILE
    if starts and getattr(manager, "profile_in_progress", False):
        return ProfileReqOutput(
            success=False, message="a profile is being recorded; /stop_profile ends it"
        )
    try:
        return host_profile(manager, request)
    except Exception as error:  # of torch, of the file system, of a profiler's package
        return ProfileReqOutput(
            success=False, message=f"the profile failed: {type(error).__name__}: {error}"
        )
