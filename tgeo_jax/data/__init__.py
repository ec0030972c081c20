"""Datasets of our own, splits, and the device-resident input pipeline."""
