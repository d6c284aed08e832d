"""From a prompt to its embedding: templates, the chat layout, tokens, the text encoder, its cache."""
