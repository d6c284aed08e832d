"""The diffusion transformer and the VAE as functions of tensors."""
