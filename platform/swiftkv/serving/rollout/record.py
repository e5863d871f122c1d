"""What is remembered of a rollout. It is kept in Serve's own config, so a killed replica finds it where Serve has the
applications, and both change in one write.

Called by: every file of the rollout.
"""

from swiftkv.config import StrictModel


class Rejection(StrictModel):
    """A version that is not tried again until the alias moves."""

    version: str
    tag: str
    """Of the alias when it named that version: every move changes it."""
    reason: str


class Record(StrictModel):
    """One model's versions. Empty at first."""

    stable: str | None = None
    """The version that answers. None: none has run yet."""
    candidate: str | None = None
    """The version that is starting, or being watched."""
    share: float = 0
    """The candidate's part of the requests; 0 until it runs and is warm."""
    rejected: Rejection | None = None

    def rejects(self, version: str, tag: str) -> bool:
        """Whether the version was tried since the alias moved."""
        return self.rejected is not None and (self.rejected.version, self.rejected.tag) == (version, tag)
