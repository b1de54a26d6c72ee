"""Transformers made smaller: heads, feed-forward width and depth removed for real."""
