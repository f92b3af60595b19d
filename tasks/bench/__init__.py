"""`mmadapters bench`: the cost of adapters relative to bare encoder, full fine-tuning, peers.

Workers measure, one process for each interpreter, since the peers need other packages than ours.
They take turns, so that other load on the machine affects all of them alike. The files that workers
import (`cases`, `limits`, `encoders`, `contenders`, `peers`, `stepping`, `worker`) need only torch
and the library that they measure.
"""
