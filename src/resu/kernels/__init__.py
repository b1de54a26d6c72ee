"""Operators: what layers multiply with, one idea per file, registered with ``torch.library``."""
