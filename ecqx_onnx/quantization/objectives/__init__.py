"""What a training follows and is judged by: losses, metrics, and the float network's outputs."""
