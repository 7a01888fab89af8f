"""The old place of `inference/predictor.py`, for versions that were registered when it was here."""

from deta.platform.inference.predictor import Predictor as Predictor
