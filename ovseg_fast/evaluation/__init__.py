"""Measuring a model on a dataset: confusion matrix, mIoU, seen, unseen and harmonic mean, resumable.

Nothing is imported here: the command line loads parts of this at every start.
"""
