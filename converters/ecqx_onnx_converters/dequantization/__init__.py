"""Turn stored integers into the float weights that the graph computes with."""
