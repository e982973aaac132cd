"""fit(): episodes, loss and checkpoints."""
