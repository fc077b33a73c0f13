"""Measuring a model on a dataset, resumable. Nothing is imported here: importing one part stays cheap."""
