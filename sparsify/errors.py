"""The errors a user can meet, each with the exit code the command line answers with.

A message is one line that names the file or option, the key, and what to do next. Anything that is not a
``SparsifyError`` is a fault in Sparsify itself and keeps its traceback.
"""


class SparsifyError(Exception):
    """Something the user can mend. ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(SparsifyError):
    """An option, a recipe key or a combination of them that means nothing here."""

    exit_code = 2


class ModelError(SparsifyError):
    """The model folder, shard, config or GGUF file cannot be used."""

    exit_code = 3


class DataError(SparsifyError):
    """The calibration or evaluation text, or a file of records, cannot be used."""

    exit_code = 4


class OutputError(SparsifyError):
    """The output cannot be written: it exists, is locked, is not writable, or the disk is full."""

    exit_code = 5


class NumericsError(SparsifyError):
    """NaN or Inf in weights or activations."""

    exit_code = 6


class SingularError(NumericsError):
    """A system of equations without a stable solution; more damping gives it one."""


class MissingExtraError(SparsifyError):
    """An optional package is needed and absent; the message holds the command that installs it."""

    exit_code = 7


class VerificationError(SparsifyError):
    """An artifact differs from its manifest, or its outputs differ from the model it was exported from."""

    exit_code = 8


class GateError(SparsifyError):
    """A rule of ``sparsify gate`` is not met, or there is nothing to hold it against."""

    exit_code = 9


class MeasurementError(SparsifyError):
    """A measurement failed; the records that were finished before are kept."""

    exit_code = 10


class WorkerError(SparsifyError):
    """A process that works for a run died, and so did those that were started in its place."""

    exit_code = 11


class BudgetError(UsageError):
    """A run needs more memory or disk than there is; the message holds what would fit."""

    exit_code = 12
