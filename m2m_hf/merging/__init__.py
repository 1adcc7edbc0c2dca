"""Exact averages of adapters and full experts, as tensors. Imports core and config."""
