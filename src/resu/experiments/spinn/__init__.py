"""SPINN: the sparse physics-informed twin of a machine tool, from real recordings to a report."""
