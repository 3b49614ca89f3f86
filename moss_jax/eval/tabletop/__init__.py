"""Evaluation on the tabletop world."""
