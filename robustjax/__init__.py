"""robustjax: adversarial robustness, robust optimization, generalisation and calibration in JAX."""

__version__ = "0.1.0"
