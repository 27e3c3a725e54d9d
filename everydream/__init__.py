"""everydream: fine-tunes Stable Diffusion on your own pictures."""

__version__ = "0.1.0"
