"""Exported programs (.pt2), rebuilt from what is known before torch sees them."""
