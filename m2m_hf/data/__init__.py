"""Candidates and targets: loading them, one format for all rows, and a mixture as rows.

Imports config, core and storage."""
