"""Inputs of a job: images and LoRAs, fetched and loaded."""
