"""Labels of training tokens."""

# Ignore index: the label of a token that carries no loss.
IGNORED = -100
