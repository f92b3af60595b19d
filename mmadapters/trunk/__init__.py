"""The frozen trunk: the part of an encoder below its first adapted block, computed once."""
