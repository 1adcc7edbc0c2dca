"""The search: its loop, callbacks, races, strategies and result. It knows objectives, but no models.

Imports `core` and `storage` only.
"""
