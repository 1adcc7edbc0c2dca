"""Exact averages of adapters and full experts, as tensors. Imports config and storage."""
