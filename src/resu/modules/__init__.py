"""Layers whose weight may be dense, sparse, or sparse with values that train at pruned positions."""
