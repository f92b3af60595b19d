"""Segmentation heads: from maps of an encoder's blocks to class logits."""
