"""Find weights that some quantizer has put on few values, and plan how they are stored anew."""
