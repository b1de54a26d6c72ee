"""Other libraries and their files: one optional import per module."""
