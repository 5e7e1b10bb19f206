"""Whatever a user names as MODEL becomes a float graph and the levels of its weights."""
