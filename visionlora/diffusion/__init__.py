"""The diffusion side: what is learned at which noise, and drawing pictures."""
