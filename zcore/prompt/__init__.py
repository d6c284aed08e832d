"""A prompt before it reaches the text encoder: templates, chat format, token count. Needs no torch."""
