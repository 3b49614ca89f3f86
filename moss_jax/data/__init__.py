"""Training data: conversations about videos, the tabletop world, and the batches made of them."""
