"""From noise to latents: which noise levels, and the walk along them."""
