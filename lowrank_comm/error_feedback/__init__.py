"""Error feedback: how the part of a gradient that was not sent is kept for later."""

from lowrank_comm.error_feedback.memory import ErrorMemory
from lowrank_comm.error_feedback.options import ErrorFeedback

__all__ = ["ErrorFeedback", "ErrorMemory"]
