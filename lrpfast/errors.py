"""The errors that lrpfast raises: one family, one class for each thing that can be wrong.

A caller catches `LrpfastError` for all of them. A message says what was wrong, where (the path of the layer in the user's
model, the file, the argument) and what to do about it. Those that stand for a bad value are `ValueError`s too, so that
code which knows nothing of lrpfast treats them as it treats torch's own.
"""


class LrpfastError(Exception):
    """Base of every error that lrpfast raises on purpose."""


class CaptureError(LrpfastError):
    """The model could not be captured as one graph, or is in a state in which its graph means something else."""


class UnsupportedOperationError(LrpfastError):
    """Relevance reached an operation that has no rule."""


class RuleError(LrpfastError):
    """A rule cannot be applied to the layer that it was given to, or its parameters are out of range."""


class CompositeError(LrpfastError, ValueError):
    """A composite is malformed, unknown, or does not fit the model."""


class InputError(LrpfastError, ValueError):
    """The inputs of a call have a wrong shape, dtype, device or value."""


class TargetError(LrpfastError, ValueError):
    """The target of a call is out of range or has a wrong shape or dtype."""


class NumericsError(LrpfastError, ValueError):
    """NaN or infinity in the input, in the model's output or in the relevance."""


class MemoryLimitError(LrpfastError, MemoryError):
    """A device has not the memory for a single sample, or for a batch that may not be split."""


class ProgramError(LrpfastError):
    """A saved program is damaged, or is not one of lrpfast's."""


class ModelError(LrpfastError):
    """A model cannot be found or loaded, or a checkpoint does not fit it."""


class OutputError(LrpfastError, OSError):
    """A folder or file cannot be written."""


class MissingDependencyError(LrpfastError, ImportError):
    """An optional dependency is asked for and absent."""


class ScreeningError(LrpfastError):
    """The folder of a screening holds another one, is in use, is damaged or not complete."""
