"""The errors that a person can meet: one line each, with the thing, what was found, what was expected and what to do.

Every class is also a builtin, so that code which knows nothing of layerfuse can catch it sensibly.
"""


class MergeError(Exception):
    """Base of all errors that layerfuse raises on purpose; `str(error)` is one complete line for a person."""


class RecordError(MergeError, ValueError):
    """An alphas file, plan or other record is malformed; the message lists every problem found, not only the first."""


class PlanError(MergeError, ValueError):
    """A plan is well-formed but cannot be applied to this model."""


class CheckpointError(MergeError, ValueError):
    """A checkpoint's files are damaged, incomplete, inconsistent or of a kind that cannot be read."""


class ModelNotFoundError(MergeError, LookupError):
    """A model name leads to no folder, file or repository that can be reached."""


class OutputError(MergeError, OSError):
    """The output cannot be written: folder in use, disk too small, or a failing write."""


class HubError(MergeError, OSError):
    """A folder cannot be pushed to the Hub; the folder itself is as it was."""


class VerificationError(MergeError, ValueError):
    """An output does not hold what its plan says."""


class SearchError(MergeError, ValueError):
    """A search that cannot be begun or continued."""
