"""Leaves shared by the two Diffusion-Sharpening scripts; nothing in here runs a training step."""
