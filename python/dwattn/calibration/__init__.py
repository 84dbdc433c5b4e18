"""Calibration without training: closed-form weights for a converted Vision Transformer.

Blocks go in depth order. Each replaced layer gets its kernels and context terms from a ridge regression of the
true attention output of its own (already converted) input; then every linear layer that writes to the residual
stream after the first replacement - the output projections and the last layer of the MLPs - is corrected
towards the original model's residual stream, shrunk towards its pretrained weights. None of this costs latency.
"""

from __future__ import annotations

from dwattn.calibration.journal import CalibrationResult, LayerNote
from dwattn.calibration.options import CalibrationOptions
from dwattn.calibration.sweep import calibrate

__all__ = ["CalibrationOptions", "CalibrationResult", "LayerNote", "calibrate"]
