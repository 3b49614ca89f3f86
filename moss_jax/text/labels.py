"""Labels of training tokens."""

# Label of a token that carries no loss.
IGNORED = -100
