"""Encoders as tasks use them: towers, tokenizers and preprocessing."""
