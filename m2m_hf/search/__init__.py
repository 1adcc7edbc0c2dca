"""The search: its loop, callbacks, races, strategies and result. It knows objectives, but no models.

Imports `core`, `storage`, `console` and `errors` only.
"""
