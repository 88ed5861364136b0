"""Accuracy of a checkpoint or bundle on annotated videos, without PyTorch."""
