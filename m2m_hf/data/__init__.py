"""Candidates and targets as rows in one format. Imports core, config and storage."""
