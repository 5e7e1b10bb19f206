"""How much each weight matters to the output: layer-wise relevance propagation."""
