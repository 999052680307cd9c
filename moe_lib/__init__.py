"""A reproducible study of expert collapse in mixture-of-experts models."""

__version__ = "0.1.0"
