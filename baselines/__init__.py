"""The trained methods of the paper's table that are not Diffusion-Sharpening, a script each."""
