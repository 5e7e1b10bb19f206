"""A demonstration of the whole work on handwritten digits, in a minute."""
