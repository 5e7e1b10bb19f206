"""The whole job on handwritten digits, in a minute."""
