"""`mmadapters bench`: what adapters cost beside the bare encoder, full fine-tuning and the peers.

Measuring runs in workers, one for each interpreter, as the peers need environments of their own;
they take turns, so that what else the machine does falls on all alike. Files that workers import
(`cases`, `limits`, `encoders`, `contenders`, `peers`, `stepping`, `worker`) need torch alone.
"""
