"""Measurements of speed, behind `lasnn bench`."""
