"""Configurations of TRL, axolotl and LLaMA-Factory, as drafts of ours."""
