"""What lies in a file: its weights, its float tensors, and whether every byte is whole."""
