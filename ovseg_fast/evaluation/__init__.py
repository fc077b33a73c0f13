"""Measuring a model on a dataset: confusion matrix, mIoU, seen, unseen and harmonic mean, resumable.

`evaluate.evaluate` runs it, `metrics` counts, `results` is what comes out, `command` is `ovseg-fast evaluate`. Nothing
is imported here: the command line loads `command` at every start.
"""
