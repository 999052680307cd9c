"""The collapse panel for any mixture-of-experts model."""
