"""A file gets its name only once its target's runtime has loaded it."""
