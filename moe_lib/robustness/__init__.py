"""Disturbances of images: corruptions and attacks."""
