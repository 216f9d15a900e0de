"""Error feedback: what happens to the part of a gradient that was not sent."""

from lowrank_comm.error_feedback.memory import ErrorMemory
from lowrank_comm.error_feedback.options import ErrorFeedback

__all__ = ["ErrorFeedback", "ErrorMemory"]
