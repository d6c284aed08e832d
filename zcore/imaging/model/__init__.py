"""The three networks of a checkpoint: loaded, placed, and ready to be called."""
