"""From token ids to embeddings: the text encoder, its cache, long prompts, and embedding files."""
