"""Metrics: `metric` calls any `evaluate` module, `shipped` is the one that comes with this package.

Imports config and storage."""
