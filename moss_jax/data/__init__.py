"""Training data: batches of conversations about videos and of the tabletop world."""
