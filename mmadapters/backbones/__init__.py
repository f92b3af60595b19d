"""Encoders by name, from timm, transformers, open_clip, torchaudio and the shipped ones."""
