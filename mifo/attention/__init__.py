"""Attention control: where the sites are, recording their maps, and bounding them to boxes."""
