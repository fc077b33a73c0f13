"""Modules with parameters, built from the operators."""
