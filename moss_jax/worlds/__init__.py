"""Synthetic worlds with ground truth, for training and evaluation."""
