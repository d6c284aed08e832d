"""The worker processes: image generation, prompt encoding, webhook delivery and periodic maintenance."""
