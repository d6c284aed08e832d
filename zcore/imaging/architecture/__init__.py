"""The networks: their layers, with the weights' names of diffusers and transformers."""
