"""LoRAs: reading their files, and applying them to a network."""
