"""Measuring a model on a dataset, resumable. Nothing is imported here: every start of the command line loads this."""
