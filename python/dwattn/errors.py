"""The exceptions of the package: one base class, one subclass per kind of mistake.

Every message is a sentence that holds the offending values and says what to do next. All of them are
``ValueError``s, so that callers who do not know the package can still catch them.
"""

from __future__ import annotations


class DwattnError(ValueError):
    """Base of every error that dwattn raises on purpose."""


class GeometryError(DwattnError):
    """A token count, grid and prefix that do not fit together."""


class UnsupportedAttentionError(DwattnError):
    """An attention layer, or a way of calling it, that has no equivalent replacement."""


class PlanError(DwattnError):
    """A plan that is malformed, stale or does not fit the model."""


class ScoreError(DwattnError):
    """Scores that cannot be used: NaN, too few images, states that do not belong together."""


class CalibrationError(DwattnError):
    """Calibration data or activations from which no weights can be fitted."""


class CheckpointError(DwattnError):
    """A file of weights that is missing, truncated or belongs to another model."""


class DataError(DwattnError):
    """Images that cannot be read or do not fit the model."""


class TrainingError(DwattnError):
    """Training that cannot start as requested, or cannot continue."""


class BackendError(DwattnError):
    """A backend that was asked for by name and cannot run the call."""


class ExportError(DwattnError):
    """A model that cannot be exported, or whose export does not agree with PyTorch."""


class DeployError(DwattnError):
    """TensorRT, onnxruntime or a device that cannot build, run or confirm a model."""
