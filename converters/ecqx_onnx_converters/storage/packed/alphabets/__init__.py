"""The symbols of a stream: which pairs have one of their own, and how the others are spelled."""
