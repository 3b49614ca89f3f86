"""Synthetic worlds with ground truth, which models can be trained and measured on."""
