"""Routers, experts, and the layer made of them."""
